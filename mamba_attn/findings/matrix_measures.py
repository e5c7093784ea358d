"""Findings that every image has its own number of: from the shares of what each patch of a block reads.

Shares are |attention| between patches divided by its sum over a row, (images, n, n); the reader is the first of the two
axes. Rows that read nothing are left out.
"""

import numpy as np

from mamba_attn.findings.places import Places


def shares_of(matrices: np.ndarray) -> np.ndarray:
    """Return |attention| as shares of its rows; rows of zeros stay zeros.

    Args:
        matrices: (images, n, n), signed or not.
    """
    size = np.abs(matrices)
    total = size.sum(2, keepdims=True)
    shares: np.ndarray = size / np.where(total > 0, total, 1)
    return shares


def entropy(shares: np.ndarray, places: Places) -> np.ndarray:
    """-sum_j s_ij log s_ij / log n, mean over rows i: 0 where one patch is read, 1 where all are read alike.

    Args:
        shares: of images.
        places: of the patches.
    """
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return _mean(-np.einsum("bij,bij->bi", shares, logs) / np.log(len(places)), shares)


def distance(shares: np.ndarray, places: Places) -> np.ndarray:
    """sum_j s_ij |x_i - x_j|, mean over rows, in pixels: the mean attention distance of arXiv 2010.11929, figure 7.

    Args:
        shares: of images.
        places: of the patches.
    """
    return _mean(np.einsum("bij,ij->bi", shares, places.away), shares)


def neighbour_share(shares: np.ndarray, places: Places) -> np.ndarray:
    """Sum of s_ij over the patch itself and its eight neighbours, mean over rows (arXiv 2502.20764, complementary).

    Args:
        shares: of images.
        places: of the patches.
    """
    return _mean(np.einsum("bij,ij->bi", shares, places.near.astype(np.float32)), shares)


def preceding_lift(shares: np.ndarray, places: Places) -> np.ndarray:
    """Share read 1 to 3 steps back in a route, over that of uniform attention; the diagonal apart (arXiv 2502.20764).

    What is just before a patch in a route that runs backwards is just after it in the forward one.

    Args:
        shares: of images.
        places: of the patches.
    """
    others = 1 - np.einsum("bii->bi", shares)
    counted = shares.any(2) & (others > 1e-6)
    found = np.einsum("bij,ij->bi", shares, places.before.astype(np.float32)) / np.where(counted, others, 1)
    expected = np.where(counted, places.before.sum(1) / (len(places) - 1), 0).sum(1)
    lift: np.ndarray = np.where(expected > 0, (found * counted).sum(1) / np.where(expected > 0, expected, 1), np.nan)
    return lift


def _mean(rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """(images,) mean over the rows that read something; NaN where there is none."""
    reads = shares.any(2)
    count = reads.sum(1)
    mean: np.ndarray = np.where(count > 0, (rows * reads).sum(1) / np.maximum(count, 1), np.nan)
    return mean
