"""AttentionRecord: the matrices and values of one call of softmax attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionRecord:
    """One call of multi-head self-attention: softmax(query @ key^T) @ value (arXiv 1706.03762, eq. 1).

    Args:
        probabilities: after softmax, before dropout; row i is what token i reads, and sums to 1.
        value: the values that are read.
        gate: factor of the heads' concatenated output, after its activation; or None.
        layout: where the tokens sit in the image, when known.

    Example:
        >>> record = AttentionRecord(probabilities=torch.rand(1, 3, 5, 5).softmax(-1), value=torch.rand(1, 3, 5, 8))
        >>> record.heads, record.tokens
        (3, 5)
    """

    probabilities: Float[Tensor, "batch heads tokens tokens"]
    value: Float[Tensor, "batch heads tokens width"]
    gate: Float[Tensor, "batch channels tokens"] | None = None
    layout: TokenLayout | None = None

    @classmethod
    def from_windows(
        cls,
        probabilities: Float[Tensor, "sequences heads length length"],
        value: Float[Tensor, "sequences heads length width"],
        gate: Float[Tensor, "sequences channels length"] | None,
        layout: TokenLayout,
    ) -> Self:
        """Build the record of images from attention that was computed window by window.

        Tokens of different windows read nothing from each other: the image's matrix is zero there. It is dense.

        Args:
            probabilities: of images and, inside each, windows: (batch * windows, ...).
            value: of the same windows.
            gate: of the same windows, or None.
            layout: the token frame, with or without windows.
        """
        windows = layout.windows(probabilities.device)
        if len(windows) > 1:
            blocks = rearrange(
                probabilities, "(batch windows) heads i j -> batch heads windows i j", windows=len(windows)
            )
            probabilities = blocks.new_zeros(*blocks.shape[:2], layout.tokens, layout.tokens)
            probabilities[:, :, windows[:, :, None], windows[:, None, :]] = blocks
        return cls(
            probabilities=probabilities,
            value=layout.from_windows(value, axis=2),
            gate=None if gate is None else layout.from_windows(gate, axis=2),
            layout=layout,
        )

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

    def mixed(
        self, probabilities: Float[Tensor, "batch heads tokens tokens"], dropout: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "sequences heads length width"]:
        """Return probabilities @ value as the module computes it, window by window if there are windows.

        Args:
            probabilities: in the token frame.
            dropout: applied by the module to the probabilities of its sequences, e.g. ``attn_drop``.
        """
        value, windows = self.value, None if self.layout is None else self.layout.windows(self.device)
        if self.layout is not None and windows is not None and len(windows) > 1:
            blocks = probabilities[:, :, windows[:, :, None], windows[:, None, :]]
            probabilities = rearrange(blocks, "batch heads windows i j -> (batch windows) heads i j")
            value = self.layout.to_windows(value, axis=2)
        return dropout(probabilities).to(value.dtype) @ value

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a record whose tensors went through ``function`` (e.g. ``Tensor.detach``)."""
        gate = None if self.gate is None else function(self.gate)
        return type(self)(
            probabilities=function(self.probabilities), value=function(self.value), gate=gate, layout=self.layout
        )
