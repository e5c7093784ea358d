"""The CUDA kernels as operators of torch, ``torch.ops.mamba_attn``: fake kernels for the compiler, and gradients."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import MambaAttnError
from mamba_attn.ops import blocked
from mamba_attn.ops.cuda import kernels
from mamba_attn.ops.cuda.launcher import LAUNCHER, Launcher

launcher: Launcher = LAUNCHER  # tests put another in its place


def _record(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read_order: Tensor,
    write_order: Tensor, tokens: int, scale: float, source_frame: str,
) -> ScanRecord:  # fmt: skip
    return ScanRecord(
        source_u=u, source_delta=delta, A=A, source_B=B, source_C=C, D=D, read_order=read_order,
        write_order=write_order, tokens=tokens, scale=scale, source_frame=source_frame,
    )  # fmt: skip


def flat(record: ScanRecord) -> tuple[Any, ...]:
    """A record as the operators take it; ``_record`` is the way back."""
    return (
        record.source_u, record.source_delta, record.A, record.source_B, record.source_C, record.D, record.read_order,
        record.write_order, record.tokens, record.scale, record.source_frame,
    )  # fmt: skip


@contextmanager
def remedy(record: ScanRecord) -> Iterator[None]:
    """Say what helps when the device's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MambaAttnError(
            f"the kernels ran out of memory with {record.batch} images, {record.routes} routes, {record.channels} "
            f"channels and {record.length} steps: {error} Use fewer images at a time, or rows and products "
            "(attention_row, left_product), which take linear memory."
        ) from error


