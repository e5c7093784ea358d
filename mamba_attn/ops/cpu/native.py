"""The CPU kernel: native.cpp through ctypes, compiled once per machine at first use.

Optional: without a compiler the blocked path runs. Computes in float32 (converts half precision); refuses float64.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import blocked, chunk_scan
from mamba_attn.ops.arguments import Weights, pick
from mamba_attn.ops.backend import Backend
from mamba_attn.ops.cpu.build import library, library_problem
from mamba_attn.ops.cpu.structures import CAttention, CGradients, Frame, c_scan, c_tensor, checked_order
from mamba_attn.ops.flat_records import (
    REST,
    WEIGHTED,
    attention_gradient,
    empty_attention,
    flatten_for_matrix,
    keep,
    operator,
    unflatten,
)
from mamba_attn.ops.heads import as_units, by_group, by_head, unit_width

_LANES = 16
_FOLDS = {"sum": 0, "mean": 0, "positive": 1, "absolute": 2, "each": 3}
_LOG2_E = 1 / math.log(2)
_SMALLEST_STEP = 1e-20
_PRODUCTS = 8192  # channels of a head times states from which products are faster than the kernel's loop


class Native(Backend):
    """Backend "native": the C++ kernel on the CPU."""

    def unavailable(self, record: ScanRecord) -> str | None:
        """Return why the kernel cannot run this record, or None."""
        tensors: tuple[Tensor, ...] = (record.source_u, record.source_delta, record.A, record.source_B, record.source_C)
        if record.source_gain is not None:
            tensors = (*tensors, record.source_gain)
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return f"it runs on the CPU and the tensors are on {record.source_delta.device}; move them with .cpu()."
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            return "it computes in float32 and an input is float64; convert it, or use backend='blocked'."
        return library_problem()

    def selective_scan(self, record: ScanRecord, merged: bool) -> Tensor:
        """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
        if chunk_scan.channels_share_decays(record) and unit_width(record) * record.states >= _PRODUCTS:
            return chunk_scan.selective_scan(record, merged)
        outputs = [self._scan_group(part, merged) for part in _groups(record)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)

    def hidden_attention(
        self, record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
    ) -> Tensor:
        """(batch, [channels,] tokens, tokens) merged, else (batch, routes, [channels,] length, length)."""
        if unit_width(record) > 1:
            return by_head(_scan_ordered, record, (row_weight, col_weight), fold, merged)
        if record.source_gain is not None:
            tensors = (record.source_delta, record.A, record.source_B, record.source_C, record.source_gain)
            if torch.is_grad_enabled() and any(
                x is not None and x.requires_grad for x in (*tensors, row_weight, col_weight)
            ):
                return blocked.BACKEND.hidden_attention(record, row_weight, col_weight, fold, merged)
            record, col_weight = _gain_in_columns(record, col_weight)
        parts = _groups(record)
        if len(parts) > 1:
            return _fold_groups(self, parts, row_weight, col_weight, fold, merged)
        (part,) = parts
        run: Callable[..., Tensor] = _attention_operator if torch.compiler.is_compiling() else _Attention.apply
        return run(*flatten_for_matrix(part), merged, row_weight, col_weight, fold)

    def hidden_attentions(
        self, record: ScanRecord, weights: Sequence[Weights], folds: Sequence[str], merged: bool
    ) -> list[Tensor]:
        """Matrices with signed folds in pairs, each pair in one sweep; where a graph is kept, one after the other."""
        tensors = (record.source_delta, record.A, record.source_B, record.source_C, record.source_gain)
        kept = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (*tensors, *(x for its in weights for x in its))
        )
        together = not kept and unit_width(record) == 1 and record.source_B.shape[2] == 1
        if not together or torch.compiler.is_compiling() or not set(folds) <= {"mean", "sum"}:
            return super().hidden_attentions(record, weights, folds, merged)
        if record.source_gain is not None:
            plain = [_gain_in_columns(record, columns) for _, columns in weights]
            record, weights = plain[0][0], [(its[0], columns) for its, (_, columns) in zip(weights, plain, strict=True)]
        (part,) = _groups(record)
        found: list[Tensor] = []
        for first in range(0, len(folds), 2):
            pair = slice(first, first + 2)
            found += _matrices(part, weights[pair], folds[pair], merged)
        return found

    def _scan_group(self, record: ScanRecord, merged: bool) -> Tensor:
        channels = record.channels
        padding = -channels % _LANES
        u, delta = (_channels_last(x, padding) for x in (record.source_u, record.source_delta))
        A = torch.nn.functional.pad(record.A.float(), (0, 0, 0, padding), value=-1.0)
        D = None if record.D is None else torch.nn.functional.pad(record.D.float(), (0, padding))
        gain = None if record.source_gain is None else _channels_last(record.source_gain, padding)
        B, C = torch.broadcast_tensors(record.source_B.float(), record.source_C.float())  # routes may share one
        read = record.read_order if record.source_frame == "tokens" else None
        write = record.write_order if merged else None
        run: Callable[..., Tensor] = _scan_operator if torch.compiler.is_compiling() else _Scan.apply
        y = run(u, delta, A, B, C, D, gain, read, write, record.tokens, record.scale if merged else 1.0)
        return y[..., :channels, :] if padding else y


