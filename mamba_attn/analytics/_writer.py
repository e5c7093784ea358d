"""Writing a store so that a kill at any moment loses little and corrupts nothing.

Rows of images (features, pixels, matrices) are written first, at their place, which no counted image has; then the
statistics of all images so far into a folder of a new name; then ``store.json``, in one step, names this folder and the
images that it counts. Until that step the store is what it was before: what the next run finds beyond it is overwritten
by the same images. Nothing that the index names is ever changed.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mamba_attn.analytics._arrays import Arrays, tile
from mamba_attn.analytics.index import INDEX, Index, StoredImage, StoredLayer
from mamba_attn.analytics.projection import feature_size
from mamba_attn.analytics.statistics import LayerStatistics, Statistics
from mamba_attn.core.requirements import writable
from mamba_attn.errors import StoreError

_LOCK = ".lock"
_OURS = {_LOCK, f"{INDEX}.new"}  # what a run that was killed at once leaves


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; the lock ends with it, however it ends. Without a store no trace of it is left.

    Raises:
        StoreError: another process has it.
        OSError: it cannot be written.
    """
    system = _fcntl()
    with (folder / _LOCK).open("a") as file:
        if system is not None:
            try:
                system.flock(file, system.LOCK_EX | system.LOCK_NB)
                if not os.path.samestat(os.fstat(file.fileno()), (folder / _LOCK).stat()):
                    raise OSError("the lock was taken away by a call that ended meanwhile")
            except OSError as error:
                raise StoreError(
                    f"{folder}: another mamba-attn collect is writing this store; wait for it, or name another folder."
                ) from error
        try:
            yield
        finally:
            if not (folder / INDEX).exists():
                with suppress(OSError):  # Windows removes no file that is open
                    (folder / _LOCK).unlink()


@contextmanager
def folder_for(out: str | Path) -> Iterator[Path]:
    """Make a folder; after an error those that were made for it go again, as far as they are empty.

    Raises:
        OSError: it cannot be made or written.
    """
    folder = Path(out).expanduser()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield writable(str(out))
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def is_new(folder: Path) -> bool:
    """Whether nothing was ever written into a folder.

    Raises:
        StoreError: there is something that is no store.
    """
    there = {path.name for path in folder.iterdir()} - _OURS
    if there and INDEX not in there:
        raise StoreError(
            f"{folder}: this folder holds {sorted(there)[0]!r} and no store; nothing was written. Name another folder."
        )
    return not there


def discard(folder: Path) -> None:
    """Remove a store that counts no image."""
    for name in (INDEX, f"{INDEX}.new"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "images", *folder.glob("statistics-*")):
        shutil.rmtree(path, ignore_errors=True)


def route_names(layer: StoredLayer, routes: str) -> list[str]:
    """Names of the matrices that are kept of a layer; the sum of one route is this route."""
    each = [str(route) for route in range(layer.routes)] if routes == "each" and layer.routes > 1 else []
    return [*each, "sum"]


class StoreWriter:
    """A store that is being filled.

    Args:
        folder: of the store, locked.
        index: what it holds; ``layers``, ``images`` and ``statistics`` change with what is counted.
        new: whether its arrays are yet to be made.
    """

    def __init__(self, folder: Path, index: Index, new: bool) -> None:
        self.folder, self.index = folder, index
        if new:
            index.write(folder)
        self._rows = Arrays(folder / "images", writable=True)
        for number, layer in enumerate(index.layers):
            self._create(number, layer)
        if not self._rows.exists("pixels"):
            rows, columns = index.transform["size"]
            self._rows.create_rows("pixels", (rows, columns, 3), "u1")
        self._grow()

    def statistics(self) -> Statistics:
        """Return the statistics of the images that are counted.

        Raises:
            StoreError: they are missing or damaged.
        """
        found = empty_statistics(self.index.layers, self.index.routes)
        if self.index.statistics:
            read_statistics(self.folder, self.index, found)
        return found

    def add_rows(self, start: int, layer: int, features: np.ndarray) -> None:
        """Write the features of images that are not counted yet.

        Args:
            start: the first one's row.
            layer: number of the layer.
            features: (images, features).
        """
        self._rows.write(f"features/{layer:03d}", features, start)

    def add_pixels(self, start: int, pixels: np.ndarray) -> None:
        """Write what the model saw of images that are not counted yet."""
        self._rows.write("pixels", pixels, start)

    def write_matrix(self, row: int, layer: int, route: str, matrix: np.ndarray) -> None:
        """Write the matrix of one image in full."""
        self._rows.write(f"matrices/{layer:03d}/{route}", matrix[None], row)

    def checkpoint(self, images: Sequence[StoredImage], statistics: Statistics) -> None:
        """Count images.

        Args:
            images: in addition to those that are counted, in the order of their rows.
            statistics: of all of them together.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        before = self.index.statistics
        name = f"statistics-{int(before.rpartition('-')[2] or 0) + 1:05d}"
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of a run that was killed here
        arrays = Arrays(self.folder / name, writable=True)
        for number, layer in enumerate(statistics.layers):
            for key, values in layer.arrays().items():
                array = f"{number:03d}/{key}"
                last = tile(values.shape[-2:])
                arrays.create(array, values.shape, (*values.shape[:-2], *last), "f8")
                arrays.write(array, values)
        self.index.images += images
        self.index.statistics = name
        self.index.write(self.folder)
        for path in self.folder.glob("statistics-*"):
            if path.name != name and re.fullmatch(r"statistics-\d+", path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _create(self, number: int, layer: StoredLayer) -> None:
        """The arrays of a layer that are not there yet."""
        name = f"features/{number:03d}"
        if not self._rows.exists(name):
            self._rows.create_rows(name, (feature_size(layer.tokens),), "f2" if layer.exact else "f4")
        for route in route_names(layer, self.index.routes) if self.index.keep else ():
            name = f"matrices/{number:03d}/{route}"
            if not self._rows.exists(name):
                self._rows.create_rows(name, (layer.tokens, layer.tokens), "f4", alone=True)

    def _grow(self) -> None:
        """Room for every image that is wanted, once: a run changes no shapes."""
        for number, layer in enumerate(self.index.layers):
            self._rows.grow(f"features/{number:03d}", self.index.wanted)
            for route in route_names(layer, self.index.routes) if self.index.keep else ():
                self._rows.grow(f"matrices/{number:03d}/{route}", self._most_kept)
        self._rows.grow("pixels", self.index.wanted)

    @property
    def _most_kept(self) -> int:
        """Rows that kept matrices may have: named images can be anywhere, and what is never written takes no room."""
        keep = self.index.keep
        return min(keep, self.index.wanted) if isinstance(keep, int) else self.index.wanted


def empty_statistics(layers: Sequence[StoredLayer], routes: str) -> Statistics:
    """Return the statistics of no images."""
    return Statistics(
        [LayerStatistics.zeros(route_names(layer, routes), layer.tokens, layer.moments) for layer in layers]
    )


def read_statistics(folder: Path, index: Index, into: Statistics) -> None:
    """Read the statistics that an index names.

    Raises:
        StoreError: they are missing or damaged.
    """
    arrays = Arrays(folder / index.statistics)
    for number, layer in enumerate(into.layers):
        for name, own in layer.arrays().items():
            values = arrays.read(f"{number:03d}/{name}")
            if values.shape != own.shape:
                raise StoreError(f"{folder}: {index.statistics}/{number:03d}/{name} has another shape; it is damaged.")
            own[...] = values
    into.count = len(index.images)


def _fcntl() -> ModuleType | Any | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    return fcntl
