"""Merges two stores of the same model, collected from different images, possibly on different machines."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mamba_attn.analytics.index import Index, StoredImage, StoredLayer
from mamba_attn.analytics.storage import (
    StoreWriter,
    empty_statistics,
    folder_for,
    is_new,
    locked,
    read_statistics,
    route_names,
)
from mamba_attn.analytics.store import AttentionStore
from mamba_attn.errors import StoreError

_ROWS_AT_ONCE = 16


def merge_stores(first: str | Path, second: str | Path, out: str | Path) -> int:
    """Write a store with the images of two others, which do not change; return the number of images.

    Args:
        first: a store.
        second: a store of the same model, layers and routes, of other images.
        out: folder of the new one, empty or absent.

    Raises:
        StoreError: stores that do not match, or an image that is in both; ``out`` is not empty.
        OSError: ``out`` cannot be written.

    Example:
        >>> merge_stores("first", "second", "both")  # doctest: +SKIP
        12
    """
    stores = [AttentionStore.open(each) for each in (first, second)]
    _require_same(*stores)
    index, images = _merged_index(*stores), _images(*stores)
    with folder_for(out) as folder, locked(folder):
        if not is_new(folder):
            raise StoreError(f"{folder}: the folder already holds a store; nothing was changed. Choose another folder.")
        index.wanted = len(images) + len(index.unreadable)
        writer = StoreWriter(folder, index, new=True)
        statistics = writer.statistics()
        start = 0
        for store in stores:
            its = empty_statistics(store.index.layers, store.index.routes)
            read_statistics(store.folder, store.index, its)
            statistics.merge(its)
            _copy_rows(store, writer, start)
            start += len(store.images)
        writer.checkpoint(images, statistics)
    return len(images)


def _require_same(first: AttentionStore, second: AttentionStore) -> None:
    a, b = first.index, second.index
    there = {
        "models": ([a.model["name"], a.model["fingerprint"]], [b.model["name"], b.model["fingerprint"]]),
        "routes": (a.routes, b.routes),
        "layers": ([layer.name for layer in a.layers], [layer.name for layer in b.layers]),
        "transforms": (a.transform, b.transform),
    }
    for what, (one, other) in there.items():
        if one != other:
            raise StoreError(f"{first.folder} and {second.folder} differ in {what}: {one} and {other}; not merged.")
    if not all(map(StoredLayer.same_as, a.layers, b.layers)):
        raise StoreError(f"{first.folder} and {second.folder} differ in orders or grids; not merged.")


def _merged_index(first: AttentionStore, second: AttentionStore) -> Index:
    a, b = first.index, second.index
    layers = [replace(one, scale=min(one.scale, other.scale)) for one, other in zip(a.layers, b.layers, strict=True)]
    kept = [image.row for image in a.images if image.kept]
    kept += [len(a.images) + image.row for image in b.images if image.kept]
    return replace(
        a,
        data=[*a.data, *b.data],
        layers=layers,
        images=[],
        unreadable={**a.unreadable, **b.unreadable},
        statistics="",
        keep=max(kept, default=-1) + 1,
        command="",
    )


def _images(first: AttentionStore, second: AttentionStore) -> list[StoredImage]:
    """All images; if two collections share a key, prefix the second collection's name."""
    a, b = first.index, second.index
    known = {image.key for image in a.images}
    twice = known & {image.key for image in b.images}
    shared = {each["identity"] for each in a.data} & {each["identity"] for each in b.data}
    name = " and ".join(each["name"] for each in b.data)
    renamed = {key: f"{name}: {key}" for key in twice}
    if twice and (shared or known & set(renamed.values())):
        raise StoreError(
            f"{first.folder} and {second.folder} both count {min(twice)!r} and {len(twice) - 1} others; each image "
            "counts once, so they are not merged."
        )
    moved = [replace(image, key=renamed.get(image.key, image.key), row=len(a.images) + image.row) for image in b.images]
    return [*a.images, *moved]


def _copy_rows(store: AttentionStore, writer: StoreWriter, start: int) -> None:
    """Features, pixels and matrices, a few at a time."""
    count = len(store.images)
    for number, layer in enumerate(writer.index.layers):
        for low, features in store.feature_rows(number, _ROWS_AT_ONCE):
            rows = (features * layer.scale).astype(np.float16) if layer.exact else features
            writer.add_rows(start + low, number, rows)
        for image in store.images:
            for route in route_names(layer, store.index.routes) if image.kept else ():
                writer.write_matrix(start + image.row, number, route, store.matrix(number, image, route))
    for row in range(count):
        writer.add_pixels(start + row, store.pixels(row)[None])