BACKEND = Native()


def _scan_ordered(record: ScanRecord, weights: Weights, fold: str) -> Tensor:
    return BACKEND.hidden_attention(record, *weights, fold, merged=False)


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gain: Tensor | None,
    read: Tensor | None,
    write: Tensor | None,
    tokens: int,
    scale: float,
) -> Tensor:
    """The scan of float32 tensors: (batch, channels, tokens), or (batch, routes, channels, length); channels last.

    The fields of a ``ScanRecord`` with one group; ``read`` if sources are in the token frame, ``write`` if routes
    merge.
    """
    u, delta, D, A2 = *(_channels_last(x, 0) for x in (u, delta)), _dense(D), _base_two(A)
    gain = None if gain is None else _channels_last(gain, 0)
    frame = _scan_frame(u, A, read, write, tokens, scale)
    y = u.new_zeros(_rows(u, A, read, write, tokens))
    scan = c_scan(u, delta, A2, B, C, D, frame, gain)
    library().scan_forward(ctypes.byref(scan), ctypes.c_void_p(y.data_ptr()))
    return y.mT


def _scan_backward(
    gradient: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gain: Tensor | None,
    read: Tensor | None,
    write: Tensor | None,
    tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients in the kernel's layout: channels last, those of A and D per image; the states are recomputed.

    The last is the gradient of the gain, empty without one.
    """
    u, delta, D, A2 = *(_channels_last(x, 0) for x in (u, delta)), _dense(D), _base_two(A)
    gain = None if gain is None else _channels_last(gain, 0)
    frame = _scan_frame(u, A, read, write, tokens, scale)
    gradient = gradient.float().mT.contiguous()
    results = du, ddelta, dA, dB, dC, dD, dgain = _gradients(u, delta, A, B, gain)
    for zeroed in (dA, dB, dC, dD):
        zeroed.zero_()
    for x, source in ((du, u), (ddelta, delta), (dgain, delta if gain is None else gain)):
        if source.shape[1] != frame.routes or source.shape[3] != frame.length:  # otherwise every entry is written once
            x.zero_()
    scan = c_scan(u, delta, A2, B, C, D, frame, gain)
    routes = [0 if x is None else x.shape[1] for x in (u, delta, B, gain)]
    gradients = CGradients(*(x.data_ptr() for x in results), *routes)
    library().scan_backward(ctypes.byref(scan), ctypes.c_void_p(gradient.data_ptr()), ctypes.byref(gradients))
    return results


def _attention(*arguments: Any) -> Tensor:
    """Return the folded matrix of a record with one group; uses only u's shape. Its gradient is the blocked path's."""
    record, (merged, rows, columns, fold) = unflatten(arguments)
    return _matrices(record, [(rows, columns)], [fold], merged)[0]


def _matrices(record: ScanRecord, weights: Sequence[Weights], folds: Sequence[str], merged: bool) -> list[Tensor]:
    """Return the folded matrices of a record with one group: one, or two whose folds are "mean" or "sum"."""
    fields = flatten_for_matrix(record)
    outs = [empty_attention(*fields, merged, None, None, fold) for fold in folds]
    with _calls(record, weights, outs, folds, merged) as (calls, source):
        for call, out, fold in zip(calls, outs, folds, strict=True):
            side = out.shape[-1]
            call.side, call.out_route = side, 0 if merged else out.stride(1)
            call.out_channel = side * side if fold == "each" else 0
        library().hidden_attention(calls, ctypes.c_int64(len(calls)), source)
    return outs


def _line(*arguments: Any) -> Tensor:
    """One row or column of a record of one route and one group, in scan order; keeps no graph."""
    record, (rows, columns, axis, step, fold) = unflatten(arguments)
    out = _empty_line(*arguments).zero_()
    with _calls(record, [(rows, columns)], [out], [fold], merged=False) as (calls, source):
        calls[0].out_channel = record.length if fold == "each" else 0
        library().attention_line(calls, source, ctypes.c_int64(step), ctypes.c_int32(axis == "column"))
    return out


def _empty_line(*arguments: Any) -> Tensor:
    u, read_order = arguments[0], arguments[6]
    kept = (u.shape[2],) if arguments[-1] == "each" else ()
    empty: Tensor = u.new_empty((u.shape[0], *kept, read_order.shape[1]), dtype=torch.float32)
    return empty


# Under torch.compile the functions above are operators, or it would trace into the pointers; called as operators in
# eager mode they would cost three times as much as the rest of a small call.
_scan_operator = torch.library.custom_op("mamba_attn::native_scan", _scan, mutates_args=())
_scan_backward_operator = torch.library.custom_op("mamba_attn::native_scan_backward", _scan_backward, mutates_args=())
_attention_operator = operator("native_attention", WEIGHTED, "Tensor", _attention, empty_attention)
_line_operator = operator(
    "native_attention_line",
    "Tensor? row_weight, Tensor? col_weight, str axis, SymInt step, str fold",
    "Tensor",
    _line,
    _empty_line,
)


@_scan_operator.register_fake
def _(u, delta, A, B, C, D, gain, read, write, tokens, scale):  # type: ignore[no-untyped-def]
    return u.new_empty(_rows(u, A, read, write, tokens)).mT


@_scan_backward_operator.register_fake
def _(gradient, u, delta, A, B, C, D, gain, read, write, tokens, scale):  # type: ignore[no-untyped-def]
    return _gradients(u, delta, A, B, gain)


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.rest = inputs[9:]


def _scan_gradients(ctx: Any, gradient: Tensor, backward: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dgain = backward(gradient, *tensors, *ctx.rest)
    to_groups = [x.mT.unsqueeze(2) for x in (dB, dC)]
    skip = None if tensors[5] is None else dD.sum(0)
    of_gain = None if tensors[6] is None else dgain.mT
    return du.mT, ddelta.mT, dA.sum(0).mT, *to_groups, skip, of_gain, None, None, None, None


_scan_operator.register_autograd(partial(_scan_gradients, backward=_scan_backward_operator), setup_context=_keep_scan)
_attention_operator.register_autograd(attention_gradient, setup_context=keep)


def _differentiable_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``_scan`` with a graph of their own, by the blocked path: the kernel's backward has none.

    Marking the kernel's backward as differentiable once would not do: where other paths lead to the same tensor,
    autograd then leaves this one out without an error.
    """
    u, delta, A, B, C, D, gain, read, write = ctx.saved_tensors
    tokens, scale = ctx.rest
    steps = torch.arange(u.shape[3]).expand(A.shape[0], -1)
    record = ScanRecord(
        source_u=u,
        source_delta=delta,
        A=A,
        source_B=B,
        source_C=C,
        D=D,
        source_gain=gain,
        read_order=steps if read is None else read,
        write_order=steps if write is None else write,
        tokens=tokens,
        scale=scale,
        source_frame="scan" if read is None else "tokens",
    )
    with torch.autocast("cpu", enabled=False):
        y = blocked.BACKEND.selective_scan(record, merged=write is not None)
    inputs = ctx.saved_tensors[:7]
    wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return *(next(found) if need else None for need in ctx.needs_input_grad[:7]), None, None, None, None


class _Scan(torch.autograd.Function):
    """``_scan`` in eager mode; the backward recomputes the states and keeps the inputs only."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep_scan(ctx, inputs, None)
        return _scan(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, gradient)
        return _scan_gradients(ctx, gradient, _scan_backward)


class _Attention(torch.autograd.Function):
    """``_attention`` in eager mode; the gradient runs through the blocked path."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        keep(ctx, inputs, None)
        return _attention(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        *sources, rows, columns = ctx.saved_tensors
        needed = (*ctx.needs_input_grad[1:5], *ctx.needs_input_grad[-3:-1])
        record, _ = unflatten((*sources, *ctx.fields))
        weights, graph = (rows, columns), torch.is_grad_enabled()
        found = blocked.attention_gradients(record, weights, ctx.fold, ctx.merged, gradient, needed, graph)
        return None, *found[:4], None, *REST, None, *found[4:], None


def attention_line(record: ScanRecord, axis: str, step: int, weights: Weights, fold: str) -> Tensor:
    """One row or column of a record of one route and one group: (batch, [channels,] length), in scan order."""
    if record.source_gain is not None:
        rows, columns = weights
        record, columns = _gain_in_columns(record, columns)
        weights = rows, columns
    (part,) = _groups(record)
    run: Callable[..., Tensor] = _line_operator if torch.compiler.is_compiling() else _line
    return run(*flatten_for_matrix(part), *weights, axis, step, fold)


@contextmanager
def _calls(
    record: ScanRecord, weights: Sequence[Weights], outs: Sequence[Tensor], folds: Sequence[str], merged: bool
) -> Iterator[tuple[Any, ctypes.c_void_p]]:
    """Yield C structures, one per matrix, and the positions of their sources; tensors stay alive inside the block."""
    exact = torch.nn.functional.pad(record.A.detach().double().flatten() * _LOG2_E, (0, _LANES))
    A2, A2_low = exact.float(), (exact - exact.float()).float()
    delta, B, C = (x.detach().float() for x in (record.source_delta, record.source_B, record.source_C))
    placed = [tuple(None if x is None else x.detach().float() for x in its) for its in weights]
    frame = _attention_frame(record, merged)
    in_tokens = record.source_frame == "tokens"
    source = checked_order("read_order", record.read_order, frame.positions) if in_tokens else None
    calls = (CAttention * len(folds))()
    for call, (rows, columns), out, fold in zip(calls, placed, outs, folds, strict=True):
        call.scan = c_scan(delta, delta, A2, B, C, None, frame)
        if fold in ("mean", "positive", "absolute"):
            call.scan.scale /= record.channels
        call.row_weight, call.col_weight = (c_tensor(x, 2, frame.routes) for x in (rows, columns))
        call.A2_low, call.fold = A2_low.data_ptr(), _FOLDS[fold]
        call.out, call.out_batch = out.data_ptr(), out.stride(0)
    yield calls, ctypes.c_void_p(None if source is None else source.data_ptr())


def _gain_in_columns(record: ScanRecord, columns: Tensor | None) -> tuple[ScanRecord, Tensor]:
    """Return a record without a gain, and gain / delta as column weights: the kernels multiply by delta again.

    Values only: the gradient of the quotient would cancel where delta is small. Only a delta too
    small to decay anything is clamped away from zero.
    """
    delta = record.source_delta.float() + _SMALLEST_STEP
    plain = record.replace(source_delta=delta, source_gain=None)
    ratio = (record.gain.float() / plain.delta).repeat_interleave(record.channels // record.heads, dim=2)
    return plain, ratio if columns is None else ratio * columns


def _groups(record: ScanRecord) -> list[ScanRecord]:
    """Expand shared heads and states, and give every group of B and C its own record."""
    record = as_units(record, 1)
    if record.A.shape[2] != record.states:
        record = record.replace(A=record.A.expand(-1, -1, record.states))
    return by_group(record)


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


def _rows(
    u: Tensor, A: Tensor, read: Tensor | None, write: Tensor | None, tokens: int | torch.SymInt
) -> tuple[int | torch.SymInt, ...]:
    """Shape of a scan's output, channels last."""
    length = u.shape[3] if read is None else read.shape[1]
    return (u.shape[0], *((A.shape[0], length) if write is None else (tokens,)), u.shape[2])


def _gradients(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, gain: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the gradients of u, delta, A, B, C, D and the gain."""
    batch, _, channels, positions = u.shape
    routes, states = A.shape[0], A.shape[2]
    du, ddelta = (u.new_empty(batch, x.shape[1], positions, channels) for x in (u, delta))
    dB, dC = (u.new_empty(batch, B.shape[1], positions, states) for _ in range(2))
    dA, dD = u.new_empty(batch, routes, states, channels), u.new_empty(batch, routes, channels)
    return du, ddelta, dA, dB, dC, dD, u.new_empty(0 if gain is None else (batch, gain.shape[1], positions, channels))


def _base_two(A: Tensor) -> Tensor:
    """Decay rates for powers of two: (routes, states, channels)."""
    return (A * _LOG2_E).mT.contiguous()


def _dense(D: Tensor | None) -> Tensor | None:
    return None if D is None else D.contiguous()


def _channels_last(x: Tensor, padding: int) -> Tensor:
    """float32 (batch, routes, channels, positions) with stride 1 along channels, a multiple of 16 of them."""
    x = x.float().mT
    if padding:  # pad copies even when there is nothing to add
        x = torch.nn.functional.pad(x, (0, padding))
    return (x if x.stride(-1) == 1 else x.contiguous()).mT


def _scan_frame(u: Tensor, A: Tensor, read: Tensor | None, write: Tensor | None, tokens: int, scale: float) -> Frame:
    positions = u.shape[3]
    length = positions if read is None else read.shape[1]
    read = None if read is None else checked_order("read_order", read, positions)
    write = None if write is None else checked_order("write_order", write, tokens)
    return Frame(read, write, A.shape[0], length, tokens, positions, scale)


def _attention_frame(record: ScanRecord, merged: bool) -> Frame:
    """Return a frame whose ``read`` is the token of a step's column."""
    read = checked_order("read_order", record.read_order, record.tokens)
    write = checked_order("write_order", record.write_order, record.tokens) if merged else None
    positions, scale = record.source_delta.shape[-1], record.scale if merged else 1.0
    return Frame(read, write, record.routes, record.length, record.tokens, positions, scale)
