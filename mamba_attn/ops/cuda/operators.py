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
    SIX,
    SOURCES,
    WEIGHTED,
    attention_gradient,
    empty_attention,
    empty_y,
    keep,
    operator,
    through_attention,
    unflatten,
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


def _scan(*arguments: Any) -> Tensor:
    """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
    record, (merged,) = unflatten(arguments)
    with remedy(record):
        return kernels.scan(launcher, record, merged)


def _scan_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C and D (empty without D), in their shapes and types."""
    record, (merged,) = unflatten(arguments)
    with remedy(record):
        *five, skip = kernels.backward(launcher, record, gradient, merged)
    u, *_, D = arguments[:6]
    results = (x.to(source.dtype) for x, source in zip(five, arguments[:5], strict=True))
    return *results, u.new_empty(0) if skip is None or D is None else skip.to(D.dtype)


def _attention(*arguments: Any) -> Tensor:
    """Return the folded matrix of a record; of u it only uses the shape."""
    record, (merged, rows, columns, fold) = unflatten(arguments)
    with remedy(record):
        return kernels.attention(launcher, record, (rows, columns), fold, merged)[1]


def _scan_and_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return y and the folded matrix, from one launch."""
    record, (merged, fold) = unflatten(arguments)
    with remedy(record):
        y, attention = kernels.attention(launcher, record, (None, None), fold, merged, with_y=True)
    return record.source_u.new_empty(0) if y is None else y, attention


def _empty_gradients(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *five, D = arguments[:6]
    results = (x.new_empty(x.shape) for x in five)
    return *results, five[0].new_empty(0) if D is None else D.new_empty(D.shape)


def _empty_y_and_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_y(*arguments), empty_attention(*arguments)


selective_scan = operator("selective_scan", "bool merged", "Tensor", _scan, empty_y)
selective_scan_backward = operator(
    "selective_scan_backward", "bool merged", SIX, _scan_backward, _empty_gradients, first="Tensor gradient, "
)
hidden_attention = operator("hidden_attention", WEIGHTED, "Tensor", _attention, empty_attention)
scan_and_attention = operator(
    "scan_and_attention", "bool merged, str fold", "(Tensor, Tensor)", _scan_and_attention, _empty_y_and_attention
)


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
