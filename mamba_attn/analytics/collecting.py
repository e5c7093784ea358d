"""Passes of a traced model over images into a store: statistics of its attention, features, matrices of some images.

A store is a list of parts, so many images each. Any number of processes make them, in any order, at any time: a part
that is counted stays, and one that was begun and not counted is made again. Then the statistics of all parts are merged
in the order of the parts. Numbers do not depend on who made what. Memory does not grow with the images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from mamba_attn.analytics.folding import Merged, fold, tidy_parts
from mamba_attn.analytics.index import INDEX, Index, StoredLayer
from mamba_attn.analytics.part_run import PartRun
from mamba_attn.analytics.part_writer import PartWriter
from mamba_attn.analytics.parts import FOLDER, Part, Parts, counted, object_name
from mamba_attn.analytics.places import Place, place
from mamba_attn.analytics.request import Request, describe
from mamba_attn.analytics.sizes import batch_size, part_size, require_memory
from mamba_attn.core.decisions import decided
from mamba_attn.distributed import Ranks, wait
from mamba_attn.errors import StoreError

_OLD_LOCK = ".lock"  # of stores of the first format
_MERGE_EVERY = 64  # parts: bounds what their statistics take on the disk
Advance = Callable[[int, int], None]


class Collected(NamedTuple):
    """The result of a call: images counted now and in all, and why others could not be used, by key.

    Args:
        new: images counted by this call, and by those that ran with it.
        counted: images in the store.
        unreadable: reasons by key.
        left: parts that are other processes' to make: jobs of an array may run one after another.

    Example:
        >>> Collected(new=2, counted=6, unreadable={"broken.jpg": "damaged"}).counted
        6
    """

    new: int
    counted: int
    unreadable: dict[str, str]
    left: int = 0


@dataclass(frozen=True)
class Collection:
    """A store that a request is collected into.

    Args:
        request: what to collect.
        place: where the store is.
        index: of the store.
        made: whether this call made the store.
    """

    request: Request
    place: Place
    index: Index
    made: bool

    @classmethod
    def open(cls, request: Request, out: str | Path | Place, *, tell: bool = True) -> "Collection":
        """Make a store, or check that one is of the same model and images.

        Args:
            request: what to collect.
            out: folder, or address in object storage.
            tell: say in the store that more or fewer images are wanted.

        Raises:
            StoreError: the folder holds another store, something else, or a store that is damaged.
            MatrixTooLargeError: the statistics would not fit into memory; the message says what would.
            UnknownLayerError: a pattern fits no layer.
            OSError: the folder cannot be written.
        """
        where = place("out", out)
        asked = _asked(request)
        with where.made():
            made = is_new(where) and where.create(INDEX, asked.content())
            index = asked if made else _resumed(where, request, asked)
            if not made and tell and index.wanted != Index.read(where).wanted:
                where.replace(INDEX, index.content())
        return cls(request, where, index, made)

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not counted."""
        return sorted(set(range(len(self.index.spans))) - set(counted(self.place)))

    def part(
        self, number: int, ranks: Ranks | None = None, advance: Callable[[int], None] = lambda done: None
    ) -> Part | None:
        """Collect a part and count it; None where another process has counted it before.

        Args:
            number: of the part.
            ranks: this process among all. Default: alone.
            advance: called with the number of images that were done, after every batch.
        """
        if self.place.exists(object_name(number)):
            return None
        writer = PartWriter(self.place, self.index, number)
        part = None
        try:
            run = PartRun(self.request, writer, advance)
            run.go()
            part = writer.commit(run.images, run.unreadable, run.statistics, Ranks() if ranks is None else ranks)
        finally:
            if part is None:
                writer.discard()
        return part

    def discard(self) -> None:
        """Remove a store that counts no image."""
        for name in (INDEX, FOLDER, "merged"):
            self.place.remove(name)


def collect(
    request: Request, out: str | Path, *, advance: Advance = lambda done, wanted: None, ranks: Ranks | None = None
) -> Collected:
    """Collect attention into a store, together with all processes of the same launch; skip what it already holds.

    Args:
        request: what to collect.
        out: folder of the store, created if absent, or an address in object storage such as ``s3://bucket/store``.
        advance: called with the images that are done, by all processes, and those that are wanted, after every batch.
        ranks: this process among all. Default: as the environment of torchrun or Slurm says, else alone.

    Raises:
        StoreError: the folder holds another store, something else, or a store that is damaged; no image could be used.
        MatrixTooLargeError: the statistics would not fit into memory; the message says what would.
        UnknownLayerError: a pattern fits no layer.
        OSError: the folder cannot be written.
        TypeError: no request.

    Example:
        >>> import tempfile
        >>> from mamba_attn.datasets import load, open_data
        >>> from mamba_attn.images import SAMPLES
        >>> request = Request(load("vim_digits", weights="demo"), open_data(str(SAMPLES)), limit=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     collect(request, f"{folder}/store").counted
        1
    """
    if not isinstance(request, Request):
        raise TypeError(
            f"analytics.collect({type(request).__name__}, ...): expected a Request; mamba_attn.collect(model, data, "
            "store) takes a model."
        )
    ranks = Ranks.here() if ranks is None else ranks
    where = place("out", out)
    with where.made():
        collection = Collection.open(request, where)
        try:
            _make_parts(collection, ranks, advance)
        finally:
            if ranks.world == 1 and collection.made and not counted(where):  # leave nothing behind
                collection.discard()
        return _whole(collection, ranks)


