"""Records as flat arguments of torch operators, and what these operators share: output shapes, gradients."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import blocked

SCHEMA = (  # of a record, at the front of every operator's arguments
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor read_order, Tensor write_order, "
    "SymInt tokens, float scale, str source_frame"
)
FIELDS = SCHEMA.count(",") + 1
SOURCES = SCHEMA.count("Tensor")
REST = (None,) * (FIELDS - 6)  # orders, tokens, scale, frame


def operator(
    name: str, rest: str, results: str, run: Callable[..., Any], fake: Callable[..., Any], first: str = ""
) -> Any:
    """Return ``run`` as an operator of torch; it takes ``first``, a record's flat arguments, then ``rest`` (a schema).

    ``fake`` returns empty tensors of the same shapes, for the compiler. An operator keeps the order of its arguments
    for ever: the compiler's caches on disk hold calls of it, and do not look at its schema.
    """
    schema = f"({first}{SCHEMA}, {rest}) -> {results}"
    made = torch.library.custom_op(f"mamba_attn::{name}", run, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


def unflatten(arguments: Sequence[Any]) -> tuple[ScanRecord, Sequence[Any]]:
    """Return the record at the front of an operator's arguments, and the other arguments."""
    u, delta, A, B, C, D, read_order, write_order, tokens, scale, source_frame = arguments[:FIELDS]
    record = ScanRecord(
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
    return record, arguments[FIELDS:]


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


def empty_y(*arguments: Any) -> Tensor:
    """Return a tensor of the shape of a scan's output, from an operator's arguments."""
    (u, *_), (routes, length), tokens, merged = arguments, arguments[6].shape, arguments[8], arguments[FIELDS]
    shape = (u.shape[0], u.shape[2], tokens) if merged else (u.shape[0], routes, u.shape[2], length)
    empty: Tensor = u.new_empty(shape, dtype=torch.float32)
    return empty


def empty_attention(*arguments: Any) -> Tensor:
    """Return a tensor of the shape of a folded matrix, from an operator's arguments."""
    (u, *_), (routes, length), tokens, merged = arguments, arguments[6].shape, arguments[8], arguments[FIELDS]
    kept = (u.shape[2],) if arguments[-1] == "each" else ()
    shape = (u.shape[0], *kept, tokens, tokens) if merged else (u.shape[0], routes, *kept, length, length)
    empty: Tensor = u.new_empty(shape, dtype=torch.float32)
    return empty


def _attention_backward(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of delta, A, B, C and the two weights by the blocked path; empty where not needed."""
    record, (merged, rows, columns, fold, needed) = unflatten(arguments)
    u = record.source_u
    stream = torch.cuda.current_stream(u.device) if u.is_cuda else None

    def run() -> list[Tensor | None]:
        with torch.cuda.stream(stream):
            return blocked.attention_gradients(record, (rows, columns), fold, merged, gradient, needed)

    with ThreadPoolExecutor(1) as other:  # autograd is off in an operator's own thread
        found = (u.new_empty(0) if x is None else x for x in other.submit(run).result())
    return tuple(x.contiguous() for x in found)  # as the fake kernel promises to inductor


def _no_gradients(gradient: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, rows, columns, _, needed = arguments[FIELDS:]
    u, *sources = arguments[:5]
    pairs = zip((*sources, rows, columns), needed, strict=True)
    return tuple(u.new_empty(0) if x is None or not need else x.new_empty(x.shape) for x, need in pairs)


SIX = f"({', '.join(['Tensor'] * 6)})"
WEIGHTED = "bool merged, Tensor? row_weight, Tensor? col_weight, str fold"
hidden_attention_backward = operator(
    "hidden_attention_backward",
    f"{WEIGHTED}, bool[] needed",
    SIX,
    _attention_backward,
    _no_gradients,
    first="Tensor gradient, ",
)


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
