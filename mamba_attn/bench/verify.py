"""How far a result is from the float64 specification: nothing is timed before this is known."""

import torch
from torch import Tensor

from mamba_attn import ops

TOLERANCE = 1e-5  # of the sum of absolute terms, float32
RANGE = 1e-30  # what float32 cannot hold next to its smallest normal number is not an error


def term_error(attention: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> float:
    """Largest |error| of a channel mean, relative to the same sum with every term's absolute value.

    Args:
        attention: (batch, length, length), to be judged.
        delta: (batch, channels, length); the float64 specification of these inputs is the truth.
        A: (channels, states).
        B: (batch, states, length).
        C: (batch, states, length).

    Returns:
        The largest ratio over entries; infinite when an entry above the diagonal is not zero, or one is not finite.
    """
    if not torch.isfinite(attention).all() or attention.triu(1).any():
        return float("inf")
    delta, A, B, C = (value.double() for value in (delta, A, B, C))
    error = (attention.double() - ops.hidden_attention(delta, A, B, C, backend="reference")).abs_()
    terms = ops.hidden_attention(delta, A, B.abs(), C.abs(), backend="reference")
    return float(((error - RANGE).clamp_(min=0) / terms.clamp_(min=RANGE)).max())


def norm_error(attention: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> float:
    """||error|| / ||truth|| in the Frobenius norm, the truth as in ``term_error``."""
    truth = ops.hidden_attention(*(value.double() for value in (delta, A, B, C)), backend="reference")
    return float((attention.double() - truth).norm() / truth.norm())