def _whole(collection: Collection, ranks: Ranks) -> Collected:
    """Merge the statistics as soon as all parts are counted; say what is there."""
    where, index = collection.place, collection.index
    missing = collection.missing()
    while missing and ranks.together:
        wait()
        missing = collection.missing()
    parts = Parts(where, index, counted(where))
    if missing:
        return Collected(ranks.count("new"), len(parts), parts.unreadable, len(missing))
    if not len(parts):
        reasons = parts.unreadable
        if ranks.first:
            collection.discard()
        raise StoreError(
            f"none of the {len(reasons)} images of {collection.request.data.name} could be used; first reason: "
            f"{next(iter(reasons.values()))}"
        )
    fold(where, index, ranks, len(index.spans))
    if ranks.first or not ranks.together:
        tidy_parts(where, parts)
    return Collected(ranks.count("new"), len(parts), parts.unreadable)


def planned(request: Request, out: str | Path) -> tuple[Index, list[int]]:
    """Return what a store would be, and the numbers of the parts that it counts, without writing anything.

    Args:
        request: what to collect.
        out: folder of the store, or an address in object storage.

    Raises:
        StoreError: as ``collect``.
    """
    where = place("out", out)
    asked = _asked(request)
    return (asked, []) if is_new(where) else (_resumed(where, request, asked), counted(where))


def collect_part(request: Request, number: int, out: str | Path) -> Part | None:
    """Collect one part of a store and count it: what a scheduler of your own calls, in any process, in any order.

    The same part is the same bits whoever makes it. ``missing_parts`` lists the numbers; ``collect`` at the end merges
    the statistics, and makes what is still missing.

    Args:
        request: what to collect; a scheduler may pickle it.
        number: of the part.
        out: folder of the store, which every process reaches, or an address in object storage.

    Returns:
        The part; None if it was counted already.

    Raises:
        StoreError: the folder holds another store, or there is no such part.

    Example:
        >>> for number in missing_parts(request, "store"):  # doctest: +SKIP
        ...     collect_part(request, number, "store")
        >>> collect(request, "store").counted  # doctest: +SKIP
        640
    """
    collection = Collection.open(request, out, tell=False)
    if not 0 <= number < len(collection.index.spans):
        raise StoreError(
            f"{collection.place}: it has parts 0..{len(collection.index.spans) - 1}, and no part {number}."
        )
    return collection.part(number)


def missing_parts(request: Request, out: str | Path) -> list[int]:
    """Make a store if there is none, and return the numbers of the parts to collect.

    Args:
        request: what to collect.
        out: folder of the store, or an address in object storage.

    Raises:
        StoreError: as ``collect``.

    Example:
        >>> missing_parts(request, "store")  # doctest: +SKIP
        [0, 1, 2]
    """
    return Collection.open(request, out).missing()


def merged_at_once(index: Index) -> int:
    """Return the most parts whose statistics lie on the disk at a time."""
    return min(len(index.spans), 2 * _MERGE_EVERY)


def _make_parts(collection: Collection, ranks: Ranks, advance: Advance) -> None:
    """Make this process's share of the missing parts."""
    where, index = collection.place, collection.index
    spans, known = index.spans, set(counted(where))
    wanted, before = index.wanted[-1], sum(stop - start for at, (start, stop) in enumerate(spans) if at in known)
    advance(before, wanted)

    def done(count: int) -> None:
        advance(min(wanted, before + ranks.count("done", count)), wanted)

    for number in ranks.shares("parts", len(spans)):
        if number in known:
            continue
        part = collection.part(number, ranks, done)
        if part is not None:
            ranks.count("new", len(part.images))
            _merge_meanwhile(where, index, ranks)


