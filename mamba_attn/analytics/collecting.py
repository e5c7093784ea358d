"""One pass of a traced model over images into a store: statistics of its attention, features, matrices of some images.

Memory does not grow with the images: what is kept of all of them are means and sums of squares; what is kept of each
goes to the disk at once.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from mamba_attn.analytics._memory import batch_size, require_memory
from mamba_attn.analytics._run import Run
from mamba_attn.analytics._writer import StoreWriter, discard, folder_for, is_new, locked
from mamba_attn.analytics.index import Index, StoredLayer
from mamba_attn.analytics.request import Request, describe
from mamba_attn.errors import StoreError


class Collected(NamedTuple):
    """What a call did: images counted now and in all, and reasons by key of those that could not be used."""

    new: int
    counted: int
    unreadable: dict[str, str]


def collect(
    request: Request, out: str | Path, *, advance: Callable[[int, int], None] = lambda done, wanted: None
) -> Collected:
    """Collect attention into a store; what it holds already is not done again.

    Args:
        request: what is collected.
        out: folder of the store; made when it is not there.
        advance: called with the images that are done, and those that are wanted, after every batch.

    Raises:
        StoreError: the folder holds another store, something else, or a store that is damaged; another process writes
            to it; no image could be used.
        MatrixTooLargeError: the statistics would not fit the memory; the message says what would.
        UnknownLayerError: a pattern fits no layer.
        OSError: the folder cannot be written.
    """
    wanted = request.wanted
    if not wanted:
        raise ValueError(f"data={request.data.name!r}: it holds no images.")
    layers = describe(request)
    size = request.batch or batch_size(layers)
    require_memory(layers, request.routes, size)
    with folder_for(out) as folder, locked(folder):
        new = is_new(folder)
        index = _index(request, layers) if new else _continued(folder, request, layers)
        before, asked = len(index.images), index.wanted
        index.wanted = max(len(wanted), before + len(index.unreadable))
        try:
            Run(request, StoreWriter(folder, index, new), size, advance).go(wanted)
        finally:
            if not index.statistics:  # nothing was counted: nothing is left in the way of the next call
                discard(folder)
        if len(index.images) == before and index.wanted != asked:
            index.write(folder)
    return Collected(len(index.images) - before, len(index.images), dict(index.unreadable))


def _index(request: Request, layers: list[StoredLayer]) -> Index:
    subject, data = request.subject, request.data
    weights = subject.weights
    model = {
        "name": subject.name, "options": dict(subject.options), "fingerprint": subject.fingerprint,
        "weights": str(Path(weights).resolve()) if Path(weights).is_file() else weights,
    }  # fmt: skip
    return Index(
        model, list(subject.classes), asdict(subject.transform), [{"name": data.name, "identity": data.identity}],
        request.routes, request.kept, layers, command=request.command,
    )  # fmt: skip


def _continued(folder: Path, request: Request, layers: list[StoredLayer]) -> Index:
    """The index of a store that is already there, if it is one of the same model and images."""
    index = Index.read(folder)
    subject, data = request.subject, request.data
    same = len(layers) == len(index.layers) and all(map(StoredLayer.same_as, layers, index.layers))
    size = list(index.transform.get("size", ()))
    there = {
        "model": (f"{index.model['name']} with weights {index.model['fingerprint']}",
                  f"{subject.name} with weights {subject.fingerprint}"),
        "images": (" and ".join(each["name"] for each in index.data), data.name),
        "keep": (index.keep, request.kept), "routes": (index.routes, request.routes),
        "size of images": (size, list(subject.transform.size)),
    }  # fmt: skip
    for what, (found, asked) in there.items():
        if found != asked:
            if what in ("keep", "routes"):
                found, asked = f"{what}={found!r}", f"{what}={asked!r}"
            else:
                found = f"{what} {found}"
            raise StoreError(
                f"{folder}: this store is of {found}, not {asked}; nothing was changed. Name another folder."
            )
    if [each["identity"] for each in index.data] != [data.identity]:
        raise StoreError(f"{folder}: {data.name} is not the file or folder that this store was collected from; nothing "
                         "was changed. Name another folder.")  # fmt: skip
    if not same:
        raise StoreError(f"{folder}: this store is of other layers, orders or grids of this model; nothing was "
                         "changed. Name another folder.")  # fmt: skip
    return index
