"""Turns a call's arguments into one validated ScanRecord; errors quote the call."""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mamba_attn._types import Float, Int
from mamba_attn.core.order_check import capturing, require_distinct
from mamba_attn.core.scan_record import ScanRecord

Weights = tuple[Tensor | None, Tensor | None]  # of rows and columns, in scan order
FOLDS = ("mean", "sum", "each", "positive", "absolute")


class Call(NamedTuple):
    """A validated call: the record, whether routes merge in the token frame, whether the caller gave a route axis."""

    record: ScanRecord
    merged: bool
    route_axis: bool
    text: str


def as_record(
    name: str,
    u: Tensor | None,
    delta: Tensor | ScanRecord,
    A: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None = None,
    orders: Tensor | None = None,
    tokens: int | None = None,
) -> Call:
    """Validate the tensors of a call and wrap them into a record.

    Raises:
        TypeError: something is not a floating-point tensor.
        ValueError: shapes that disagree, A >= 0, invalid orders, tensors on different devices.
    """
    if isinstance(delta, ScanRecord):
        given = {"A": A, "B": B, "C": C, "D": D, "orders": orders, "tokens": tokens}
        extra = [key for key, value in given.items() if value is not None]
        if extra:
            raise TypeError(f"{name}(ScanRecord): the record already holds {', '.join(extra)}; leave them out.")
        text = f"{name}(ScanRecord{tuple(delta.source_delta.shape)})"
        _check_sizes(text, delta)
        return Call(delta, True, True, text)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}
    text = _call_text(name, tensors)
    for key, value in tensors.items():
        optional = key in ("u", "D") and value is None
        if not optional and not (isinstance(value, Tensor) and value.is_floating_point()):
            raise TypeError(f"{text}: {key} must be a floating-point tensor, got {type(value).__name__}.")
    devices = {str(value.device) for value in tensors.values() if value is not None}
    if len(devices) > 1:
        raise ValueError(f"{text}: tensors are on different devices {sorted(devices)}; move them to one.")
    record = _wrap(text, u, delta, cast(Tensor, A), cast(Tensor, B), cast(Tensor, C), D, orders, tokens)
    _check_sizes(text, record)
    return Call(record, orders is not None, delta.ndim == 4, text)


def _wrap(
    text: str,
    u: Tensor | None,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    orders: Tensor | None,
    tokens: int | None,
) -> ScanRecord:
    if delta.ndim not in (3, 4):
        raise ValueError(f"{text}: expected delta (batch, channels, length) or (batch, routes, channels, length).")
    if delta.ndim == 3:  # one route
        delta, B, C = delta.unsqueeze(1), B.unsqueeze(1), C.unsqueeze(1)
        A, D = A.unsqueeze(0), None if D is None else D.unsqueeze(0)
        u = None if u is None else u.unsqueeze(1)
    if B.ndim == 4 and C.ndim == 4:  # one group
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    batch, routes, heads, length = delta.shape
    channels = heads if u is None else u.shape[2] if u.ndim == 4 else -1
    states = B.shape[-2] if B.ndim == 5 else -1
    groups = B.shape[2] if B.ndim == 5 else -1
    expected: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "u": (u, [(batch, routes, channels, length)]),
        "A": (A, [(routes, heads, states), (routes, heads, 1)]),
        "B": (B, [(batch, routes, groups, states, length)]),
        "C": (C, [(batch, routes, groups, states, length)]),
        "D": (D, [(routes, channels)]),
    }
    for key, (value, shapes) in expected.items():
        if value is not None and tuple(value.shape) not in shapes:
            raise ValueError(
                f"{text}: {key} does not agree with delta: expected {' or '.join(map(str, shapes))} in "
                f"(batch, routes, channels or groups, states, length), got {tuple(value.shape)}."
            )
    if min(heads, groups) and (channels % heads or channels % groups):
        raise ValueError(f"{text}: {channels} channels cannot be shared by {heads} heads and {groups} groups.")
    if not capturing(A) and bool((A >= 0).any()):
        raise ValueError(f"{text}: A must be negative (A = -exp(A_log)); its largest value is {A.max().item():.4g}.")
    if orders is not None:
        tokens = _check_orders(text, orders, batch, routes, length, tokens)
    source_u = delta.new_zeros(()).expand(batch, routes, channels, length) if u is None else u
    return ScanRecord.from_scan(source_u, delta, A, B, C, D, order=orders, tokens=tokens)


def _check_sizes(text: str, record: ScanRecord) -> None:
    names = ("batch", "routes", "channels", "heads", "states", "length")
    empty = [name for name in names if not getattr(record, name)]
    if empty:
        raise ValueError(f"{text}: {', '.join(empty)} must be at least 1.")


