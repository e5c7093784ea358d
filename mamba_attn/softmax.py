"""AttentionRecord: everything that one call of softmax attention depended on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.layout import TokenLayout


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionRecord:
    """One call of multi-head self-attention: softmax(query @ key^T) @ value (arXiv 1706.03762, eq. 1).

    Args:
        probabilities: after softmax, before dropout; row i is what token i reads, and sums to 1.
        value: what is read.
        gate: factor of the heads' output, side by side, after its activation; or None.
        layout: where the tokens sit in the image, when known.
    """

    probabilities: Float[Tensor, "batch heads tokens tokens"]
    value: Float[Tensor, "batch heads tokens width"]
    gate: Float[Tensor, "batch channels tokens"] | None = None
    layout: TokenLayout | None = None

    @property
    def batch(self) -> int:
        """Number of images (or sequences)."""
        return self.probabilities.shape[0]

    @property
    def heads(self) -> int:
        """Number of matrices per image."""
        return self.probabilities.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.probabilities.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of what is computed from the record: float64 if anything in it is, else float32."""
        double = torch.float64 in (self.probabilities.dtype, self.value.dtype)
        return torch.float64 if double else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.probabilities.device

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a record whose tensors went through ``function`` (e.g. ``Tensor.detach``)."""
        gate = None if self.gate is None else function(self.gate)
        return type(self)(
            probabilities=function(self.probabilities), value=function(self.value), gate=gate, layout=self.layout
        )
