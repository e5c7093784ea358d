"""The CPU kernel: native.cpp through ctypes, compiled once per machine at first use.

Never required: without a compiler the blocked path runs. float32 (half precision is converted); float64 is declined.
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba_attn._order_check import require_distinct
from mamba_attn.ops import blocked
from mamba_attn.ops._arguments import Weights, pick
from mamba_attn.ops._backend import Backend
from mamba_attn.ops._build import library, library_problem
from mamba_attn.scan import ScanRecord

_LANES = 16
_FOLDS = {"sum": 0, "mean": 0, "positive": 1, "absolute": 2, "each": 3}
_LOG2_E = 1 / math.log(2)


class _CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "route", "axis", "position"))]


class _CScan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in
          ("batch", "routes", "channels", "states", "length", "tokens", "positions")),
        *((name, _CTensor) for name in ("u", "delta", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A2", "D", "read", "write")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]  # fmt: skip


class _CGradients(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "delta", "A", "B", "C", "D")),
        *((name, ctypes.c_int64) for name in ("u_routes", "delta_routes", "bc_routes")),
    ]


class _CAttention(ctypes.Structure):
    _fields_ = [
        ("scan", _CScan),
        ("row_weight", _CTensor),
        ("col_weight", _CTensor),
        ("A2_low", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("side", "out_batch", "out_route", "out_channel")),
        ("fold", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class _Frame:
    """Where steps read and write: source positions, and tokens when routes merge."""

    read: Tensor | None
    write: Tensor | None
    routes: int
    length: int
    tokens: int
    positions: int
    scale: float


class Native(Backend):
    """Backend "native"."""

    def unavailable(self, record: ScanRecord) -> str | None:
        """Return why the kernel cannot take this record, or None."""
        tensors = (record.source_u, record.source_delta, record.A, record.source_B, record.source_C)
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return f"it runs on the CPU and the tensors are on {record.source_delta.device}; move them with .cpu()."
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            return "it computes in float32 and an input is float64; convert it, or use backend='blocked'."
        return library_problem()

    def selective_scan(self, record: ScanRecord, merged: bool) -> Tensor:
        """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
        outputs = [self._scan_group(part, merged) for part in _groups(record)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)

    def hidden_attention(
        self, record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
    ) -> Tensor:
        """(batch, [channels,] tokens, tokens) merged, else (batch, routes, [channels,] length, length)."""
        parts = _groups(record)
        if len(parts) > 1:
            return _fold_groups(self, parts, row_weight, col_weight, fold, merged)
        (part,) = parts
        tensors = (part.source_delta, part.A, part.source_B, part.source_C, row_weight, col_weight)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            result: Tensor = _Attention.apply(part, fold, merged, *tensors)  # type: ignore[no-untyped-call]
            return result
        return _attention(part, row_weight, col_weight, fold, merged)

    def _scan_group(self, record: ScanRecord, merged: bool) -> Tensor:
        channels = record.channels
        padding = -channels % _LANES
        u, delta = (_channels_last(x, padding) for x in (record.source_u, record.source_delta))
        A = torch.nn.functional.pad(record.A.float(), (0, 0, 0, padding), value=-1.0)
        D = None if record.D is None else torch.nn.functional.pad(record.D.float(), (0, padding))
        frame = _frame(record, merged, source=True)
        B, C = torch.broadcast_tensors(record.source_B.float(), record.source_C.float())  # routes may share one
        y: Tensor = _Scan.apply(u, delta, A, B, C, D, frame)  # type: ignore[no-untyped-call]
        return y[..., :channels, :] if padding else y


BACKEND = Native()


