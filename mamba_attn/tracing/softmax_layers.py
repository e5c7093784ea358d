"""Layers of softmax attention: of an adapter's record, and of what a trace saw at the doors.

At a door the matrices of images are measured when first asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn._types import Float, Int
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.ops import require_bytes
from mamba_attn.tracing.layers import LINEAR_FOLDS, Layer, Tail
from mamba_attn.tracing.softmax_calls import SoftmaxCall
from mamba_attn.tracing.steps import Steps, padded_layout, with_padding


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
        super().__init__(name, output, tail)
        self.record = record

    def lay_out(self, layout: TokenLayout | None) -> None:
        """Say where the tokens sit in the image; None leaves it as it is."""
        if layout is not None:
            self.record = replace(self.record, layout=layout)

    @property
    def _described(self) -> AttentionRecord:
        return self.record

    def _facts(self) -> dict[str, object]:
        return {"heads": self.record.heads}

    @property
    def variable(self) -> Tensor:
        """The probabilities (batch, heads, tokens, tokens)."""
        return self.record.probabilities

    def attention(
        self,
        fold: str = "mean",
        routes: str | int = "sum",
        *,
        row_weight: Tensor | None = None,
        col_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the attention matrix: row i is what token i reads.

        Args:
            fold: "mean" or "sum" over heads of the weighted matrices; "positive" and "absolute": max(., 0) and |.| of
                each weighted head, then the mean; "each": no fold.
            routes: as for scans; softmax attention is one route, number 0.
            row_weight: (batch, heads, tokens); multiplies row i of a head.
            col_weight: (batch, heads, tokens); multiplies column j of a head.

        Returns:
            (batch, [heads,] tokens, tokens), or (batch, 1, [heads,] tokens, tokens) with routes="each".

        Raises:
            ValueError: an unknown fold or route, a weight of another shape.
            NonFiniteError: the layer met NaN or Inf.
        """
        if routes not in ("sum", "each"):
            self._check_route(routes, 1)
        matrix = self._matrix("attention", fold, ops.FOLDS)
        if row_weight is not None:
            matrix = matrix * self._weight("row_weight", row_weight).unsqueeze(-1)
        if col_weight is not None:
            matrix = matrix * self._weight("col_weight", col_weight).unsqueeze(-2)
        folded = _fold(matrix, fold)
        return folded.unsqueeze(1) if routes == "each" else folded

    def row(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return what one token reads, (batch, [heads,] tokens); ValueError for a token that is not there."""
        row = self._matrix("row", fold, ops.FOLDS)[:, :, self._index("row", token)]
        if row_weight is not None:
            row = row * self._weight("row_weight", row_weight)[:, :, token, None]
        if col_weight is not None:
            row = row * self._weight("col_weight", col_weight)
        return _fold(row, fold)

    def column(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return where one token is read, (batch, [heads,] tokens); ValueError for a token that is not there."""
        column = self._matrix("column", fold, ops.FOLDS)[..., self._index("column", token)]
        if row_weight is not None:
            column = column * self._weight("row_weight", row_weight)
        if col_weight is not None:
            column = column * self._weight("col_weight", col_weight)[:, :, token, None]
        return _fold(column, fold)

    def left_product(
        self,
        vector: Float[Tensor, "batch tokens"],
        *,
        fold: str = "mean",
        row_weight: Tensor | None = None,
        col_weight: Tensor | None = None,
        residual: bool = True,
    ) -> Float[Tensor, "batch tokens"]:
        """Return ``vector @ (I + attention)``; without ``residual`` the I is left out.

        Raises:
            ValueError: a vector of another shape, a fold that is not linear, or as ``attention``.
        """
        matrix = self._matrix("left_product", fold, LINEAR_FOLDS)
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
        self.require_finite()
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


class DoorAttention(AttentionLayer):
    """One call of softmax attention, seen at its door: exact whatever code stands around it.

    Masks, ``is_causal``, ``scale``, grouped queries and dropout are those of the call; the probabilities are before
    dropout, and rows that read nothing are zero. Windows and sequences in the batch are blocks of the images' matrices.

    Args:
        name: the module's name in the model, with a number from its second call.
        call: what was seen.
        placed: gives the record in the token frame of this call.
    """

    def __init__(self, name: str, call: SoftmaxCall, placed: "Callable[[DoorAttention], PlacedAttention]") -> None:
        self.name = name
        self.tail = None
        self.call = call
        self._place = placed
        self._output = None

    @cached_property
    def _placed(self) -> "PlacedAttention":
        return self._place(self)

    @cached_property
    def record(self) -> AttentionRecord:  # type: ignore[override]
        """The record of the call, in the token frame.

        Raises:
            TraceError: the order of the tokens cannot be measured; what was seen, and what to pass.
            UnsupportedModelError: the keys come from other tokens than the queries.
        """
        return self._placed.record

    @property
    def share(self) -> float:
        """Part of a token's gradient that came from itself when the order was measured; 1 when it was given."""
        return self._placed.share

    @cached_property
    def row_frame(self) -> AttentionRecord:
        """The record with tokens in the order in which the module has them; nothing is measured.

        Its images are the call's sequences: windows of an image are several.
        """
        inputs = self.call.inputs()
        return AttentionRecord(probabilities=inputs.probabilities(), value=inputs.values)

    @property
    def output(self) -> NoReturn:
        """Not there: a door shows what attention returned, and not what its module made of it.

        Raises:
            TraceError: always.
        """
        self.require_output()

    def require_output(self) -> NoReturn:
        """Raise TraceError: there is no output."""
        raise TraceError(f"{self.name}: it was traced at its attention's door, where the module's output is not seen.")

    def placed_gradient(self, found: list[Tensor | None]) -> Float[Tensor, "batch heads tokens tokens"]:
        """The gradient at the probabilities, in the token frame.

        Args:
            found: the gradients at the call's edges.
        """
        return self._placed.matrices(self.call.gradient(found))


@dataclass(frozen=True, eq=False)
class PlacedAttention:
    """One call in its token frame.

    Args:
        record: of the images.
        rows: the call's sequences of every image, counted over rows and groups, head by head: (images, heads, each).
        order: token of each of their positions, (images, each, length), or one for all images.
        share: of the measured order.
    """

    record: AttentionRecord
    rows: Int[Tensor, "images heads each"]
    order: Int[Tensor, "_ each length"]
    share: float

    def matrices(self, found: Float[Tensor, "rows groups length length"]) -> Tensor:
        """Matrices of sequences as those of images, which are zero between windows."""
        return _matrices(found, self.rows, self.order, self.record.tokens)


def place_attention(
    call: SoftmaxCall, name: str, steps: Steps, layout: TokenLayout | None, real: Tensor | None = None
) -> PlacedAttention:
    """Put one call of attention into the token frame.

    Args:
        call: the call.
        name: the layer's, for messages.
        steps: what was measured of it.
        layout: of the tokens, without those that stand for padding.
        real: which tokens of texts are no padding, (images, tokens). Softmax makes numbers up for a row that may read
            nothing, so the rows and columns of padding are zero here.

    Raises:
        UnsupportedModelError: windows that share tokens.
        MatrixTooLargeError: the matrix of all windows together would not fit into memory.
    """
    images, each, groups = len(steps.rows), steps.rows.shape[1], steps.order.shape[2]
    order, tokens = steps.order.flatten(1, 2), steps.tokens  # (images or 1, sequences, length)
    if real is not None and tokens == call.length:
        order = _with_padding_of_texts(order)
    heads = _heads(name, order)
    order = order[:, heads[0]]
    if bool((order < 0).any()):
        flat, tokens = with_padding(order.flatten(1).unsqueeze(1), tokens)
        order = flat.view(order.shape)
    layout = padded_layout(layout, tokens)
    numbers = (steps.rows[:, :, None] * groups + torch.arange(groups)).view(images, each * groups)
    rows = numbers[:, torch.tensor(heads)]
    if tokens > call.length:
        require_bytes(
            f"{name}: the probabilities of {len(heads)} heads over all windows ({images} images, {tokens} x {tokens})",
            images * len(heads) * tokens**2 * 4,
            call.given[0].device,
            "Trace fewer images at once, smaller ones, or other layers, with layers=.",
        )
    inputs = call.inputs()
    values = inputs.values.flatten(0, 1)[rows.to(inputs.query.device)]  # (images, heads, each, length, width)
    index = order.to(values.device)[:, None].expand(images, len(heads), -1, -1).flatten(2)
    value = values.new_zeros(images, len(heads), tokens, values.shape[-1])
    value.scatter_(2, index[..., None].expand(*index.shape, values.shape[-1]), values.flatten(2, 3))
    matrices = _matrices(inputs.probabilities(), rows, order, tokens)
    if real is not None and real.shape == (images, tokens):
        absent = ~real.to(matrices.device)
        matrices = matrices.masked_fill(absent[:, None, :, None] | absent[:, None, None, :], 0)
    record = AttentionRecord(probabilities=matrices, value=value, layout=layout)
    return PlacedAttention(record, rows, order, steps.place.share)


def _with_padding_of_texts(order: Int[Tensor, "_ sequences length"]) -> Tensor:
    """Give steps that land nowhere the tokens that no other step has, in their order: what follows drops padding."""
    filled = order.clone()
    for row in filled.flatten(0, 1):
        free = torch.ones(len(row), dtype=torch.bool)
        free[row[row >= 0]] = False
        row[row < 0] = free.nonzero().flatten()[: int((row < 0).sum())]
    return filled


def _heads(name: str, order: Int[Tensor, "_ sequences length"]) -> list[list[int]]:
    """Which sequences of an image are windows of one head: those that share no token; (heads, windows of each)."""
    heads: list[list[int]] = []
    taken: list[set[int]] = []
    for number, its in enumerate(order[0].tolist()):
        cells = {cell for cell in its if cell >= 0}
        free = next((i for i, there in enumerate(taken) if not there & cells), None)
        if free is None:
            heads.append([])
            taken.append(set())
            free = len(heads) - 1
        heads[free].append(number)
        taken[free] |= cells
    first = order[:, heads[0]]
    if any(len(head) != len(heads[0]) or not torch.equal(order[:, head], first) for head in heads):
        raise UnsupportedModelError(
            f"{name}: its sequences share some of their tokens, as overlapping windows do; what their sum weighs is "
            "not seen at the door. layer.row_frame has each by itself."
        )
    return heads


def _matrices(
    found: Float[Tensor, "rows groups length length"],
    rows: Int[Tensor, "images heads each"],
    order: Int[Tensor, "_ each length"],
    tokens: int,
) -> Float[Tensor, "images heads tokens tokens"]:
    images, heads, each = rows.shape
    sequences = found.flatten(0, 1)[rows.to(found.device)]  # (images, heads, each, length, length)
    if each == 1 and bool((order == torch.arange(tokens, device=order.device)).all()):
        return sequences.squeeze(2)
    order = order.to(found.device).expand(images, -1, -1)
    pairs = (order[..., :, None] * tokens + order[..., None, :]).flatten(1)[:, None].expand(-1, heads, -1)
    frame = found.new_zeros(images, heads, tokens * tokens).scatter_(2, pairs, sequences.flatten(2))
    return frame.view(images, heads, tokens, tokens)
