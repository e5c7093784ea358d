"""Records as flat arguments of torch operators, and what these operators share: output shapes, gradients."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import blocked

SOURCES = 8  # tensors of a record, at the front of every operator's arguments
FIELDS = 11  # of a record
REST = (None,) * (FIELDS - 6)  # orders, tokens, scale, frame


def unflatten(
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
) -> ScanRecord:
    """Build the record from an operator's arguments."""
    return ScanRecord(
        source_u=u,
        source_delta=delta,
        A=A,
        source_B=B,
        source_C=C,
        D=D,
        read_order=read_order,
        write_order=write_order,
        tokens=tokens,
        scale=scale,
        source_frame=source_frame,
    )


def flatten(record: ScanRecord) -> tuple[Any, ...]:
    """Return a record as operator arguments; ``unflatten`` is the inverse."""
    return (
        record.source_u,
        record.source_delta,
        record.A,
        record.source_B,
        record.source_C,
        record.D,
        record.read_order,
        record.write_order,
        record.tokens,
        record.scale,
        record.source_frame,
    )


def flatten_for_matrix(record: ScanRecord) -> tuple[Any, ...]:
    """Like ``flatten``, but without D and the values of u: the matrix does not depend on them."""
    u, delta, A, B, C, _, *rest = flatten(record)
    return (u.detach(), delta, A, B, C, None, *rest)


def y_shape(u: Tensor, read_order: Tensor, tokens: int, merged: bool) -> Sequence[int | torch.SymInt]:
    """Return the shape of a scan's output."""
    routes, length = read_order.shape
    return (u.shape[0], u.shape[2], tokens) if merged else (u.shape[0], routes, u.shape[2], length)


def attention_shape(
    u: Tensor, read_order: Tensor, tokens: int, merged: bool, fold: str
) -> Sequence[int | torch.SymInt]:
    """Return the shape of a folded matrix."""
    routes, length = read_order.shape
    kept = (u.shape[2],) if fold == "each" else ()
    return (u.shape[0], *kept, tokens, tokens) if merged else (u.shape[0], routes, *kept, length, length)


@torch.library.custom_op("mamba_attn::hidden_attention_backward", mutates_args=())
def hidden_attention_backward(
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
    row_weight: Tensor | None,
    col_weight: Tensor | None,
    fold: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of delta, A, B, C and the two weights by the blocked path; empty where not needed."""
    record = unflatten(u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame)
    weights = (row_weight, col_weight)
    stream = torch.cuda.current_stream(u.device) if u.is_cuda else None

    def run() -> list[Tensor | None]:
        with torch.cuda.stream(stream):
            return blocked.attention_gradients(record, weights, fold, merged, gradient, needed)

    with ThreadPoolExecutor(1) as other:  # autograd is off in an operator's own thread
        found = (u.new_empty(0) if x is None else x for x in other.submit(run).result())
    a, b, c, d, e, f = (x.contiguous() for x in found)  # as the fake kernel promises to inductor
    return a, b, c, d, e, f


@hidden_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    gradient,
    u,
    delta,
    A,
    B,
    C,
    D,
    read_order,
    write_order,
    tokens,
    scale,
    source_frame,
    merged,
    row_weight,
    col_weight,
    fold,
    needed,
):
    sources = zip((delta, A, B, C, row_weight, col_weight), needed, strict=True)
    return tuple(u.new_empty(0) if x is None or not need else x.new_empty(x.shape) for x, need in sources)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors of a call and the rest of its arguments; unused outputs get no gradient."""
    ctx.set_materialize_grads(False)
    weights = inputs[FIELDS + 1 : FIELDS + 3] if len(inputs) > FIELDS + 2 else ()
    ctx.save_for_backward(*inputs[:SOURCES], *weights)
    ctx.fields, ctx.merged, ctx.fold = inputs[SOURCES:FIELDS], inputs[FIELDS], inputs[-1]


def through_attention(ctx: Any, gradient: Tensor | None) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D and the weights through the matrix, by the blocked path.

    The matrix does not depend on u and D.
    """
    if gradient is None:
        return [None] * 8
    weights = (*ctx.saved_tensors[SOURCES:], None, None)[:2]
    of_weights = ctx.needs_input_grad[FIELDS + 1 : FIELDS + 3] if len(ctx.needs_input_grad) > FIELDS + 2 else ()
    needed = [*ctx.needs_input_grad[1:5], *of_weights, False, False][:6]
    record = (*ctx.saved_tensors[:SOURCES], *ctx.fields)
    every = hidden_attention_backward(gradient, *record, ctx.merged, *weights, ctx.fold, needed)
    found = [value if need else None for value, need in zip(every, needed, strict=True)]
    return [None, *found[:4], None, *found[4:]]


def attention_gradient(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of every argument of an operator that returns the matrix alone."""
    *six, rows, columns = through_attention(ctx, gradient)
    return *six, *REST, None, rows, columns, None
