"""Zarr arrays of a store: tiles, checksums, and what is said when one of them is missing or damaged.

Every chunk has a checksum. What was never written reads as NaN, or, of whole numbers, is missed as a file: lost or
damaged numbers are an error, never zeros.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from mamba_attn.errors import StoreError

TILE = 256  # side of a matrix's tiles: a row or a column of 3,136 tokens touches 13 of them
_ROWS_PER_CHUNK = 16
_CHUNK_BYTES = 2**20
# attribute of arrays whose chunks are all on the disk, also those of zeros alone; arrays of older stores are without it
_WHOLE = "every chunk is a file"


class Arrays:
    """The zarr arrays below a folder.

    Args:
        folder: where they are.
        writable: whether they may be created and changed; else the folder must exist.

    Raises:
        ImportError: zarr is not installed.
        StoreError: there are no arrays.
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
        """Make an empty array.

        Args:
            name: with slashes.
            shape: of it.
            chunks: of its chunks.
            dtype: of its numbers.
        """
        from zarr.codecs import BloscCodec, Crc32cCodec

        self._open[name] = self._group.create_array(
            name, shape=shape, chunks=chunks, dtype=dtype, fill_value=np.nan if np.dtype(dtype).kind == "f" else 0,
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
            config={"write_empty_chunks": True}, attributes={_WHOLE: True},
        )  # fmt: skip

    def create_rows(self, name: str, row: tuple[int, ...], dtype: str, alone: bool = False) -> None:
        """Make an array without rows, for one row per image.

        Args:
            name: with slashes.
            row: shape of a row.
            dtype: of its numbers.
            alone: rows are matrices, and each is cut into tiles.
        """
        size = int(np.prod(row)) * np.dtype(dtype).itemsize
        first = 1 if alone else max(1, min(_ROWS_PER_CHUNK, _CHUNK_BYTES // max(1, size)))
        self.create(name, (0, *row), (first, *(tile(row) if alone else row)), dtype)

    def exists(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._open or name in self._group

    def write(self, name: str, values: np.ndarray, start: int | None = None) -> None:
        """Write a whole array, or some of its rows; each chunk is replaced in one step.

        Args:
            name: with slashes.
            values: what is written.
            start: the first row; None: all.
        """
        array = self._array(name)
        if start is None:
            array[...] = values
        else:
            array[start : start + len(values)] = values

    def grow(self, name: str, rows: int) -> None:
        """Let an array have at least so many rows."""
        array = self._array(name)
        if array.shape[0] < rows:
            array.resize((rows, *array.shape[1:]))

    def read(self, name: str, selection: Any = ...) -> np.ndarray:
        """Read a part of an array; only the chunks that it lies in.

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
        """Look for the chunks of the rows that were read: zarr gives zeros for those that are lost."""
        first = selection[0] if isinstance(selection, tuple) and selection else selection
        rows = np.arange(array.shape[0])[first if isinstance(first, int | np.integer | slice) else slice(None)]
        counts = [-(-side // chunk) for side, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)]
        for place in itertools.product(np.unique(rows // array.chunks[0]).tolist(), *map(range, counts)):
            if not (self.folder / name / array.metadata.encode_chunk_key(place)).is_file():
                raise self._damaged(name, f"chunk {place[0]} is lost")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array.

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
