"""The scans of one layer that were seen at their doors, in the token frame: one record, and what calls keep apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn._types import Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.tracing.selective_scans import ScanCall
from mamba_attn.tracing.steps import Steps, padded_layout, read_behind, with_padding


@dataclass(frozen=True, eq=False)
class Placed:
    """The calls of one layer in their token frame.

    Args:
        record: of all of them.
        index: rows of each call by image, (images, rows each).
        grouped: whether the groups of a call are groups of channels of one route, and not routes.
        share: worst of theirs.
        padding: number of tokens, the last ones, that stand for padding.
    """

    record: ScanRecord
    index: list[Tensor]
    grouped: bool
    share: float
    padding: int

    @property
    def orders(self) -> Int[Tensor, "batch routes length"]:
        """Token written by each step, image by image."""
        return self._by_image(self.record.write_order)

    def _by_image(self, order: Tensor) -> Int[Tensor, "batch routes length"]:
        return order.expand(self.record.batch, *order.shape[-2:])

    def by_image(self, parts: Sequence[Tensor]) -> Float[Tensor, "batch routes channels length"]:
        """(rows, groups, width, length) of every call, as routes of images."""
        length = self.record.length
        return torch.cat(
            [
                _routes(_padded(part, length), index, self.grouped)
                for part, index in zip(parts, self.index, strict=True)
            ],
            1,
        )

    def of_call(self, number: int, groups: int, values: Tensor) -> Tensor:
        """The part of one call in (images, routes, channels or 1, ...), as (rows, groups, width or 1, ...)."""
        each = [index.shape[1] if self.grouped else index.shape[1] * groups for index in self.index]
        start = sum(each[:number])
        part = values[:, start : start + each[number]]
        if not self.grouped:
            part = part.unflatten(1, (-1, groups))
        elif part.shape[2] == 1:
            part = part.unsqueeze(2).expand(-1, -1, groups, *part.shape[2:])
        else:
            part = part.unflatten(2, (groups, -1))
        return part.flatten(0, 1)[self.index[number].flatten().argsort().to(part.device)]

    def merged(self, parts: Sequence[Tensor]) -> Float[Tensor, "batch channels tokens"]:
        """The routes' sum in the token frame."""
        values, index = self.by_image(parts), self._index()
        total = values.new_zeros(values.shape[0], values.shape[2], self.record.tokens + 1)
        for route in range(values.shape[1]):
            total = total.scatter_add(-1, index[:, route, None].expand_as(values[:, route]), values[:, route])
        return total[..., :-1]

    def merged_matrix(self, matrices: Sequence[Tensor], fold: str) -> Tensor:
        """The routes' matrices, each in its own order, summed in the token frame."""
        if self.grouped:  # groups of channels are folded as channels are
            fewer = [m.flatten(1, 2) if fold == "each" else m.sum(1) if fold == "sum" else m.mean(1) for m in matrices]
            matrices = [matrix.unsqueeze(1) for matrix in fewer]
        length, side = self.record.length, self.record.tokens + 1
        wide = [F.pad(m, (0, length - m.shape[-1], 0, length - m.shape[-1])) for m in matrices]
        parts = [m[index.to(m.device)].flatten(1, 2) for m, index in zip(wide, self.index, strict=True)]
        routes = torch.cat(parts, 1)
        total = routes.new_zeros(routes.shape[0], *routes.shape[2:-2], side * side)
        read = self._index(self.record.read_order)
        for route, (own, its) in enumerate(zip(self._index().unbind(1), read.unbind(1), strict=True)):
            pairs = (own[:, :, None] * side + its[:, None, :]).flatten(1)
            pairs = pairs.view(len(own), *[1] * (routes.ndim - 4), -1).expand(*total.shape[:-1], -1)
            total = total.scatter_add(-1, pairs, routes[:, route].flatten(-2))
        square: Tensor = total.unflatten(-1, (side, side))
        return square[..., :-1, :-1]

    def gradient(self, parts: Sequence[Tensor]) -> Tensor:
        """In the token frame where all routes that write a token agree, else by route."""
        values = self.by_image(parts)
        index = self._index()[:, :, None].expand_as(values)
        frame = values.new_zeros(values.shape[0], values.shape[2], self.record.tokens + 1)
        for own, value in zip(index.unbind(1), values.unbind(1), strict=True):
            frame = frame.scatter(-1, own, value)
        again = torch.stack([frame.gather(-1, own) for own in index.unbind(1)], 1)
        apart = (again - values).abs().masked_fill(index == self.record.tokens, 0)
        return frame[..., :-1] if float(apart.max()) <= 1e-3 * float(values.abs().max()) else values

    def _index(self, order: Tensor | None = None) -> Int[Tensor, "batch routes length"]:
        """Where each step's values go, or come from; what is dropped goes behind the last token."""
        orders = self.orders if order is None else self._by_image(order)
        return torch.where(orders < 0, self.record.tokens, orders)