def _check_orders(text: str, orders: Tensor, batch: int, routes: int, length: int, tokens: int | None) -> int:
    shapes = (routes, length), (batch, routes, length)
    if orders.dtype != torch.int64 or tuple(orders.shape) not in shapes:
        raise ValueError(
            f"{text}: orders must be int64 (routes, length) = {shapes[0]} or, one per image, (batch, routes, length) = "
            f"{shapes[1]}, got {orders.dtype} {tuple(orders.shape)}."
        )
    if tokens is None and capturing(orders):
        raise ValueError(f"{text}: a CUDA graph's capture cannot read the orders; pass tokens=, their number.")
    tokens = int(orders.max()) + 1 if tokens is None else tokens
    require_distinct(f"{text}: orders", orders, tokens, padding=True)
    return tokens


def scan_weight(call: Call, name: str, weight: Tensor | None, gather: bool = True) -> Tensor | None:
    """Bring a row or column weight to (batch, routes, channels, length), in scan order.

    Token-frame weights (batch, channels, tokens) are gathered along each route, or stay unchanged without ``gather`` if
    routes merge; (batch, routes, channels, length) stay unchanged.

    Raises:
        ValueError: the shape is neither of these.
    """
    if weight is None:
        return None
    record = call.record
    if not isinstance(weight, Tensor) or weight.device != record.source_delta.device:
        what = f"one on {weight.device}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{call.text}: {name} must be a tensor on {record.source_delta.device}, got {what}.")
    shape = (record.batch, record.routes, record.channels, record.length)
    if tuple(weight.shape) == shape:
        return weight
    frame = (record.batch, record.channels, record.tokens)
    if weight.ndim == 3 and all(w in (1, n) for w, n in zip(weight.shape, frame, strict=True)):
        weight = weight.expand(frame)
        if not call.merged:
            return weight.unsqueeze(1).expand(shape)
        return gathered(record, name, weight, True) if gather else weight
    raise ValueError(
        f"{call.text}: {name} must be (batch, channels, tokens) = {frame} or "
        f"(batch, routes, channels, length) = {shape}, got {tuple(weight.shape)}."
    )


def gathered(record: ScanRecord, name: str, weight: Tensor | None, merged: bool) -> Tensor | None:
    """Return a weight in scan order; (batch, channels, tokens) is gathered along each route if routes merge."""
    if weight is None or weight.ndim == 4 or not merged:
        return weight
    order = record.write_order if name == "row_weight" else record.read_order
    if record.shares_orders:
        return torch.stack([weight[..., route] for route in order], dim=1)
    return at_tokens(weight.unsqueeze(1).expand(-1, record.routes, -1, -1), order.unsqueeze(-2))


def at_tokens(values: Float[Tensor, "batch *middle tokens"], order: Int[Tensor, "*any length"]) -> Tensor:
    """Gather the value of each step's token, (batch, *middle, length); zero at a step without one.

    Args:
        values: in the token frame.
        order: its axes before the last align with the trailing ones of ``values`` before tokens, or are 1.
    """
    order = order.expand(*values.shape[:-1], order.shape[-1])
    return values.gather(-1, order.clamp(min=0)).masked_fill(order < 0, 0)


def to_tokens(values: Float[Tensor, "batch *middle length"], order: Int[Tensor, "*any length"], tokens: int) -> Tensor:
    """Scatter steps' values to their tokens, (batch, *middle, tokens), zero elsewhere; transposes ``at_tokens``."""
    frame = values.new_zeros(*values.shape[:-1], tokens + 1)  # steps without a token go to the end
    return frame.scatter(-1, order.where(order >= 0, tokens).expand_as(values), values)[..., :-1]


def pick(weights: Weights, *index: slice) -> Weights:
    """Index both weights; None stays None."""
    rows, columns = weights
    return None if rows is None else rows[index], None if columns is None else columns[index]


def check_fold(call: Call, fold: str, allowed: tuple[str, ...] = FOLDS) -> None:
    """Raise ValueError for an unknown fold."""
    if fold not in allowed:
        raise ValueError(f"{call.text}: fold={fold!r} is not one of {allowed}.")


def check_index(call: Call, name: str, index: int, size: int) -> None:
    """Raise ValueError for an index outside the matrix."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < size:
        raise ValueError(f"{call.text}: {name}={index!r} must be an integer in 0..{size - 1}.")


def working_dtype(record: ScanRecord) -> torch.dtype:
    """Return float64 if any tensor of the record is float64, else float32."""
    tensors = (record.source_delta, record.A, record.source_B, record.source_C, record.source_u)
    gain = record.source_gain
    double = any(tensor.dtype == torch.float64 for tensor in tensors) or (
        gain is not None and gain.dtype == torch.float64
    )
    return torch.float64 if double else torch.float32


def matrix_bytes(record: ScanRecord, fold: str, merged: bool) -> int:
    """Bytes of the dense matrix that a call would return."""
    side = record.tokens if merged else record.length
    copies = (1 if merged else record.routes) * (record.channels if fold == "each" else 1)
    return math.prod((record.batch, copies, side, side)) * working_dtype(record).itemsize


def _call_text(name: str, tensors: dict[str, Tensor | None]) -> str:
    shown = ", ".join(
        f"{key}{tuple(value.shape) if isinstance(value, Tensor) else f'={value!r}'}"
        for key, value in tensors.items()
        if value is not None
    )
    return f"{name}({shown})"
