"""Writes PNG with numpy and zlib only, for pages, notebooks and files."""

import base64
import struct
import zlib
from pathlib import Path

import numpy as np


def encoded(rgb: np.ndarray) -> bytes:
    """Return an image as the content of a PNG file.

    Args:
        rgb: (rows, columns, 3) uint8.
    """
    rows, columns = rgb.shape[:2]
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    plain = np.pad(rgb.reshape(rows, -1), ((0, 0), (1, 0)))
    # filtered rows compress photos better, but images of few colours worse
    data = min((zlib.compress(lines.tobytes()) for lines in (plain, _filtered(rgb))), key=len)
    chunks = (b"IHDR", header), (b"IDAT", data), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def data_uri(rgb: np.ndarray) -> str:
    """Return a (rows, columns, 3) uint8 image as the data URI of a PNG."""
    return "data:image/png;base64," + base64.b64encode(encoded(rgb)).decode("ascii")


def save_png(path: str | Path, rgb: np.ndarray) -> None:
    """Write a (rows, columns, 3) uint8 array.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_bytes(encoded(rgb))


def patch_size(call: str, size: tuple[int, ...], cells: tuple[int, ...]) -> tuple[int, int]:
    """Return the (rows, columns) in pixels of a cell of a grid that fills an image.

    Raises:
        ValueError: the cells do not tile the image.
    """
    if size[0] % cells[0] or size[1] % cells[1]:
        raise ValueError(
            f"{call}: {cells} cells do not tile an image of {size} pixels; pass the image as the model saw it, cut to "
            "the area that its patches cover."
        )
    return size[0] // cells[0], size[1] // cells[1]


def _filtered(rgb: np.ndarray) -> np.ndarray:
    """Filter rows for PNG: each by the one of five predictors (PNG 1.2, section 6) with the smallest residual."""
    here = np.pad(rgb.astype(np.int16), ((1, 0), (1, 0), (0, 0)))
    left, up, corner, here = here[1:, :-1], here[:-1, 1:], here[:-1, :-1], here[1:, 1:]
    far = [np.abs(up - corner), np.abs(left - corner), np.abs(left + up - 2 * corner)]
    paeth = np.where((far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner))
    predicted = np.stack([np.zeros_like(here), left, up, (left + up) // 2, paeth])
    rest = (here - predicted).astype(np.uint8).reshape(5, len(rgb), -1)
    best = np.minimum(rest, -rest).sum(2, dtype=np.int64).argmin(0)  # bytes count as signed, as libpng does it
    return np.column_stack([best.astype(np.uint8), rest[best, np.arange(len(rgb))]])
