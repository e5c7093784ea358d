"""Writes the arrays of one part, in a folder of a new name, whole chunks at a time."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from mamba_attn.analytics.arrays import Arrays, tile
from mamba_attn.analytics.index import Index, StoredImage, StoredLayer
from mamba_attn.analytics.parts import FOLDER, Part
from mamba_attn.analytics.places import Place, writer_id
from mamba_attn.analytics.projection import feature_size
from mamba_attn.analytics.statistics import LayerStatistics, Statistics
from mamba_attn.distributed import Ranks

ROWS, STATISTICS = "rows", "statistics"


def route_names(layer: StoredLayer, routes: str) -> list[str]:
    """Return names of the matrices kept for a layer; with one route, the sum is that route."""
    each = [str(route) for route in range(layer.routes)] if routes == "each" and layer.routes > 1 else []
    return [*each, "sum"]


class PartWriter:
    """Writes a part; nothing of it is counted before ``commit``.

    Args:
        where: the store.
        index: of it.
        number: of the part.
    """

    def __init__(self, where: Place, index: Index, number: int) -> None:
        self.place, self.index, self.number = where, index, number
        self.start, self.stop = index.spans[number]
        self.featured = index.featured(number)
        self.folder = f"{FOLDER}/{number:06d}-{writer_id()}"
        self._rows = Arrays(where, f"{self.folder}/{ROWS}", writable=True)
        self._at_once: dict[str, int] = {}
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._written: dict[str, int] = {}
        for at, layer in enumerate(index.layers if self.featured else ()):
            self._create(f"features/{at:03d}", (feature_size(layer.tokens),), "f2" if layer.exact else "f4")
        if self.featured:
            self._create("scales", (len(index.layers),), "f4")
            self._create("pixels", (*index.transform["size"], 3), "u1")

    def add(self, name: str, rows: np.ndarray) -> None:
        """Write the next rows of "features/NNN", "scales" or "pixels"."""
        self._waiting[name].append(rows)
        if sum(map(len, self._waiting[name])) >= self._at_once[name]:
            self._flush(name)

    def write_matrix(self, row: int, layer: int, route: str, matrix: np.ndarray) -> None:
        """Write the matrix of one image in full.

        Args:
            row: of the image in this part.
            layer: number of the layer.
            route: "sum", or its number.
            matrix: (tokens, tokens) float32.
        """
        name = f"matrices/{layer:03d}/{route}"
        if not self._rows.exists(name):  # unwritten rows take no space
            self._rows.create_rows(name, self.stop - self.start, matrix.shape, "f4", alone=True)
        self._rows.write(name, matrix[None], row)

    def commit(
        self, images: Sequence[StoredImage], unreadable: dict[str, str], statistics: Statistics | None, ranks: Ranks
    ) -> Part | None:
        """Write what is left, and count the part; return None if another writer has counted it before.

        Args:
            images: the readable ones, in order.
            unreadable: reasons by key of the others.
            statistics: of the images; None where they are merged already.
            ranks: this process among all.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        for name in self._waiting:
            self._flush(name, whole=False)
            self._rows.cut(name, self._written[name])
        if images and statistics is not None:
            arrays = Arrays(self.place, f"{self.folder}/{STATISTICS}", writable=True)
            for number, layer in enumerate(statistics.layers):
                write_statistics(arrays, number, layer)
        part = Part(
            self.number,
            self.start,
            self.stop,
            f"{self.folder}/{ROWS}",
            f"{self.folder}/{STATISTICS}",
            [list(asdict(image).values())[:-1] for image in images],  # without the row
            unreadable,
            ranks.named(),
            self._written.get("pixels", 0),
        )
        return part if self.place.create(part.object_name, part.content()) else None

    def discard(self) -> None:
        """Remove everything that was written."""
        self.place.remove(self.folder)

    def _create(self, name: str, row: tuple[int, ...], dtype: str) -> None:
        self._at_once[name] = self._rows.create_rows(name, self.featured, row, dtype)
        self._waiting[name], self._written[name] = [], 0

    def _flush(self, name: str, whole: bool = True) -> None:
        """Write waiting rows: whole chunks, which are written once, or all."""
        if not self._waiting[name]:
            return
        rows = np.concatenate(self._waiting[name])
        count = len(rows) - len(rows) % self._at_once[name] if whole else len(rows)
        if count:
            self._rows.write(name, rows[:count], self._written[name])
        self._written[name] += count
        self._waiting[name] = [rows[count:]] if count < len(rows) else []


def write_statistics(arrays: Arrays, number: int, layer: LayerStatistics) -> None:
    """Write the statistics of a layer, or of some of its routes.

    Args:
        arrays: of a folder of statistics.
        number: of the layer.
        layer: its statistics.
    """
    for key, values in layer.arrays().items():
        name = f"{number:03d}/{key}"
        arrays.create(name, values.shape, (*values.shape[:-2], *tile(values.shape[-2:])), "f8")
        arrays.write(name, values)
