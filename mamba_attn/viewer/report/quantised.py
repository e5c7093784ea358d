"""Packs matrices as text: 16 bits per number, one scale per row, compressed.

A row is stored as integers in -32767..32767 times its largest absolute value / 32767. No number is off by more than
1 / 65534 of the largest of its row (plus float32's rounding, 6e-8 of the number).
"""

import base64
import zlib

import numpy as np

from mamba_attn._types import Float

STEPS = 32767  # whole numbers on either side of zero
ERROR = 0.5 / STEPS  # largest error of a number, relative to the largest of its row


def packed(matrix: Float[np.ndarray, "rows columns"]) -> bytes:
    """Return a matrix as compressed bytes: the rows' scales as float32, all upper bytes, all lower bytes.

    Bytes of one kind compress better together.

    Args:
        matrix: finite.
    """
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    scales = (largest / STEPS).astype("<f4")
    scales[largest[:, 0] > 0] = np.maximum(scales[largest[:, 0] > 0], np.finfo(np.float32).tiny)
    numbers = np.rint(matrix / np.where(scales > 0, scales, 1).astype(np.float64)).clip(-STEPS, STEPS).astype("<i2")
    lower, upper = numbers.view(np.uint8).reshape(-1, 2).T
    return zlib.compress(scales.tobytes() + upper.tobytes() + lower.tobytes(), 9)


def places(xy: Float[np.ndarray, "points 2"]) -> str:
    """Return points as text: base64 of 16-bit numbers, all x and then all y, the longer side of their box 0..65535.

    Args:
        xy: finite.
    """
    low = xy.min(axis=0)
    side = float((xy.max(axis=0) - low).max()) or 1.0
    return as_text(np.rint((xy - low) / side * 65535).astype("<u2").T.tobytes())


def as_text(content: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(content).decode("ascii")
