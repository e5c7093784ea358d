"""Ranks with ties at their mean, and Spearman's correlation of them."""

import numpy as np
import torch

from mamba_attn._types import Float


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


def shares(values: Float[torch.Tensor, "batch *size"]) -> Float[torch.Tensor, "batch *size"]:
    """Return every number's rank among its row's, from 0 to 1; ties at their mean, a single number at 0.

    Args:
        values: one row of numbers per image.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    flat = values.flatten(1).to(dtype).cpu().numpy()
    places = torch.stack([torch.from_numpy(ranks(each)) for each in flat]).to(values.device, dtype)
    found: torch.Tensor = places / max(flat.shape[1] - 1, 1)
    return found.view_as(values)
