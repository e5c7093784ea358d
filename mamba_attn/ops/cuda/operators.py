"""The CUDA kernels as operators of torch, ``torch.ops.mamba_attn``: fake kernels for the compiler, and gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import MambaAttnError
from mamba_attn.ops.cuda import kernels
from mamba_attn.ops.cuda.launcher import LAUNCHER, Launcher
from mamba_attn.ops.flat_records import (
    REST,
    SOURCES,
    attention_gradient,
    attention_shape,
    keep,
    through_attention,
    unflatten,
    y_shape,
)

launcher: Launcher = LAUNCHER  # tests replace it


@contextmanager
def remedy(record: ScanRecord) -> Iterator[None]:
    """Add a remedy to the error when the device's memory runs out."""
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
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    read_order: Tensor,
    write_order: Tensor,
    tokens: int,
    scale: float,
    source_frame: str,
    merged: bool,
) -> Tensor:
    """The fields of a ``ScanRecord``; y (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
    record = unflatten(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        return kernels.scan(launcher, record, merged)


@torch.library.custom_op("mamba_attn::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    gradient: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    read_order: Tensor,
    write_order: Tensor,
    tokens: int,
    scale: float,
    source_frame: str,
    merged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C and D (empty without D), in their shapes and types."""
    record = unflatten(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        *five, skip = kernels.backward(launcher, record, gradient, merged)
    results = [x.to(source.dtype) for x, source in zip(five, (u, delta, A, B, C), strict=True)]
    du, ddelta, dA, dB, dC = results
    return du, ddelta, dA, dB, dC, u.new_empty(0) if skip is None or D is None else skip.to(D.dtype)


@torch.library.custom_op("mamba_attn::hidden_attention", mutates_args=())
def hidden_attention(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    read_order: Tensor,
    write_order: Tensor,
    tokens: int,
    scale: float,
    source_frame: str,
    merged: bool,
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    fold: str,
) -> Tensor:
    """Return the folded matrix of a record; of u it only uses the shape."""
    record = unflatten(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        return kernels.attention(launcher, record, (row_weight, col_weight), fold, merged)[1]


@torch.library.custom_op("mamba_attn::scan_and_attention", mutates_args=())
def scan_and_attention(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    read_order: Tensor,
    write_order: Tensor,
    tokens: int,
    scale: float,
    source_frame: str,
    merged: bool,
    fold: str,
) -> tuple[Tensor, Tensor]:
    """Return y and the folded matrix, from one launch."""
    record = unflatten(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    with remedy(record):
        y, attention = kernels.attention(launcher, record, (None, None), fold, merged, with_y=True)
    return u.new_empty(0) if y is None else y, attention


@selective_scan.register_fake
def _(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged):  # type: ignore[no-untyped-def]
    return u.new_empty(y_shape(u, read_order, tokens, merged), dtype=torch.float32)


@selective_scan_backward.register_fake
def _(gradient, u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged):  # type: ignore[no-untyped-def]
    results = [x.new_empty(x.shape) for x in (u, delta, A, B, C)]
    return *results, u.new_empty(0) if D is None else D.new_empty(D.shape)


@hidden_attention.register_fake
def _(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged, row_weight, col_weight, fold):  # type: ignore[no-untyped-def]
    return u.new_empty(attention_shape(u, read_order, tokens, merged, fold), dtype=torch.float32)


@scan_and_attention.register_fake
def _(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame, merged, fold):  # type: ignore[no-untyped-def]
    shapes = y_shape(u, read_order, tokens, merged), attention_shape(u, read_order, tokens, merged, fold)
    return tuple(u.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _through_y(ctx: Any, gradient: Tensor | None) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D through y."""
    record = (*ctx.saved_tensors[:SOURCES], *ctx.fields)
    if gradient is None:
        return [None] * 6
    *five, skip = selective_scan_backward(gradient, *record, ctx.merged)
    return [*five, None if record[5] is None else skip]


def _scan_gradient(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_through_y(ctx, gradient), *REST, None


def _both_gradients(ctx: Any, of_y: Tensor | None, of_attention: Tensor | None) -> tuple[Tensor | None, ...]:
    pairs = zip(_through_y(ctx, of_y), through_attention(ctx, of_attention)[:6], strict=True)
    six = [b if a is None else a if b is None else a + b for a, b in pairs]
    return *six, *REST, None, None


selective_scan.register_autograd(_scan_gradient, setup_context=keep)
hidden_attention.register_autograd(attention_gradient, setup_context=keep)
scan_and_attention.register_autograd(_both_gradients, setup_context=keep)
