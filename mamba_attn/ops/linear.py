"""Rows, columns and products of the hidden attention in time and memory linear in length."""

from functools import partial

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import (
    Call,
    Weights,
    as_record,
    at_tokens,
    check_fold,
    check_index,
    pick,
    scan_weight,
    to_tokens,
    working_dtype,
)
from mamba_attn.ops.backend import Backend
from mamba_attn.ops.blocked import Channels, per_channel, recurrence
from mamba_attn.ops.cpu import native
from mamba_attn.ops.cuda import fused
from mamba_attn.ops.heads import as_units, fold_heads, to_channels, unit_width

_WORKSPACE = 2**22  # elements of one temporary
_SIGNED = ("mean", "sum")


def attention_row(
    delta: Tensor | ScanRecord,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    row: int,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    fold: str = "mean",
    orders: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Return one row of ``hidden_attention``: what one token reads.

    Args:
        delta: as in ``hidden_attention``; so are A, B, C, the weights, fold, orders and tokens.
        A: see there.
        B: see there.
        C: see there.
        row: token (with orders or a record) or step.
        row_weight: see there.
        col_weight: see there.
        fold: see there.
        orders: see there.
        tokens: see there.

    Returns:
        The row of the matrix that ``hidden_attention`` returns for the same arguments: its shape without the axis
        before the last.

    Raises:
        ValueError: as ``hidden_attention``, or a row outside the matrix.

    Example:
        >>> x, A = torch.rand(2, 8, 5), -torch.rand(8, 4)  # delta (batch, channels, steps), A (channels, states)
        >>> B = C = torch.rand(2, 4, 5)
        >>> row = attention_row(x, A, B, C, row=3)
        >>> row.shape, bool((row[:, 4:] == 0).all())  # a step reads itself and what comes before it
        (torch.Size([2, 5]), True)
    """
    return _line("attention_row", "row", delta, A, B, C, row, row_weight, col_weight, fold, orders, tokens)


def attention_column(
    delta: Tensor | ScanRecord,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    column: int,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    fold: str = "mean",
    orders: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Return one column of ``hidden_attention``: where one token is read.

    Args:
        delta: as in ``hidden_attention``; so are A, B, C, the weights, fold, orders and tokens.
        A: see there.
        B: see there.
        C: see there.
        column: token (with orders or a record) or step.
        row_weight: see there.
        col_weight: see there.
        fold: see there.
        orders: see there.
        tokens: see there.

    Returns:
        The column of the matrix that ``hidden_attention`` returns for the same arguments: its shape without the last
        axis.

    Raises:
        ValueError: as ``hidden_attention``, or a column outside the matrix.

    Example:
        >>> x, A = torch.rand(2, 8, 5), -torch.rand(8, 4)  # delta (batch, channels, steps), A (channels, states)
        >>> B = C = torch.rand(2, 4, 5)
        >>> attention_column(x, A, B, C, column=3).shape
        torch.Size([2, 5])
    """
    return _line("attention_column", "column", delta, A, B, C, column, row_weight, col_weight, fold, orders, tokens)


def left_product(
    delta: Tensor | ScanRecord,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    vector: Tensor,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    fold: str = "mean",
    orders: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Return ``vector @ hidden_attention(...)``: one scan, run backwards.

    Args:
        delta: as in ``hidden_attention``; so are A, B, C, the weights, orders and tokens.
        A: see there.
        B: see there.
        C: see there.
        vector: (batch, length), with orders or a record (batch, tokens).
        row_weight: see there.
        col_weight: see there.
        fold: "mean" or "sum"; the other folds are not linear.
        orders: see there.
        tokens: see there.

    Returns:
        (batch, [routes,] length), with orders or a record (batch, tokens).

    Raises:
        ValueError: as ``hidden_attention``, or a vector of another shape.

    Example:
        >>> x, A = torch.rand(2, 8, 5), -torch.rand(8, 4)  # delta (batch, channels, steps), A (channels, states)
        >>> B = C = torch.rand(2, 4, 5)
        >>> left_product(x, A, B, C, vector=torch.rand(2, 5)).shape  # vector @ M
        torch.Size([2, 5])
    """
    call = as_record("left_product", None, delta, A, B, C, orders=orders, tokens=tokens)
    return _product(call, vector, row_weight, col_weight, fold, transposed=True)


def right_product(
    delta: Tensor | ScanRecord,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    vector: Tensor,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    fold: str = "mean",
    orders: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    """Return ``hidden_attention(...) @ vector``: one scan.

    Args:
        delta: as in ``hidden_attention``; so are A, B, C, the weights, orders and tokens.
        A: see there.
        B: see there.
        C: see there.
        vector: (batch, length), with orders or a record (batch, tokens).
        row_weight: see there.
        col_weight: see there.
        fold: "mean" or "sum"; the other folds are not linear.
        orders: see there.
        tokens: see there.

    Returns:
        (batch, [routes,] length), with orders or a record (batch, tokens).

    Raises:
        ValueError: as ``hidden_attention``, or a vector of another shape.

    Example:
        >>> x, A = torch.rand(2, 8, 5), -torch.rand(8, 4)  # delta (batch, channels, steps), A (channels, states)
        >>> B = C = torch.rand(2, 4, 5)
        >>> right_product(x, A, B, C, vector=torch.rand(2, 5)).shape  # M @ vector
        torch.Size([2, 5])
    """
    call = as_record("right_product", None, delta, A, B, C, orders=orders, tokens=tokens)
    return _product(call, vector, row_weight, col_weight, fold, transposed=False)


def _line(
    name: str,
    axis: str,
    delta: Tensor | ScanRecord,
    A: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    index: int,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    fold: str,
    orders: Tensor | None,
    tokens: int | None,
) -> Tensor:
    call = as_record(name, None, delta, A, B, C, orders=orders, tokens=tokens)
    record = call.record
    check_fold(call, fold)
    check_index(call, axis, index, record.tokens if call.merged else record.length)
    weights = scan_weight(call, "row_weight", row_weight), scan_weight(call, "col_weight", col_weight)
    if not record.shares_orders:
        images = [slice(b, b + 1) for b in range(record.batch)]
        lines = [
            _lines(call._replace(record=record.select_images(its)), axis, index, pick(weights, its), fold)
            for its in images
        ]
        return torch.cat(lines)
    if _kernel(record, weights) is fused.BACKEND:
        line = fused.BACKEND.attention_line(record, axis, index, weights, fold, call.merged)
        return line if call.merged or call.route_axis else line.squeeze(1)
    return _lines(call, axis, index, weights, fold)


def _lines(call: Call, axis: str, index: int, weights: Weights, fold: str) -> Tensor:
    """Return the line of images that walk the same orders, computed route by route."""
    record = call.record
    lines = [
        _route_line(record.select_routes(slice(r, r + 1)), axis, index, _route(weights, r), fold, call.merged)
        for r in range(record.routes)
    ]
    if call.merged:
        return torch.stack(lines).sum(0)
    return torch.stack(lines, dim=1) if call.route_axis else lines[0]


def _route_line(record: ScanRecord, axis: str, index: int, weights: Weights, fold: str, merged: bool) -> Tensor:
    """The line of one route: (batch, [channels,] tokens) merged and scaled, else (batch, [channels,] length)."""
    own, other = record.write_order.view(-1), record.read_order.view(-1)
    if axis == "column":
        own, other = other, own
    steps = (own == index).nonzero().flatten().tolist() if merged else [index]
    kept = (record.channels,) if fold == "each" else ()
    dtype, device = working_dtype(record), record.source_delta.device
    size = record.tokens if merged else record.length
    line = torch.zeros(record.batch, *kept, size, dtype=dtype, device=device)
    for step in steps:
        values = _step_line(record, axis, step, weights, fold)
        if not merged:
            line = values
        elif record.shares_orders:
            line = line.index_add(-1, other, values * record.scale)
        else:
            line = line + to_tokens(values * record.scale, other, size)
    return line


def _step_line(record: ScanRecord, axis: str, step: int, weights: Weights, fold: str) -> Tensor:
    """The line of one step of one route, in scan order: (batch, [channels,] length)."""
    if unit_width(record) > 1:
        own, every = slice(step, step + 1), slice(None)
        along, rows, columns = (-2, own, every) if axis == "row" else (-1, every, own)

        def run(part: ScanRecord, its: Weights, what: str) -> Tensor:
            return _step_line(part, axis, step, its, what).unsqueeze(1).unsqueeze(along)

        line = fold_heads(run, record, weights, fold, rows, columns).squeeze(along).squeeze(1)
        return to_channels(line, record.channels, 1) if fold == "each" else line
    if _kernel(record, weights) is native.BACKEND:
        part = record if record.shares_orders else record.in_scan_order()
        return native.attention_line(part, axis, step, weights, fold)
    span = slice(0, step + 1) if axis == "row" else slice(step, record.length)
    values = _line_values(record, axis, step, span, weights, fold)
    return torch.nn.functional.pad(values, (span.start, record.length - span.stop))


def _kernel(record: ScanRecord, weights: Weights, *others: Tensor) -> Backend | None:
    """Return a compiled backend that runs a call without gradients; the CPU's takes one group."""
    tensors = [record.source_delta, record.A, record.source_B, record.source_C, *weights, *others]
    graph = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if graph:
        return None
    if fused.BACKEND.unavailable(record) is None:
        return fused.BACKEND
    return native.BACKEND if record.source_B.shape[2] == 1 and native.BACKEND.unavailable(record) is None else None


def _line_values(
    record: ScanRecord, axis: str, step: int, span: slice, weights: Weights, fold: str
) -> Float[Tensor, "batch *channels span"]:
    """M[step, span] or M[span, step] of one route, channels folded, channel block by channel block."""
    dtype = working_dtype(record)
    part = per_channel(record, dtype)
    S = part.delta.double().cumsum(-1)
    size = max(1, _WORKSPACE // (record.batch * record.states * (span.stop - span.start)))
    blocks = []
    for start in range(0, record.channels, size):
        own = slice(start, start + size)
        block, s = part.block(own), S[:, :, own]
        rows, columns = pick(weights, slice(None), slice(None), own)
        i, j = (slice(step, step + 1), span) if axis == "row" else (span, slice(step, step + 1))
        decay = (s[..., i] - s[..., j]).to(dtype)
        M = (torch.exp(block.A.unsqueeze(-1) * decay.unsqueeze(-2)) * (block.C[..., i] * block.B[..., j])).sum(-2)
        M = M * block.gain[..., j]
        M = M if rows is None else M * rows[..., i]
        M = M if columns is None else M * columns[..., j]
        if fold == "positive":
            M = M.clamp(min=0)
        elif fold == "absolute":
            M = M.abs()
        blocks.append(M.squeeze(1) if fold == "each" else M.squeeze(1).sum(1))
    if fold == "each":
        return torch.cat(blocks, dim=1)
    total = torch.stack(blocks).sum(0)
    return total if fold == "sum" else total / record.channels


def _product(
    call: Call, vector: Tensor, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, transposed: bool
) -> Tensor:
    record = call.record
    check_fold(call, fold, _SIGNED)
    expected = (record.batch, record.tokens if call.merged else record.length)
    if tuple(vector.shape) != expected:
        raise ValueError(f"{call.text}: vector must be {expected}, got {tuple(vector.shape)}.")
    weights = scan_weight(call, "row_weight", row_weight), scan_weight(call, "col_weight", col_weight)
    results = []
    for r in range(record.routes):
        part = record.select_routes(slice(r, r + 1))
        read, write = part.read_order[..., 0, :], part.write_order[..., 0, :]
        if transposed:
            read, write = write, read
        if not call.merged:
            values = vector
        elif record.shares_orders:
            values = vector[:, read]
        else:
            values = at_tokens(vector, read)
        values = _route_product(part, values, _route(weights, r), transposed)
        values = values if fold == "sum" else values / record.channels
        if call.merged and record.shares_orders:
            frame = torch.zeros(expected, dtype=values.dtype, device=values.device)
            values = frame.index_add(-1, write, values * record.scale)
        elif call.merged:
            values = to_tokens(values * record.scale, write, record.tokens)
        results.append(values)
    if call.merged:
        return torch.stack(results).sum(0)
    return torch.stack(results, dim=1) if call.route_axis else results[0]


def _route_product(
    record: ScanRecord,
    vector: Float[Tensor, "batch length"],
    weights: Weights,
    transposed: bool,
) -> Float[Tensor, "batch length"]:
    """M v or, transposed, v M of one route, summed over weighted channels."""
    dtype, width = working_dtype(record), unit_width(record)
    if width > 1 and any(weight is None for weight in weights):  # one scan per unit, whose channels' weights add up
        rows, columns = (None if x is None else x.to(dtype).unflatten(2, (-1, width)).sum(3) for x in weights)
        units = _route_product(as_units(record, width), vector, (rows, columns), transposed)
        return units * width if rows is None and columns is None else units
    part = per_channel(record, dtype)
    v = vector.to(dtype)[:, None, None]
    frozen = torch.is_inference_mode_enabled() or any(x.is_inference() for x in (*part, vector))
    kernel = None if transposed and frozen else _kernel(record, weights, vector)  # transposed: a backward pass
    apply = partial(_kernel_scan, kernel) if kernel else _transposed_scan if transposed else _scan
    size = max(16, _WORKSPACE // (record.batch * record.states * record.length) // 16 * 16)
    total = torch.zeros_like(vector, dtype=dtype)
    for start in range(0, record.channels, size):
        own = slice(start, start + size)
        block = part.block(own)
        rows, columns = pick(weights, slice(None), slice(None), own)
        first, last = (rows, columns) if transposed else (columns, rows)
        y = apply(block, (v if first is None else v * first).expand_as(block.delta), transposed)
        total = total + (y if last is None else y * last).sum((1, 2))
    return total


def _kernel_scan(kernel: Backend, part: Channels, inputs: Tensor, transposed: bool) -> Tensor:
    """A compiled scan; transposed, the vector-Jacobian product of the scan, which is linear in its input."""
    u = torch.zeros_like(inputs, requires_grad=True) if transposed else inputs
    with torch.set_grad_enabled(transposed):
        delta, A, B, C, gain = part
        own = None if gain is delta else gain
        y = kernel.selective_scan(ScanRecord.from_scan(u, delta, A, B, C, gain=own), merged=False)
        return torch.autograd.grad(y, u, inputs)[0] if transposed else y


def _scan(part: Channels, inputs: Tensor, transposed: bool) -> Tensor:
    return recurrence(part, part.delta, part.gain * inputs)


def _transposed_scan(part: Channels, inputs: Tensor, transposed: bool) -> Tensor:
    """M^T applied per channel: from the last step, with B and C exchanged and every decay one step later."""
    step = torch.nn.functional.pad(part.delta.flip(-1), (1, 0))[..., :-1]
    backwards = Channels(step, part.A, part.C.flip(-1), part.B.flip(-1), step)
    return recurrence(backwards, step, inputs.flip(-1)).flip(-1) * part.gain


def _route(weights: Weights, route: int) -> Weights:
    return pick(weights, slice(None), slice(route, route + 1))
