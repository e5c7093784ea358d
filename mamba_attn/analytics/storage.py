"""The arrays of a store, written in an order in which a kill at any moment loses little and corrupts nothing.

Every chunk has a checksum. Unwritten floats read as NaN; unwritten integers show as missing files: lost or
damaged numbers raise an error, never read as zeros.

Rows of images (features, pixels, matrices) are written first, at their place, which no counted image has; then the
statistics of all images so far into a folder of a new name; then ``store.json``, in one step, names this folder and the
images that it counts. Until that step the store is unchanged: the next run overwrites anything beyond it with
the same images. Nothing that the index names ever changes.
"""

import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mamba_attn.analytics.index import INDEX, Index, StoredImage, StoredLayer
from mamba_attn.analytics.projection import feature_size
from mamba_attn.analytics.statistics import LayerStatistics, Statistics
from mamba_attn.core.requirements import writable
from mamba_attn.errors import StoreError, local_path

_LOCK = ".lock"
_OURS = {_LOCK, f"{INDEX}.new"}  # what a run that is killed right at the start leaves
TILE = 256  # side of a matrix's tiles: a row or a column of 3,136 tokens touches 13 of them
_ROWS_PER_CHUNK = 16
_CHUNK_BYTES = 2**20
# attribute of arrays whose chunks are all on the disk, also those of zeros alone; arrays of older stores are without it
_WHOLE = "every chunk is a file"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the lock ends with the process. If no store was written, the lock file goes too.

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
                    raise OSError("a call that just ended removed the lock")
            except OSError as error:
                raise StoreError(
                    f"{folder}: another mamba-attn collect is writing this store; wait for it, or use another folder."
                ) from error
        try:
            yield
        finally:
            if not (folder / INDEX).exists():
                with suppress(OSError):  # Windows removes no file that is open
                    (folder / _LOCK).unlink()


@contextmanager
def folder_for(out: str | Path) -> Iterator[Path]:
    """Make a folder; after an error, remove the folders made for it that are empty.

    Raises:
        OSError: it cannot be made or written.
    """
    folder = local_path("out", out)
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
        StoreError: the folder holds something that is not a store.
    """
    there = {path.name for path in folder.iterdir()} - _OURS
    if there and INDEX not in there:
        raise StoreError(
            f"{folder}: this folder holds {sorted(there)[0]!r} and no store; nothing was written. Use another folder."
        )
    return not there


def discard(folder: Path) -> None:
    """Remove the files of a store that counts no image."""
    for name in (INDEX, f"{INDEX}.new"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "images", *folder.glob("statistics-*")):
        shutil.rmtree(path, ignore_errors=True)


def route_names(layer: StoredLayer, routes: str) -> list[str]:
    """Return names of the matrices kept for a layer; with one route, the sum is that route."""
    each = [str(route) for route in range(layer.routes)] if routes == "each" and layer.routes > 1 else []
    return [*each, "sum"]


class StoreWriter:
    """Writes images and statistics into a store.

    Args:
        folder: of the store, locked.
        index: of the store; ``layers``, ``images`` and ``statistics`` change as images are counted.
        new: whether its arrays do not exist yet.
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
        """Return the statistics of the counted images.

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
        """Write the pixels that the model saw, of images that are not counted yet."""
        self._rows.write("pixels", pixels, start)

    def write_matrix(self, row: int, layer: int, route: str, matrix: np.ndarray) -> None:
        """Write the matrix of one image in full."""
        self._rows.write(f"matrices/{layer:03d}/{route}", matrix[None], row)

    def checkpoint(self, images: Sequence[StoredImage], statistics: Statistics) -> None:
        """Count images.

        Args:
            images: in addition to the counted ones, in the order of their rows.
            statistics: of all of them together.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        before = self.index.statistics
        name = f"statistics-{int(before.rpartition('-')[2] or 0) + 1:05d}"
        shutil.rmtree(self.folder / name, ignore_errors=True)  # left by a run that was killed here
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
        """Create the missing arrays of a layer."""
        name = f"features/{number:03d}"
        if not self._rows.exists(name):
            self._rows.create_rows(name, (feature_size(layer.tokens),), "f2" if layer.exact else "f4")
        for route in route_names(layer, self.index.routes) if self.index.keep else ():
            name = f"matrices/{number:03d}/{route}"
            if not self._rows.exists(name):
                self._rows.create_rows(name, (layer.tokens, layer.tokens), "f4", alone=True)

    def _grow(self) -> None:
        """Make room for all wanted images once, because a run must not change shapes."""
        for number, layer in enumerate(self.index.layers):
            self._rows.grow(f"features/{number:03d}", self.index.wanted)
            for route in route_names(layer, self.index.routes) if self.index.keep else ():
                self._rows.grow(f"matrices/{number:03d}/{route}", self._most_kept)
        self._rows.grow("pixels", self.index.wanted)

    @property
    def _most_kept(self) -> int:
        """Return the rows for kept matrices: named images can be anywhere, and unwritten rows take no space."""
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