@torch.library.custom_op("mamba_attn::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read_order: Tensor,
    write_order: Tensor, tokens: int, scale: float, source_frame: str, merged: bool,
) -> Tensor:  # fmt: skip
    """The fields of a ``ScanRecord``; y (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
    record = _record(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        return kernels.scan(launcher, record, merged)


@torch.library.custom_op("mamba_attn::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    gradient: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read_order: Tensor,
    write_order: Tensor, tokens: int, scale: float, source_frame: str, merged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C and D (empty without D), in their shapes and types."""
    record = _record(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        *five, skip = kernels.backward(launcher, record, gradient, merged)
    results = [x.to(source.dtype) for x, source in zip(five, (u, delta, A, B, C), strict=True)]
    du, ddelta, dA, dB, dC = results
    return du, ddelta, dA, dB, dC, u.new_empty(0) if skip is None or D is None else skip.to(D.dtype)


@torch.library.custom_op("mamba_attn::hidden_attention", mutates_args=())
def hidden_attention(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read_order: Tensor,
    write_order: Tensor, tokens: int, scale: float, source_frame: str, merged: bool, row_weight: Tensor | None,
    col_weight: Tensor | None, fold: str,
) -> Tensor:  # fmt: skip
    """The folded matrix of a record; of u only the shape counts."""
    record = _record(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        return kernels.attention(launcher, record, (row_weight, col_weight), fold, merged)[1]


@torch.library.custom_op("mamba_attn::scan_and_attention", mutates_args=())
def scan_and_attention(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read_order: Tensor,
    write_order: Tensor, tokens: int, scale: float, source_frame: str, merged: bool, fold: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Y and the folded matrix, by one launch."""
    record = _record(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        y, attention = kernels.attention(launcher, record, (None, None), fold, merged, with_y=True)
    return u.new_empty(0) if y is None else y, attention


@torch.library.custom_op("mamba_attn::hidden_attention_backward", mutates_args=())
def hidden_attention_backward(
    gradient: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, read_order: Tensor,
    write_order: Tensor, tokens: int, scale: float, source_frame: str, merged: bool, row_weight: Tensor | None,
    col_weight: Tensor | None, fold: str, needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of delta, A, B, C and the two weights by the blocked path; empty where not needed."""
    record = _record(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    weights = (row_weight, col_weight)
    stream = torch.cuda.current_stream(u.device) if u.is_cuda else None

    def run() -> list[Tensor | None]:
        with torch.cuda.stream(stream):
            return blocked.attention_gradients(record, weights, fold, merged, gradient, needed)

    with ThreadPoolExecutor(1) as other:  # in an operator's own thread autograd is off
        a, b, c, d, e, f = (u.new_empty(0) if x is None else x for x in other.submit(run).result())
    return a, b, c, d, e, f


def _y_shape(u: Tensor, read_order: Tensor, tokens: int, merged: bool) -> Sequence[int | torch.SymInt]:
    routes, length = read_order.shape
    return (u.shape[0], u.shape[2], tokens) if merged else (u.shape[0], routes, u.shape[2], length)


def _attention_shape(
    u: Tensor, read_order: Tensor, tokens: int, merged: bool, fold: str
) -> Sequence[int | torch.SymInt]:
    routes, length = read_order.shape
    kept = (u.shape[2],) if fold == "each" else ()
    return (u.shape[0], *kept, tokens, tokens) if merged else (u.shape[0], routes, *kept, length, length)


@selective_scan.register_fake
def _(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged):  # type: ignore[no-untyped-def]
    return u.new_empty(_y_shape(u, read_order, tokens, merged), dtype=torch.float32)


@selective_scan_backward.register_fake
def _(gradient, u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged):  # type: ignore[no-untyped-def]
    results = [x.new_empty(x.shape) for x in (u, delta, A, B, C)]
    return *results, u.new_empty(0) if D is None else D.new_empty(D.shape)


@hidden_attention.register_fake
def _(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged, row_weight, col_weight, fold):  # type: ignore[no-untyped-def]
    return u.new_empty(_attention_shape(u, read_order, tokens, merged, fold), dtype=torch.float32)


@scan_and_attention.register_fake
def _(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged, fold):  # type: ignore[no-untyped-def]
    shapes = _y_shape(u, read_order, tokens, merged), _attention_shape(u, read_order, tokens, merged, fold)
    return tuple(u.new_empty(shape, dtype=torch.float32) for shape in shapes)


@hidden_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gradient, u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged, row_weight,
    col_weight, fold, needed,
):  # fmt: skip
    sources = zip((delta, A, B, C, row_weight, col_weight), needed, strict=True)
    return tuple(u.new_empty(0) if x is None or not need else x.new_empty(x.shape) for x, need in sources)


_SOURCES = 8  # tensors of a record, at the front of every operator's arguments
_FIELDS = 11  # of a record


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors of a call and the rest of its arguments; outputs that nobody used get no gradient."""
    ctx.set_materialize_grads(False)
    weights = inputs[_FIELDS + 1 : _FIELDS + 3] if len(inputs) > _FIELDS + 2 else ()
    ctx.save_for_backward(*inputs[:_SOURCES], *weights)
    ctx.fields, ctx.merged, ctx.fold = inputs[_SOURCES:_FIELDS], inputs[_FIELDS], inputs[-1]


def _through_y(ctx: Any, gradient: Tensor | None) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D through y."""
    record = (*ctx.saved_tensors[:_SOURCES], *ctx.fields)
    if gradient is None:
        return [None] * 6
    *five, skip = selective_scan_backward(gradient, *record, ctx.merged)
    return [*five, None if record[5] is None else skip]


def _through_attention(ctx: Any, gradient: Tensor | None) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D and the weights through the matrix, by the blocked path.

    u and D are no part of it.
    """
    if gradient is None:
        return [None] * 8
    weights = (*ctx.saved_tensors[_SOURCES:], None, None)[:2]
    of_weights = ctx.needs_input_grad[_FIELDS + 1 : _FIELDS + 3] if len(ctx.needs_input_grad) > _FIELDS + 2 else ()
    needed = [*ctx.needs_input_grad[1:5], *of_weights, False, False][:6]
    record = (*ctx.saved_tensors[:_SOURCES], *ctx.fields)
    every = hidden_attention_backward(gradient, *record, ctx.merged, *weights, ctx.fold, needed)
    found = [value if need else None for value, need in zip(every, needed, strict=True)]
    return [None, *found[:4], None, *found[4:]]


_REST = (None,) * (_FIELDS - 6)  # orders, tokens, scale, frame


def _scan_gradient(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_through_y(ctx, gradient), *_REST, None


def _attention_gradient(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    *six, rows, columns = _through_attention(ctx, gradient)
    return *six, *_REST, None, rows, columns, None


def _both_gradients(ctx: Any, of_y: Tensor | None, of_attention: Tensor | None) -> tuple[Tensor | None, ...]:
    pairs = zip(_through_y(ctx, of_y), _through_attention(ctx, of_attention)[:6], strict=True)
    six = [b if a is None else a if b is None else a + b for a, b in pairs]
    return *six, *_REST, None, None


selective_scan.register_autograd(_scan_gradient, setup_context=_keep)
hidden_attention.register_autograd(_attention_gradient, setup_context=_keep)
scan_and_attention.register_autograd(_both_gradients, setup_context=_keep)
