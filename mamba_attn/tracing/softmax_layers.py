"""Layers made of softmax attention that a trace saw at the doors: matrices of images, measured when first asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor

from mamba_attn._types import Float, Int
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.ops import require_bytes
from mamba_attn.tracing.layers import AttentionLayer
from mamba_attn.tracing.softmax_doors import SoftmaxCall
from mamba_attn.tracing.steps import Steps, padded_layout, with_padding


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
