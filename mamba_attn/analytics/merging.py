"""Stores of the same model as one, collected from different images, possibly on different machines.

The parts of all are the parts of the new store. Merging one store copies it into the format of today.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from mamba_attn.analytics.arrays import Arrays
from mamba_attn.analytics.collecting import is_new
from mamba_attn.analytics.contents import Contents
from mamba_attn.analytics.folding import MERGED, Merged, unit, units
from mamba_attn.analytics.index import INDEX, Index, StoredLayer
from mamba_attn.analytics.part_run import empty_statistics
from mamba_attn.analytics.part_writer import PartWriter, route_names, write_statistics
from mamba_attn.analytics.parts import stored_image
from mamba_attn.analytics.places import Place, place, writer_id
from mamba_attn.analytics.statistics import merge, merge_means
from mamba_attn.distributed import Ranks
from mamba_attn.errors import StoreError

_ROWS_AT_ONCE = 16


def merge_stores(stores: Sequence[str | Path], out: str | Path) -> int:
    """Write a store with the images of others, which do not change; return the number of images.

    Args:
        stores: of the same model, layers and routes, of different images.
        out: folder of the new one, empty or absent, or an address in object storage.

    Raises:
        StoreError: stores that do not match, or are half written; an image that is in two; ``out`` is not empty.
        OSError: ``out`` cannot be written.
        ValueError: no stores.

    Example:
        >>> merge_stores(["first", "second"], "both")  # doctest: +SKIP
        12
    """
    if not stores:
        raise ValueError("merge_stores(stores=[]): expected stores.")
    opened = [Contents.open(place("store", each)) for each in stores]
    for each in opened:
        if not each.finished:
            raise StoreError(f"{each.place}: this store is half written; collect the rest of it first.")
        _require_same(opened[0], each)
    names = _names(opened)
    where = place("out", out)
    with where.made():
        if not is_new(where):
            raise StoreError(f"{where}: the folder already holds a store; nothing was changed. Choose another folder.")
        parts = [(contents, at) for contents in opened for at in range(len(contents.parts.numbers))]
        index, counts = _merged_index(opened), []
        for number, (contents, at) in enumerate(parts):
            counts.append(_copy(contents, at, PartWriter(where, index, number), names[str(contents.place)]))
        folder = f"{MERGED}/{len(parts):06d}-{writer_id()}"
        _write_statistics(opened, where, folder, index)
        Merged(len(parts), counts, {unit(*each): folder for each in units(index)}).write(where)
        where.create(INDEX, index.content())  # last: until then this is no store
    return sum(images for images, _ in counts)


def _require_same(first: Contents, second: Contents) -> None:
    a, b = first.index, second.index
    there = {
        "models": ([a.model["name"], a.model["fingerprint"]], [b.model["name"], b.model["fingerprint"]]),
        "routes": (a.routes, b.routes),
        "layers": ([layer.name for layer in a.layers], [layer.name for layer in b.layers]),
        "transforms": (a.transform, b.transform),
    }
    for what, (one, other) in there.items():
        if one != other:
            raise StoreError(f"{first.place} and {second.place} differ in {what}: {one} and {other}; not merged.")
    if not all(map(StoredLayer.same_as, a.layers, b.layers)):
        raise StoreError(f"{first.place} and {second.place} differ in orders or grids; not merged.")


def _merged_index(stores: Sequence[Contents]) -> Index:
    first, parts = stores[0].index, [part for contents in stores for part in contents.parts]
    sizes = [part.stop - part.start for part in parts]
    before = [0, *accumulate(contents.index.wanted[-1] for contents in stores)]
    kept = [
        before[at] + part.start + row
        for at, contents in enumerate(stores)
        for part in contents.parts
        for row, image in enumerate(part.images)
        if image[4]
    ]
    features = first.features
    if len(stores) > 1:
        each = [contents.parts.featured(at) for contents in stores for at in range(len(contents.parts.numbers))]
        features = None if all(contents.index.features is None for contents in stores) else each
    return replace(
        first,
        features=features,
        data=[each for contents in stores for each in contents.index.data],
        layers=[replace(layer, scale=1.0) for layer in first.layers],
        keep=max(kept, default=-1) + 1,
        part=max(sizes),
        wanted=list(accumulate(sizes)),
        command="",
    )


def _names(stores: Sequence[Contents]) -> dict[str, dict[str, str]]:
    """New keys by old ones of every store: if two collections share a key, the later one's name comes before it."""
    known: dict[str, Contents] = {}
    found: dict[str, dict[str, str]] = {}
    for contents in stores:
        index = contents.index
        name = " and ".join(each["name"] for each in index.data)
        identities = {each["identity"] for each in index.data}
        names, twice = {}, []
        for image in contents.images:
            new = image.key
            if new in known:
                new = f"{name}: {image.key}"
                shared = identities & {each["identity"] for each in known[image.key].index.data}
                if shared or new in known:
                    twice.append(image.key)
            names[image.key] = new
        if twice:
            raise StoreError(
                f"{known[twice[0]].place} and {contents.place} both count {min(twice)!r} and {len(twice) - 1} others; "
                "each image counts once, so they are not merged."
            )
        known |= dict.fromkeys(names.values(), contents)
        found[str(contents.place)] = names
    return found


def _copy(contents: Contents, at: int, writer: PartWriter, names: dict[str, str]) -> tuple[int, int]:
    """Copy a part but its statistics; return the numbers of its images and unreadable ones."""
    part, index, found = contents.parts.part(at), contents.index, contents.arrays(at)
    featured = contents.parts.featured(at)
    for start in range(0, featured, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, featured))
        scales = np.array([[layer.scale for layer in index.layers]] * (rows.stop - start), np.float32)
        writer.add("scales", scales * found.read("scales", rows) if found.exists("scales") else scales)
        writer.add("pixels", found.read("pixels", rows))
        for number in range(len(index.layers)):
            writer.add(f"features/{number:03d}", found.read(f"features/{number:03d}", rows))
    for row, image in enumerate(part.images):
        for number, layer in enumerate(index.layers if image[4] else ()):
            for route in route_names(layer, index.routes):
                writer.write_matrix(row, number, route, found.read(f"matrices/{number:03d}/{route}", row))
    images = [stored_image([names[key], *rest], row) for row, (key, *rest) in enumerate(part.images)]
    writer.commit(images, part.unreadable, None, Ranks())
    return len(images), len(part.unreadable)


def _write_statistics(stores: Sequence[Contents], where: Place, folder: str, index: Index) -> None:
    arrays = Arrays(where, folder, writable=True)
    for number, route in units(index):
        total = empty_statistics([index.layers[number]], index.routes).layers[0]
        own, before = total.routes[route], 0
        for contents in stores:
            count = len(contents.parts)
            its = contents.statistics.layer(number, route, index.layers[number])
            merge(own.mean, own.m2, before, its.routes[route].mean, its.routes[route].m2, count)
            if total.moments is not None and its.moments is not None:
                merge_means(total.moments, before, its.moments, count)
            before += count
        total.routes = {route: own}
        total.moments = total.moments if route == "sum" else None
        write_statistics(arrays, number, total)
