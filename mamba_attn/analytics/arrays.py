"""The zarr arrays of a store: chunks with checksums, so that lost or damaged numbers raise an error.

Unwritten floats read as NaN; unwritten integers show as missing objects. Neither is ever read as zeros.
"""

import itertools
from typing import Any

import numpy as np

from mamba_attn.analytics.places import Place, storage_errors
from mamba_attn.errors import StoreError

TILE = 256  # side of a matrix's tiles: a row or a column of 3,136 tokens touches 13 of them
_ROWS_PER_CHUNK = 16
_CHUNK_BYTES = 2**20
# attribute of arrays whose chunks are all on the disk, also those of zeros alone; arrays of older stores are without it
_WHOLE = "every chunk is a file"


class Arrays:
    """The zarr arrays in a folder of a store.

    Args:
        where: the store.
        folder: in it.
        writable: allow creating and changing arrays; otherwise the folder must exist.

    Raises:
        ImportError: zarr is not installed.
        StoreError: the folder has no arrays.
    """

    def __init__(self, where: Place, folder: str, writable: bool = False) -> None:
        try:
            import zarr
        except ImportError as error:
            raise ImportError("stores of attention need zarr: pip install 'mamba_attn[analytics]'") from error
        self.place, self.folder = where, folder
        try:
            store = where.arrays(folder, writable)
            self._group: Any = zarr.open_group(store, mode="a" if writable else "r", zarr_format=3)
        except _lost() as error:
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

    def create_rows(self, name: str, rows: int, row: tuple[int, ...], dtype: str, alone: bool = False) -> int:
        """Create an array of one row per image; return how many rows are written at once at best.

        Args:
            name: with slashes.
            rows: of the array.
            row: shape of a row.
            dtype: of its numbers.
            alone: rows are matrices, to be cut into tiles.
        """
        first = 1 if alone else rows_at_once(row, dtype)
        self.create(name, (rows, *row), (first, *(tile(row) if alone else row)), dtype)
        return first

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

    def cut(self, name: str, rows: int) -> None:
        """Shorten an array to its first rows."""
        array = self._array(name)
        if array.shape[0] > rows:
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
        except _lost() as error:
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
            if not self.place.exists(f"{self.folder}/{name}/{array.metadata.encode_chunk_key(place)}"):
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
            except _lost() as error:
                raise self._damaged(name, error) from error
        return self._open[name]

    def _damaged(self, name: str, why: object) -> StoreError:
        where = f"array {name!r}" if name else "what should hold its arrays"
        reason = str(why).strip().rstrip(".").partition("\n")[0][:150] or type(why).__name__
        return StoreError(
            f"{self.place}/{self.folder}: {where} is missing or damaged ({reason}); collect into a new folder."
        )


def rows_at_once(row: tuple[int, ...], dtype: str) -> int:
    """Return the rows of a chunk.

    Args:
        row: shape of a row.
        dtype: of its numbers.
    """
    return max(1, min(_ROWS_PER_CHUNK, _CHUNK_BYTES // max(1, int(np.prod(row)) * np.dtype(dtype).itemsize)))


def _lost() -> tuple[type[Exception], ...]:
    """Return what zarr raises for an array that is missing or damaged."""
    return (ValueError, TypeError, KeyError, RuntimeError, IndexError, *storage_errors())


def tile(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the tiles that a matrix is cut into."""
    return tuple(min(TILE, side) for side in shape)