class Arrays:
    """The zarr arrays in a folder.

    Args:
        folder: where they are.
        writable: allow creating and changing arrays; otherwise the folder must exist.

    Raises:
        ImportError: zarr is not installed.
        StoreError: the folder has no arrays.
    """

    def __init__(self, folder: Path, writable: bool = False) -> None:
        try:
            import zarr
        except ImportError as error:
            raise ImportError("stores of attention need zarr: pip install 'mamba_attn[analytics]'") from error
        self.folder = folder
        try:
            self._group: Any = zarr.open_group(str(folder), mode="a" if writable else "r", zarr_format=3)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._damaged("", error) from error
        self._open: dict[str, Any] = {}

    def create(self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> None:
        """Create an array without values.

        Args:
            name: with slashes.
            shape: of the array.
            chunks: shape of a chunk.
            dtype: of the array.
        """
        from zarr.codecs import BloscCodec, Crc32cCodec

        self._open[name] = self._group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            fill_value=np.nan if np.dtype(dtype).kind == "f" else 0,
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
            config={"write_empty_chunks": True},
            attributes={_WHOLE: True},
        )

    def create_rows(self, name: str, row: tuple[int, ...], dtype: str, alone: bool = False) -> None:
        """Create an array without rows, to hold one row per image.

        Args:
            name: with slashes.
            row: shape of a row.
            dtype: of its numbers.
            alone: rows are matrices, to be cut into tiles.
        """
        size = int(np.prod(row)) * np.dtype(dtype).itemsize
        first = 1 if alone else max(1, min(_ROWS_PER_CHUNK, _CHUNK_BYTES // max(1, size)))
        self.create(name, (0, *row), (first, *(tile(row) if alone else row)), dtype)

    def exists(self, name: str) -> bool:
        """Whether an array of this name exists."""
        return name in self._open or name in self._group

    def write(self, name: str, values: np.ndarray, start: int | None = None) -> None:
        """Write a whole array, or some of its rows; each chunk is replaced in one step.

        Args:
            name: with slashes.
            values: to write.
            start: the first row; None: all.
        """
        array = self._array(name)
        if start is None:
            array[...] = values
        else:
            array[start : start + len(values)] = values

    def grow(self, name: str, rows: int) -> None:
        """Enlarge an array to at least this number of rows."""
        array = self._array(name)
        if array.shape[0] < rows:
            array.resize((rows, *array.shape[1:]))

    def read(self, name: str, selection: Any = ...) -> np.ndarray:
        """Read a part of an array, and only the chunks that hold it.

        Args:
            name: with slashes.
            selection: as NumPy takes it.

        Raises:
            StoreError: it is missing, damaged, or was never written.
        """
        array = self._array(name)
        try:
            values = np.asarray(array[selection])
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, IndexError) as error:
            raise self._damaged(name, error) from error
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise self._damaged(name, "numbers are missing")
        if values.dtype.kind != "f" and array.attrs.get(_WHOLE):
            self._check_files(name, array, selection)
        return values

    def _check_files(self, name: str, array: Any, selection: Any) -> None:
        """Check that the chunks of the rows that were read exist: zarr returns zeros for lost ones."""
        first = selection[0] if isinstance(selection, tuple) and selection else selection
        rows = np.arange(array.shape[0])[first if isinstance(first, int | np.integer | slice) else slice(None)]
        counts = [-(-side // chunk) for side, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)]
        for place in itertools.product(np.unique(rows // array.chunks[0]).tolist(), *map(range, counts)):
            if not (self.folder / name / array.metadata.encode_chunk_key(place)).is_file():
                raise self._damaged(name, f"chunk {place[0]} is lost")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array.

        Raises:
            StoreError: it is missing or damaged.
        """
        return tuple(self._array(name).shape)

    def _array(self, name: str) -> Any:
        if name not in self._open:
            import zarr

            try:
                with zarr.config.set({"array.write_empty_chunks": True}):  # kept by the array, stored nowhere
                    self._open[name] = self._group[name]
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise self._damaged(name, error) from error
        return self._open[name]

    def _damaged(self, name: str, why: object) -> StoreError:
        where = f"array {name!r}" if name else "what should hold its arrays"
        reason = str(why).strip().rstrip(".").partition("\n")[0][:150] or type(why).__name__
        return StoreError(f"{self.folder}: {where} is missing or damaged ({reason}); collect into a new folder.")


def tile(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the tiles that a matrix is cut into."""
    return tuple(min(TILE, side) for side in shape)
