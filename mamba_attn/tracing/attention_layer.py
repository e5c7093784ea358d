"""What a trace yields for one layer of softmax attention."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.ops.arguments import FOLDS
from mamba_attn.tracing.layers import Layer, Tail

_LINEAR = ("mean", "sum")


class AttentionLayer(Layer):
    """One softmax-attention call of a traced forward pass; its heads are folded as the channels of a scan are.

    Args:
        name: the module's name in the model.
        record: the record of the call.
        output: what the module returned.
        tail: recomputes the output from the probabilities, in mode "observe".
    """

    kind: ClassVar[str] = "softmax attention"

    def __init__(self, name: str, record: AttentionRecord, *, output: Any = None, tail: Tail | None = None) -> None:
        super().__init__(name, record, output, tail)
        self.record = record

    def __repr__(self) -> str:
        record = self.record
        return f"AttentionLayer({self.name!r}, batch={self.batch}, heads={record.heads}, tokens={self.tokens})"

    def _facts(self) -> dict[str, object]:
        return {"heads": self.record.heads}

    @property
    def variable(self) -> Tensor:
        """The probabilities (batch, heads, tokens, tokens)."""
        return self.record.probabilities

    def attention(
        self, fold: str = "mean", *, row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return the attention matrix: row i is what token i reads.

        Args:
            fold: "mean" or "sum" over heads of the weighted matrices; "positive" and "absolute": max(., 0) and |.| of
                each weighted head, then the mean; "each": no fold.
            row_weight: (batch, heads, tokens); multiplies row i of a head.
            col_weight: likewise, column j.

        Returns:
            (batch, [heads,] tokens, tokens).

        Raises:
            ValueError: an unknown fold, a weight of another shape.
            NonFiniteError: the layer met NaN or Inf.
        """
        matrix = self._matrix("attention", fold, FOLDS)
        if row_weight is not None:
            matrix = matrix * self._weight("row_weight", row_weight).unsqueeze(-1)
        if col_weight is not None:
            matrix = matrix * self._weight("col_weight", col_weight).unsqueeze(-2)
        return _fold(matrix, fold)

    def row(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return what one token reads, (batch, [heads,] tokens).

        Raises:
            ValueError: a token that is not there, or as ``attention``.
        """
        row = self._matrix("row", fold, FOLDS)[:, :, self._index("row", token)]
        if row_weight is not None:
            row = row * self._weight("row_weight", row_weight)[:, :, token, None]
        if col_weight is not None:
            row = row * self._weight("col_weight", col_weight)
        return _fold(row, fold)

    def column(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return where one token is read, (batch, [heads,] tokens).

        Raises:
            ValueError: a token that is not there, or as ``attention``.
        """
        column = self._matrix("column", fold, FOLDS)[..., self._index("column", token)]
        if row_weight is not None:
            column = column * self._weight("row_weight", row_weight)
        if col_weight is not None:
            column = column * self._weight("col_weight", col_weight)[:, :, token, None]
        return _fold(column, fold)

    def left_product(
        self, vector: Float[Tensor, "batch tokens"], *, fold: str = "mean", row_weight: Tensor | None = None,
        col_weight: Tensor | None = None, residual: bool = True,
    ) -> Float[Tensor, "batch tokens"]:  # fmt: skip
        """Return ``vector @ (I + attention)``; without ``residual`` the I is left out.

        Raises:
            ValueError: a vector of another shape, a fold that is not linear, or as ``attention``.
        """
        matrix = self._matrix("left_product", fold, _LINEAR)
        if vector.shape != (self.batch, self.tokens):
            raise ValueError(
                f"{self.name}.left_product(vector{tuple(vector.shape)}): expected (batch, tokens) = "
                f"{(self.batch, self.tokens)}."
            )
        rows = vector.unsqueeze(1)
        if row_weight is not None:
            rows = rows * self._weight("row_weight", row_weight)
        product = torch.einsum("bhi,bhij->bhj", rows.expand(matrix.shape[:3]).to(matrix), matrix)
        if col_weight is not None:
            product = product * self._weight("col_weight", col_weight)
        product = _fold(product, fold)
        return vector + product if residual else product

    def _matrix(self, call: str, fold: str, allowed: tuple[str, ...]) -> Float[Tensor, "batch heads tokens tokens"]:
        if fold not in allowed:
            raise ValueError(f"{self.name}.{call}(fold={fold!r}): expected one of {allowed}.")
        self._require_finite()
        return self.record.probabilities.to(self.dtype)

    def _weight(self, name: str, weight: Tensor) -> Float[Tensor, "batch heads tokens"]:
        frame = (self.batch, self.record.heads, self.tokens)
        if weight.ndim != 3 or any(w not in (1, n) for w, n in zip(weight.shape, frame, strict=True)):
            raise ValueError(
                f"{self.name}: {name} must be (batch, heads, tokens) = {frame}, got {tuple(weight.shape)}."
            )
        return weight.expand(frame)

    def _index(self, call: str, token: int) -> int:
        if not isinstance(token, int) or not 0 <= token < self.tokens:
            raise ValueError(f"{self.name}.{call}({token!r}): expected the index of a token, 0..{self.tokens - 1}.")
        return token

    @cached_property
    def _not_finite(self) -> list[str]:
        tensors = {"probabilities": self.record.probabilities, "value": self.record.value}
        return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def _fold(weighted: Tensor, fold: str) -> Tensor:
    """Fold the heads, axis 1, of weighted matrices or lines of them."""
    if fold == "each":
        return weighted
    if fold == "sum":
        return weighted.sum(1)
    part = weighted.clamp(min=0) if fold == "positive" else weighted.abs() if fold == "absolute" else weighted
    return part.mean(1)