def _merge_meanwhile(where: Place, index: Index, ranks: Ranks) -> None:
    """Merge the first parts of a long run, so that the statistics of few parts lie on the disk at any time."""
    if len(index.spans) <= _MERGE_EVERY:
        return
    latest = Merged.latest(where)
    merged, there = 0 if latest is None else latest.parts, set(counted(where))
    target = merged + _MERGE_EVERY
    if target < len(index.spans) and all(at in there for at in range(merged, target)):
        if ranks.together and ranks.count(f"merge {target} alone", 1) > 1:
            return  # another rank does
        fold(where, index, Ranks(), target)


def is_new(where: Place) -> bool:
    """Whether nothing was ever written into a folder.

    Args:
        where: the folder.

    Raises:
        StoreError: the folder holds something that is not a store.
    """
    there = {*where.names()} - {_OLD_LOCK}
    if there and INDEX not in there:
        raise StoreError(
            f"{where}: this folder holds {min(there)!r} and no store; nothing was written. Use another folder."
        )
    return not there


def _asked(request: Request) -> Index:
    """Return the index of a new store."""
    if not request.wanted:
        raise ValueError(f"data={request.data.name!r}: it holds no images.")
    layers = describe(request)
    index = _index(request, layers)
    require_memory(layers, request.routes, index.batch, request.subject.device)
    tokens = max(layer.tokens for layer in layers)
    why = "asked for" if request.batch else f"the largest layer has {tokens} tokens"
    decided("collect: batches of %d images (%s), %d threads", index.batch, why, torch.get_num_threads())
    return index


def _index(request: Request, layers: list[StoredLayer]) -> Index:
    subject, data = request.subject, request.data
    weights = subject.weights
    model = {
        "name": subject.name,
        "spec": subject.spec,
        "head": subject.head,
        "stand_ins": subject.stand_ins,
        "options": dict(subject.options),
        "fingerprint": subject.fingerprint,
        "weights": str(Path(weights).resolve()) if Path(weights).is_file() else weights,
    }
    wanted = len(request.wanted)
    return Index(
        model,
        list(subject.classes),
        subject.transform.as_dict(),
        [{"name": data.name, "identity": data.identity, "path": data.path}],
        request.routes,
        request.kept,
        layers,
        request.part or part_size(layers, wanted, subject.device),
        request.batch or batch_size(layers),
        [wanted],
        command=request.command,
        features=request.featured,
    )


def _wanted(where: Place, index: Index, asked: int) -> list[int]:
    """Return what a store's ``wanted`` becomes where more images are asked for, or fewer; no counted part changes."""
    planned = index.wanted[-1]
    if asked == planned:
        return index.wanted
    there = counted(where)
    covered = index.spans[there[-1]][1] if there else 0
    if asked > planned and covered == planned:
        return [*index.wanted, asked]
    end = max(asked, covered)
    return [each for each in index.wanted if each < end and each <= covered] + [end]


def _resumed(where: Place, request: Request, asked: Index) -> Index:
    """Return what the index of an existing store becomes, if it is of the same model and images."""
    index = Index.read(where)
    subject, data = request.subject, request.data
    if (request.part or index.part) != index.part or (request.batch or index.batch) != index.batch:
        what = "part" if (request.part or index.part) != index.part else "batch"
        raise StoreError(
            f"{where}: this store is of {what}={getattr(index, what)}, not {what}={getattr(request, what)}; nothing "
            "was changed. Choose another folder."
        )
    size = list(index.transform.get("size", ()))
    there = {
        "model": (f"{index.model['name']} with weights {index.model['fingerprint']}",
                  f"{subject.name} with weights {subject.fingerprint}"),
        "images": (" and ".join(each["name"] for each in index.data), data.name),
        "keep": (index.keep, asked.keep), "routes": (index.routes, request.routes),
        "features": (_spelt(index), _spelt(index if request.features is None else asked)),
        "size of images": (size, list(subject.transform.size)),
    }  # fmt: skip
    for what, (found, now) in there.items():
        if found != now:
            if what in ("keep", "routes", "features"):
                found, now = f"{what}={found!r}", f"{what}={now!r}"
            else:
                found = f"{what} {found}"
            raise StoreError(
                f"{where}: this store is of {found}, not {now}; nothing was changed. Choose another folder."
            )
    if [each["identity"] for each in index.data] != [data.identity]:
        raise StoreError(
            f"{where}: {data.name} does not hold the files that this store was collected from, by their names and "
            "sizes; nothing was changed. Choose another folder."
        )
    same = len(asked.layers) == len(index.layers) and all(map(StoredLayer.same_as, asked.layers, index.layers))
    if not same:
        raise StoreError(
            f"{where}: this store is of other layers, orders or grids of this model; nothing was "
            "changed. Choose another folder."
        )
    return replace(index, wanted=_wanted(where, index, asked.wanted[-1]))


def _spelt(index: Index) -> int | list[int] | str:
    return "all" if index.features is None else index.features