def _routes(part: Tensor, index: Tensor, grouped: bool) -> Tensor:
    """(rows, groups, ...) as (images, routes, ...)."""
    flat = index.flatten()
    rows = part if torch.equal(flat, torch.arange(len(part))) else part[flat.to(part.device)]
    by_image: Tensor = rows.unflatten(0, tuple(index.shape))
    return by_image.flatten(2, 3) if grouped else by_image.flatten(1, 2)


def place(name: str, calls: Sequence[ScanCall], steps: Sequence[Steps], layout: TokenLayout | None) -> Placed:
    """Put the scans of one layer into the token frame.

    Args:
        name: the layer's, for messages.
        calls: its scans, of equal shapes but for their lengths.
        steps: what was measured of each.
        layout: of the tokens, without those that stand for padding.

    Raises:
        TraceError: the model wrote over a scan's input after it.
    """
    images, length = len(steps[0].rows), max(call.length for call in calls)
    grouped = calls[0].inputs.groups > 1 and all(same_route(each) for each in steps)
    fields: dict[str, list[Tensor]] = {name: [] for name in ("u", "delta", "A", "B", "C", "D", "gate")}
    orders = []
    for call, each in zip(calls, steps, strict=True):
        call.require_unchanged()
        parts = call.inputs.parts()
        repeated = [None if t is None else t.expand(each.rows.shape[1], *t.shape) for t in (parts.A, parts.D)]
        # steps that are added to a shorter scan change no state and write nothing
        sequences = [_padded(t, length) for t in (parts.u, parts.delta, parts.B, parts.C)]
        by_row = [_routes(t, each.rows, grouped) for t in sequences]
        A, D = (None if t is None else t.flatten(1, 2) if grouped else t.flatten(0, 1) for t in repeated)
        gate = None if parts.z is None else _routes(_padded(F.silu(parts.z), length), each.rows, grouped)
        for kept, value in zip(fields.values(), (*by_row[:2], A, *by_row[2:], D, gate), strict=True):
            if value is not None:
                kept.append(value)
        order = each.order[:, :, :1] if grouped else each.order
        orders.append(_padded(order.flatten(1, 2), length, -1))
    wide = max(len(order) for order in orders)
    order, tokens = torch.cat([order.expand(wide, -1, -1) for order in orders], 1), steps[0].tokens
    joined: dict[str, Any] = {
        name: torch.cat(kept, 0 if name in ("A", "D") else 1)
        for name, kept in fields.items()
        if len(kept) == len(calls)
    }
    gate = joined.pop("gate", None)
    order = order.to(calls[0].inputs.u.device)
    read = read_behind(order, tokens) if any(each.place.behind for each in steps) else None
    if read is None and bool((joined["u"].abs().amax(2) * (order < 0)).any()):  # padding that the scan takes in
        order, tokens = with_padding(order, tokens)
    layout = padded_layout(layout, tokens)
    one_gate = None if gate is None else _one_gate(gate, order.expand(images, -1, -1), tokens)
    record = ScanRecord.from_scan(
        **joined, order=order[0] if len(order) == 1 else order, tokens=tokens, gate=one_gate, layout=layout
    )
    if read is not None:
        record = record.replace(read_order=read[0] if len(read) == 1 else read)
    share = min(each.place.share for each in steps)
    return Placed(record, [each.rows for each in steps], grouped, share, tokens - steps[0].tokens)


def _padded(t: Tensor, length: int, value: int = 0) -> Tensor:
    """With steps added at the end."""
    return t if t.shape[-1] == length else F.pad(t, (0, length - t.shape[-1]), value=value)


def same_route(steps: Steps) -> bool:
    """Whether the groups are parts of one route: in one order, and not added up."""
    return not steps.place.summed and bool((steps.order == steps.order[:, :, :1]).all())


def _one_gate(gate: Tensor, order: Tensor, tokens: int) -> Tensor | None:
    """The gate in the token frame, where all routes have the same."""
    frame = gate.new_zeros(gate.shape[0], gate.shape[2], tokens + 1)
    index = torch.where(order < 0, tokens, order)[:, :, None].expand_as(gate)
    for own, value in zip(index.unbind(1), gate.unbind(1), strict=True):
        frame = frame.scatter(-1, own, value)
    again = torch.stack([frame.gather(-1, own) for own in index.unbind(1)], 1)
    # vectorised activations round by position
    same = torch.isclose(again, gate, rtol=1e-5, atol=1e-6) | (index == tokens)
    return frame[..., :-1] if bool(same.all()) else None
