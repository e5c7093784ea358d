"""What collecting would take, before anything is written."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamba_attn.analytics.arrays import rows_at_once, tile
from mamba_attn.analytics.collecting import merged_at_once, planned
from mamba_attn.analytics.folding import units
from mamba_attn.analytics.index import Index
from mamba_attn.analytics.part_run import PartRun
from mamba_attn.analytics.part_writer import PartWriter, route_names
from mamba_attn.analytics.projection import feature_size
from mamba_attn.analytics.request import Request
from mamba_attn.distributed import Ranks

_ARRAY_FILES = 1  # zarr.json of every array


@dataclass(frozen=True)
class Plan:
    """What collecting would take. Bytes are those before compression, whose effect depends on the images.

    Args:
        images: that are missing.
        counted: that the store has.
        parts: that are missing.
        rows: bytes of features, pixels and kept matrices of the missing images.
        statistics: bytes of the statistics of all images.
        meanwhile: bytes of the statistics of single parts, while they wait to be merged.
        files: of the whole store.
        seconds: about, of all ranks together; measured on one batch of the images.
        ranks: processes.
        featured: images whose features and pixels are stored.
    """

    images: int
    counted: int
    parts: int
    rows: int
    statistics: int
    meanwhile: int
    files: int
    seconds: float
    ranks: int
    featured: int

    def lines(self) -> list[str]:
        """Return the plan as sentences."""
        there = f", {self.counted:,} are counted already" if self.counted else ""
        processes = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return [
            f"images: {self.images:,} in {self.parts:,} parts{there}",
            f"features and pixels: of the first {self.featured:,} images; all count in the statistics",
            f"bytes: at most {_bytes(self.rows)} for images, {_bytes(self.statistics)} for statistics; while it runs "
            f"{_bytes(self.meanwhile)} more",
            f"files: about {self.files:,}",
            f"seconds: about {self.seconds:,.0f} on {processes} like this one",
        ]


def plan(request: Request, out: str | Path, ranks: Ranks) -> Plan:
    """Return what collecting would take: counted, and timed on one batch; nothing is written.

    Args:
        request: what to collect.
        out: folder of the store, or an address in object storage.
        ranks: the processes that would collect.

    Raises:
        StoreError: the folder holds another store, or something else.
        MatrixTooLargeError: the statistics would not fit into memory.
    """
    index, there = planned(request, out)
    spans = index.spans
    missing = sorted(set(range(len(spans))) - set(there))
    featured = [index.featured(at) for at in range(len(spans))]
    images = sum(spans[at][1] - spans[at][0] for at in missing)
    kept = request.wanted and [
        at for at in range(index.wanted[-1]) if index.keeps(at, request.data.items[request.wanted[at]].key)
    ] if index.keep else []  # fmt: skip
    statistics = sum(_statistics(index))
    return Plan(
        images,
        index.wanted[-1] - images,
        len(missing),
        sum(featured[at] for at in missing) * _row_bytes(index) + len(kept or ()) * _matrix_bytes(index),
        statistics,
        min(len(missing), merged_at_once(index)) * statistics,
        _files(index, len(kept or ())),
        images * _seconds(request, index) / ranks.world,
        ranks.world,
        sum(featured),
    )


def _row_bytes(index: Index) -> int:
    features = sum(feature_size(layer.tokens) * (2 if layer.exact else 4) for layer in index.layers)
    return features + 4 * len(index.layers) + 3 * math.prod(map(int, index.transform["size"]))


def _matrix_bytes(index: Index) -> int:
    return sum(4 * index.layers[number].tokens ** 2 for number, _ in units(index))


def _statistics(index: Index) -> list[int]:
    """Bytes of the statistics of every layer."""
    return [
        16 * (len(route_names(layer, index.routes)) * layer.tokens**2 + math.prod(layer.moments or (0,)))
        for layer in index.layers
    ]


def _files(index: Index, kept: int) -> int:
    """Files of a finished store: chunks, one more per array, one per part and three lists."""
    rows = [((feature_size(layer.tokens),), "f2" if layer.exact else "f4") for layer in index.layers]
    rows += [((len(index.layers),), "f4"), ((*index.transform["size"], 3), "u1")]
    files = 3 + len(units(index))
    for at in range(len(index.spans)):
        count = index.featured(at)
        files += 2 + sum(_ARRAY_FILES - -count // rows_at_once(*row) for row in rows if count)
    tiles = [_tiles((layer.tokens, layer.tokens)) for layer in index.layers]
    for number, route in units(index):
        layer = index.layers[number]
        files += 2 * (_ARRAY_FILES + tiles[number]) + kept * tiles[number]
        if route == "sum" and layer.moments is not None:
            files += _ARRAY_FILES + 2 * layer.moments[0] * _tiles(layer.moments[1:])
    return files


def _tiles(shape: Sequence[int]) -> int:
    return math.prod(-(-side // part) for side, part in zip(shape, tile(tuple(shape)), strict=True))


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _seconds(request: Request, index: Index) -> float:
    """Seconds of an image: the second of two batches, or of the first one twice."""
    took = 0.0
    for _ in range(2):
        run = PartRun(request, _Nothing(index), lambda done: None)
        began = time.perf_counter()
        run.go()
        took = (time.perf_counter() - began) / max(1, len(run.images))
    return took


class _Nothing(PartWriter):
    """Takes the images of one batch, and writes nothing."""

    def __init__(self, index: Index) -> None:
        self.index, self.number = index, 0
        self.start, self.stop = 0, min(index.batch, index.wanted[-1])
        self.featured = min(index.featured(0), self.stop)

    def add(self, name: str, rows: np.ndarray) -> None:
        """Drop rows."""

    def write_matrix(self, row: int, layer: int, route: str, matrix: np.ndarray) -> None:
        """Drop a matrix."""
