"""The published algorithms, written from their formulas: what the operators are measured against.

Nothing here is used by the library. ``triple_loop`` is exact and slow; ``vmamba_formula`` is fast and wrong.
"""

import torch
from torch import Tensor

from mamba_attn._types import Float


def triple_loop(
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch states length"],
    C: Float[Tensor, "batch states length"],
) -> Float[Tensor, "batch channels length length"]:
    """Hidden attention as published with it (arXiv 2403.01590): one sequential product per pair of tokens.

    alpha[r, c] = sum_n C[n, r] prod_{k=c+1..r} dA[k, n] dB[c, n], dA = exp(delta A) and dB = delta B materialised as
    (batch, length, channels, states). (length^3 - length) / 6 products. The published code stores float16; this one
    the type of its inputs.

    Args:
        delta: after bias and softplus.
        A: negative.
        B: input matrix.
        C: output matrix.
    """
    steps = delta.mT.unsqueeze(-1)
    dA = torch.exp(steps * A)
    dB = steps * B.mT.unsqueeze(2)
    rows = C.mT.unsqueeze(2)
    batch, channels, length = delta.shape
    alpha = delta.new_zeros(batch, channels, length, length)
    for r in range(length):
        for c in range(r + 1):
            product = torch.ones_like(dA[:, 0])
            for k in range(c + 1, r + 1):
                product = product * dA[:, k]
            alpha[:, :, r, c] = (rows[:, r] * product * dB[:, c]).sum(-1)
    return alpha


def vmamba_formula(
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels states"],
    B: Float[Tensor, "batch states length"],
    C: Float[Tensor, "batch states length"],
) -> Float[Tensor, "batch length length"]:
    """Channel mean of VMamba's own analysis map "CwBdtw" (arXiv 2401.10166).

    w = exp(cumsum(A delta)), attention = mean_channels (C w)^T (B delta / max(w, 1e-20)), lower triangle. Wrong once
    sum(delta |A|) exceeds 46: w underflows the clamp and whole rows collapse. Holds (channels, length, length) at once.

    Args:
        delta: after bias and softplus.
        A: negative.
        B: input matrix.
        C: output matrix.
    """
    w = torch.exp(torch.cumsum(A.unsqueeze(-1) * delta.unsqueeze(2), dim=-1))
    query = C.unsqueeze(1) * w
    key = B.unsqueeze(1) * delta.unsqueeze(2) / w.clamp(min=1e-20)
    return (query.mT @ key).mean(1).tril()