class _Scan(torch.autograd.Function):
    """The scan of channels-last float32 tensors; the backward recomputes the states and keeps the inputs only."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, frame: _Frame
    ) -> Tensor:
        ctx.save_for_backward(u, delta, A, B, C, D)
        ctx.frame = frame
        A2 = (A * _LOG2_E).mT.contiguous()
        batch, channels = u.shape[0], u.shape[2]
        rows = (frame.tokens,) if frame.write is not None else (frame.routes, frame.length)
        y = u.new_zeros(batch, *rows, channels)
        D = None if D is None else D.contiguous()
        scan = _c_scan(u, delta, A2, B, C, D, frame)
        library().scan_forward(ctypes.byref(scan), ctypes.c_void_p(y.data_ptr()))
        return y.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D = ctx.saved_tensors
        frame: _Frame = ctx.frame
        A2 = (A * _LOG2_E).mT.contiguous()
        D = None if D is None else D.contiguous()
        gy = gradient.float().mT.contiguous()
        batch, _, channels, positions = u.shape
        states = A.shape[2]
        du, ddelta = (_gradient_of(x, frame) for x in (u, delta))
        dA = u.new_zeros(batch, frame.routes, states, channels)
        dB, dC = (u.new_zeros(batch, B.shape[1], positions, states) for _ in range(2))
        dD = u.new_zeros(batch, frame.routes, channels)
        scan = _c_scan(u, delta, A2, B, C, D, frame)
        pointers = [x.data_ptr() for x in (du, ddelta, dA, dB, dC, dD)]
        gradients = _CGradients(*pointers, u.shape[1], delta.shape[1], B.shape[1])
        library().scan_backward(ctypes.byref(scan), ctypes.c_void_p(gy.data_ptr()), ctypes.byref(gradients))
        to_groups = [x.mT.unsqueeze(2) for x in (dB, dC)]
        return du.mT, ddelta.mT, dA.sum(0).mT, *to_groups, None if D is None else dD.sum(0), None


class _Attention(torch.autograd.Function):
    """Native values; the gradient runs through the blocked path."""

    @staticmethod
    def forward(ctx: Any, record: ScanRecord, fold: str, merged: bool, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = record, fold, merged
        return _attention(record, tensors[4], tensors[5], fold, merged)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        record, fold, merged = ctx.call
        *sources, rows, columns = ctx.saved_tensors
        names = ("source_delta", "A", "source_B", "source_C")
        again = record.replace(**dict(zip(names, sources, strict=True)))
        needed = ctx.needs_input_grad[3:]
        found = blocked.attention_gradients(again, (rows, columns), fold, merged, gradient, needed)
        return None, None, None, *found


def _attention(
    record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
) -> Tensor:
    side = record.tokens if merged else record.length
    axes = (*(() if merged else (record.routes,)), *((record.channels,) if fold == "each" else ()))
    out = torch.zeros(record.batch, *axes, side, side)
    with _call(record, (row_weight, col_weight), out, fold, merged) as (call, source):
        call.side, call.out_route = side, 0 if merged else out.stride(1)
        call.out_channel = side * side if fold == "each" else 0
        library().hidden_attention(ctypes.byref(call), source)
    return out


def attention_line(record: ScanRecord, axis: str, step: int, weights: Weights, fold: str) -> Tensor:
    """One row or column of a record of one route and one group: (batch, [channels,] length), in scan order."""
    (part,) = _groups(record)
    out = torch.zeros(record.batch, *((record.channels,) if fold == "each" else ()), record.length)
    with _call(part, weights, out, fold, merged=False) as (call, source):
        call.out_channel = record.length if fold == "each" else 0
        library().attention_line(ctypes.byref(call), source, ctypes.c_int64(step), ctypes.c_int32(axis == "column"))
    return out


@contextmanager
def _call(
    record: ScanRecord, weights: Weights, out: Tensor, fold: str, merged: bool
) -> Iterator[tuple[_CAttention, ctypes.c_void_p]]:
    """The C structure of a call and where steps find their sources; its tensors live as long as the block."""
    exact = torch.nn.functional.pad(record.A.detach().double().flatten() * _LOG2_E, (0, _LANES))
    A2, A2_low = exact.float(), (exact - exact.float()).float()
    delta, B, C = (x.detach().float() for x in (record.source_delta, record.source_B, record.source_C))
    rows, columns = (None if x is None else x.detach().float() for x in weights)
    frame = _frame(record, merged, source=False)
    scan = _c_scan(delta, delta, A2, B, C, None, frame)
    if fold in ("mean", "positive", "absolute"):
        scan.scale /= record.channels
    source = _order(record, "read_order", frame.positions) if record.source_frame == "tokens" else None
    call = _CAttention(
        scan, _c_tensor(rows, 2, frame.routes), _c_tensor(columns, 2, frame.routes), A2_low.data_ptr(),
        out.data_ptr(), 0, out.stride(0), 0, 0, _FOLDS[fold],
    )  # fmt: skip
    yield call, ctypes.c_void_p(None if source is None else source.data_ptr())


def _groups(record: ScanRecord) -> list[ScanRecord]:
    """Spell out shared heads and states, and give every group of B and C its own record."""
    width, states = record.channels // record.heads, record.states
    if width > 1:
        record = record.replace(
            source_delta=record.source_delta.repeat_interleave(width, dim=2), A=record.A.repeat_interleave(width, dim=1)
        )
    if record.A.shape[2] != states:
        record = record.replace(A=record.A.expand(-1, -1, states))
    groups = record.source_B.shape[2]
    if groups == 1:
        return [record]
    size = record.channels // groups
    return [
        record.replace(
            source_u=record.source_u[:, :, part], source_delta=record.source_delta[:, :, part], A=record.A[:, part],
            source_B=record.source_B[:, :, group : group + 1], source_C=record.source_C[:, :, group : group + 1],
            D=None if record.D is None else record.D[:, part],
        )
        for group, part in enumerate(slice(g * size, (g + 1) * size) for g in range(groups))
    ]  # fmt: skip


def _fold_groups(
    native: Native, parts: list[ScanRecord], rows: Tensor | None, columns: Tensor | None, fold: str, merged: bool
) -> Tensor:
    size = parts[0].channels
    results = []
    for group, part in enumerate(parts):
        own = slice(group * size, (group + 1) * size)
        own_rows, own_columns = pick((rows, columns), slice(None), slice(None), own)
        results.append(native.hidden_attention(part, own_rows, own_columns, fold, merged))
    if fold == "each":
        return torch.cat(results, dim=-3)
    total = torch.stack(results).sum(0)
    return total if fold == "sum" else total / len(parts)


def _gradient_of(x: Tensor, frame: _Frame) -> Tensor:
    """Memory for a gradient, channels last; zeros unless the kernel writes every entry once."""
    batch, routes, channels, positions = x.shape
    once = routes == frame.routes and positions == frame.length
    return (x.new_empty if once else x.new_zeros)(batch, routes, positions, channels)


def _channels_last(x: Tensor, padding: int) -> Tensor:
    """float32 (batch, routes, channels, positions) with stride 1 along channels, a multiple of 16 of them."""
    x = x.float().mT
    if padding:  # pad copies even when there is nothing to add
        x = torch.nn.functional.pad(x, (0, padding))
    return (x if x.stride(-1) == 1 else x.contiguous()).mT


def _frame(record: ScanRecord, merged: bool, source: bool) -> _Frame:
    """``source``: read is where a step finds its inputs; otherwise the token whose column it is."""
    gathers = record.source_frame == "tokens"
    positions = record.source_delta.shape[-1]
    read = _order(record, "read_order", positions if source else record.tokens) if gathers or not source else None
    write = _order(record, "write_order", record.tokens) if merged else None
    scale = record.scale if merged else 1.0
    return _Frame(read, write, record.routes, record.length, record.tokens, positions, scale)


def _order(record: ScanRecord, name: str, size: int) -> Tensor:
    """An order as the kernel indexes with it: int64, contiguous, nowhere outside; it would write there unchecked."""
    order: Tensor = getattr(record, name)
    require_distinct(f"ScanRecord: {name}", order, size)
    return order.long().contiguous()


def _c_tensor(x: Tensor | None, axis: int, routes: int) -> _CTensor:
    """Pointer and strides; a route axis of size 1 is shared by all routes."""
    if x is None:
        return _CTensor(None, 0, 0, 0, 0)
    route = x.stride(1) if x.shape[1] == routes and routes > 1 else 0
    return _CTensor(x.data_ptr(), x.stride(0), route, x.stride(axis), x.stride(-1))


def _c_scan(u: Tensor, delta: Tensor, A2: Tensor, B: Tensor, C: Tensor, D: Tensor | None, frame: _Frame) -> _CScan:
    pointers = [None if x is None else x.data_ptr() for x in (A2, D, frame.read, frame.write)]
    return _CScan(
        delta.shape[0], frame.routes, delta.shape[2], B.shape[3], frame.length, frame.tokens, frame.positions,
        _c_tensor(u, 2, frame.routes), _c_tensor(delta, 2, frame.routes), _c_tensor(B, 3, frame.routes),
        _c_tensor(C, 3, frame.routes), *pointers, frame.scale, torch.get_num_threads(),
    )  # fmt: skip
