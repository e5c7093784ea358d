"""Spearman's rank correlation of many numbers."""

import numpy as np


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation; NaN if either is constant.

    Args:
        first: (numbers,).
        second: (numbers,).
    """
    a, b = (ranks(np.asarray(values)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0 on; equal values share the mean of theirs.

    Args:
        values: (numbers,).
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(middle[place.reshape(-1)], dtype=np.float64)
