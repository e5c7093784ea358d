"""The published algorithms, written from their formulas: what the operators are measured against.

Nothing here is used by the operators. ``triple_loop`` is exact and slow; ``vmamba_formula`` is fast and wrong.
"""

from collections.abc import Iterable, Sequence

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
    return LoopRows(delta, A, B, C, range(delta.shape[2]))()


class LoopRows:
    """A few rows of ``triple_loop``, ready to be timed: dA and dB are made here, calling it runs the loops.

    Args:
        delta: after bias and softplus; tokens behind the last row may be left out.
        A: negative.
        B: input matrix.
        C: output matrix.
        rows: which ones, each below the length.
    """

    def __init__(
        self,
        delta: Float[Tensor, "batch channels length"],
        A: Float[Tensor, "channels states"],
        B: Float[Tensor, "batch states length"],
        C: Float[Tensor, "batch states length"],
        rows: Sequence[int],
    ) -> None:
        steps = delta.mT.unsqueeze(-1)
        self.dA = torch.exp(steps * A)
        self.dB = steps * B.mT.unsqueeze(2)
        self.C = C.mT.unsqueeze(2)
        self.rows = rows

    def __call__(self) -> Float[Tensor, "batch channels rows length"]:
        """Run the loops of these rows."""
        dA, dB = self.dA, self.dB
        batch, length, channels, _ = dA.shape
        alpha = dA.new_zeros(batch, channels, len(self.rows), length)
        for index, r in enumerate(self.rows):
            for c in range(r + 1):
                product = torch.ones_like(dA[:, 0])
                for k in range(c + 1, r + 1):
                    product = product * dA[:, k]
                alpha[:, :, index, c] = (self.C[:, r] * product * dB[:, c]).sum(-1)
        return alpha


def loop_products(rows: Iterable[int]) -> int:
    """Return how many products of (channels, states) the published loops compute for some rows.

    The time of all rows is that of a few, times the ratio of these numbers; what the loops do once per pair of tokens
    comes on top and weighs more in short rows, so rows well below the length overstate a little.

    Args:
        rows: ``range(length)`` for all of them.
    """
    return sum(row * (row + 1) // 2 for row in rows)


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
