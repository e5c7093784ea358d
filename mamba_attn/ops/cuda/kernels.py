"""From a record to launches: which kernel, how many blocks, how much memory, and its arguments.

Runs on whatever the launcher runs on; the tests' launcher takes CPU tensors.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mamba_attn.core.order_check import require_distinct
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import Weights
from mamba_attn.ops.cuda.driver import GRID_LIMIT
from mamba_attn.ops.cuda.kernel_args import (
    READ,
    STEP,
    WRITE,
    CBackward,
    CCall,
    CLine,
    CTensor,
    by_head,
    call,
    call_of_heads,
    output,
    supported,
    tensor,
)
from mamba_attn.ops.cuda.launcher import Launcher

_FOLDS = {"sum": 0, "mean": 0, "positive": 1, "absolute": 2, "each": 3}
_SIGNED = ("sum", "mean")
# as in cuda/*.cuh
_CHANNELS, _STATES, _INNER, _SPAN = 16, 16, 16, 128
_SCAN_THREADS, _BACKWARD_THREADS, _LINE_THREADS, _LINE_CHANNELS = 256, 256, 256, 64
_TILES = {  # steps, threads
    "attention_direct": (64, 128),
    "attention_factored_64": (64, 128),
    "attention_factored_128": (128, 512),
}
_HEADS, _CHUNK, _CHUNK_THREADS, _SLICE = "attention_heads", 64, 128, 64
_FEW = 256  # channels of a head x states below which a scan state by state is the faster one
_SHARED_BACKWARD = 2 * _BACKWARD_THREADS // 32 * _SPAN * 4
_SHARED_LINE = 8 * _LINE_CHANNELS + _LINE_THREADS // 32 * _SPAN * 4 + 4
_ROWS = ("source_u", "source_delta", "source_B", "source_C")
_SHORT, _LONG = 16, 512  # lengths below which pairs are few, and from which large tiles are full
_THREADS_PER_MULTIPROCESSOR = 1024  # target for attention blocks, if channels can be split among them

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def limits(record: ScanRecord, launcher: Launcher) -> str | None:
    """Return why the kernels cannot run a record of this size, or None."""
    limit = launcher.shared_limit(record.source_delta.device)
    needed = max(_SHARED_BACKWARD + 64 * record.states, _scan_shared(record.states, _SCAN_THREADS))
    if needed > limit:
        return (
            f"{record.states} states need {needed:,} bytes of shared memory per block and this GPU has {limit:,}; use "
            "backend='blocked'."
        )
    far = next((name for name in _ROWS if _row_bytes(getattr(record, name)) >= 2**32), None)
    if far is not None:
        name = far.removeprefix("source_")
        return (
            f"{name} spans {2**32:,} bytes or more from its first position to its last, more than the kernels count; "
            f"pass {name}.contiguous(), or use backend='blocked'."
        )
    blocks = record.batch * record.routes * (record.channels + _pairs(record, 64))
    if blocks > GRID_LIMIT or record.tokens > GRID_LIMIT:
        return (
            f"{record.batch} images x {record.routes} routes x {record.channels} channels x {record.length} steps need "
            f"more than {GRID_LIMIT:,} blocks; split the batch, or use backend='blocked'."
        )
    return None


def formulation(record: ScanRecord, fold: str, shared_limit: int) -> str:
    """Return the name of the kernel with the lowest operation count.

    Heads whose states share their decay have a kernel of their own. Folds that are not linear need every channel's
    entries, pair by pair. Tiles of 128 steps need half the exponentials of tiles of 64, but a short sequence leaves
    them empty.
    """
    if shares_matrices(record) and _chunk_shared(record.states) <= shared_limit:
        return _HEADS
    if fold not in _SIGNED or record.length <= _SHORT:
        return "attention_direct"
    fits = _attention_shared("attention_factored_128", record.states) <= shared_limit
    return "attention_factored_128" if record.length >= _LONG and fits else "attention_factored_64"


def shares_matrices(record: ScanRecord) -> bool:
    """Whether states share their decay, so that a head has one matrix C B^T times decays, as in Mamba-2."""
    several = record.heads < record.channels or record.states > 1
    return record.A.shape[2] == 1 and several and record.heads % record.source_B.shape[2] == 0


def scan(launcher: Launcher, record: ScanRecord, merged: bool, kernel: str | None = None) -> Tensor:
    """y: (batch, channels, tokens) merged, else (batch, routes, channels, length).

    Args:
        launcher: runs the kernels.
        record: the scan.
        merged: routes summed in the token frame, times the record's scale.
        kernel: "selective_scan", state by state, or "attention_heads", by chunks, for records that share matrices.
            Default: the one with the lower operation count.
    """
    y = _new_y(record, merged)
    if kernel is None:
        work, fits = record.channels // record.heads * record.states, launcher.shared_limit(y.device)
        by_chunks = shares_matrices(record) and work >= _FEW and _chunk_shared(record.states) <= fits
        kernel = _HEADS if by_chunks else "selective_scan"
    for part, read, write in _parts(record, merged):
        if kernel == _HEADS:
            args = call_of_heads(part, read, write)
            _ask_for_y(args, record, y, merged)
            launcher.launch(kernel, _chunk_blocks(args), _CHUNK_THREADS, _chunk_shared(part.states), args, y.device)
            continue
        args = call(part, read, write)
        _ask_for_y(args, record, y, merged)
        shared = _scan_shared(part.states, _SCAN_THREADS)
        launcher.launch("selective_scan", _scan_blocks(args, _SCAN_THREADS), _SCAN_THREADS, shared, args, y.device)
    return y


def attention(
    launcher: Launcher,
    record: ScanRecord,
    weights: Weights,
    fold: str,
    merged: bool,
    with_y: bool = False,
    kernel: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """y, when wanted, and (batch, [channels,] tokens, tokens) merged, else (batch, routes, [channels,] length, length).

    Args:
        launcher: runs the kernels.
        record: the scan.
        weights: of rows and columns: None, (batch, routes, channels, length) or, merged, (batch, channels, tokens).
        fold: see ``hidden_attention``.
        merged: routes summed in the token frame, times the record's scale.
        with_y: also return the scan's output, from the same launch.
        kernel: name of a formulation. Default: chosen by ``formulation``.
    """
    device = record.source_delta.device
    kernel = kernel or formulation(record, fold, launcher.shared_limit(device))
    y = _new_y(record, merged) if with_y else None
    side = record.tokens if merged else record.length
    axes = (*(() if merged else (record.routes,)), *((record.channels,) if fold == "each" else ()))
    out = torch.zeros(record.batch, *axes, side, side, device=device)
    start = 0
    for part, read, write in _parts(record, merged):
        own = slice(start, start + part.routes)
        start = own.stop
        args = (call_of_heads if kernel == _HEADS else call)(part, read, write)
        rows, columns = (
            _weight(weight, own, frame, args.width) for weight, frame in zip(weights, (WRITE, READ), strict=True)
        )
        args.row_weight, args.col_weight = rows[1], columns[1]
        if y is not None:
            _ask_for_y(args, record, y, merged)
        _launch_attention(launcher, kernel, args, part, out, fold, merged, several=merged and record.routes > 1)
    return y, out


def backward(launcher: Launcher, record: ScanRecord, gradient: Tensor, merged: bool) -> Gradients:
    """Gradients of y with respect to source_u, source_delta, A, source_B, source_C and D, float32, in their shapes."""
    gradient = _close(gradient if gradient.dtype != torch.float64 else gradient.float())
    detached = record.map_tensors(torch.Tensor.detach)
    sources = (detached.source_u, detached.source_delta, detached.A, detached.source_B, detached.source_C, detached.D)
    results = [None if x is None else torch.zeros(x.shape, device=x.device) for x in sources]
    u, delta, A, B, C, D = results
    read, write = _checked_orders(record, merged)
    spans = math.ceil(record.length / _SPAN)
    entering = gradient.new_empty(
        (record.batch, record.routes, record.channels, spans, record.states), dtype=torch.float32
    )
    frame = READ if record.source_frame == "tokens" else STEP
    of_routes = {"u": detached.source_u, "delta": detached.source_delta}
    shared = {name: x.shape[1] < record.routes for name, x in of_routes.items()}
    channels, states = ("batch", "route", "axis", "position"), ("batch", "route", "group", "axis", "position")
    job = CBackward(
        call=call(detached, read, write),
        gradient=tensor(gradient, ("batch", "axis", "position"), WRITE) if merged else tensor(gradient, channels),
        u=output(u, channels, frame, add=shared["u"]),
        delta=output(delta, channels, frame, add=shared["delta"] or record.heads < record.channels),
        A=output(A, ("route", "group", "position"), add=True),
        B=output(B, states, frame, add=True),
        C=output(C, states, frame, add=True),
        D=output(D, ("route", "axis"), add=True),
        entering=entering.data_ptr(),
    )
    job.call.y_scale = record.scale if merged else 1.0
    groups, warps = record.source_B.shape[2], _BACKWARD_THREADS // 32
    blocks = record.batch * record.routes * groups * math.ceil(record.channels // groups / warps)
    shared_bytes = _SHARED_BACKWARD + 2 * warps * record.states * 4
    launcher.launch("selective_scan_backward", blocks, _BACKWARD_THREADS, shared_bytes, job, gradient.device)
    return tuple(results)  # type: ignore[return-value]


def attention_line(
    launcher: Launcher, record: ScanRecord, axis: str, index: int, weights: Weights, fold: str, merged: bool
) -> Tensor:
    """One line of ``attention``: (batch, [channels,] tokens) merged, else (batch, routes, [channels,] length)."""
    size = record.tokens if merged else record.length
    kept = (*(() if merged else (record.routes,)), *((record.channels,) if fold == "each" else ()))
    out = torch.zeros(record.batch, *kept, size, device=record.source_delta.device)
    start = 0
    for part, read, write in _parts(record, merged):
        own = slice(start, start + part.routes)
        start = own.stop
        rows, columns = (_weight(weight, own, frame, 1) for weight, frame in zip(weights, (WRITE, READ), strict=True))
        args = call(part, read, write)
        args.row_weight, args.col_weight = rows[1], columns[1]
        axes = ("batch", *(() if merged else ("route",)), *(("group",) if fold == "each" else ()), "position")
        frame = (READ if axis == "row" else WRITE) if merged else STEP
        several = (fold != "each" and record.channels > _LINE_CHANNELS) or (merged and record.routes > 1)
        args.attention = output(out, axes, frame, add=several)
        args.fold, args.attention_scale = _FOLDS[fold], _scale(record, fold, merged)
        parts = math.ceil(part.channels / _LINE_CHANNELS)
        together = 1 if deterministic() and fold != "each" else parts
        for first in range(0, parts, together):
            line = CLine(call=args, first=first * _LINE_CHANNELS, index=index, column=axis == "column", token=merged)
            blocks = part.batch * part.routes * together
            launcher.launch("attention_line", blocks, _LINE_THREADS, _SHARED_LINE, line, out.device)
    return out


def _launch_attention(
    launcher: Launcher, kernel: str, args: CCall, part: ScanRecord, out: Tensor, fold: str, merged: bool, several: bool
) -> None:
    """``several``: other routes add to the same entries, in this launch or in another."""
    tile, threads = _TILES.get(kernel, (_CHUNK, _CHUNK_THREADS))
    device = out.device
    tiles = part.batch * part.routes * _pairs(part, tile)
    wanted = launcher.multiprocessors(device) * _THREADS_PER_MULTIPROCESSOR // threads
    splits = 1 if deterministic() else max(1, min(math.ceil(args.channels / _CHANNELS), wanted // tiles))
    axes = (*(() if merged else ("route",)), *(("group",) if fold == "each" else ()), "axis", "position")
    add = several or (splits > 1 and fold != "each")
    args.attention = output(out, ("batch", *axes), READ if merged else STEP, add)
    args.fold, args.splits, args.products = _FOLDS[fold], splits, 1 if _tf32() else 3
    args.attention_scale = _scale(part, fold, merged)
    if kernel == _HEADS and fold != "each" and not args.row_weight.data and not args.col_weight.data:
        args.attention_scale *= args.width  # channels with one and the same matrix
    scanning = 0 if not args.y.data else _chunk_blocks(args) if kernel == _HEADS else _scan_blocks(args, threads)
    shared_bytes = _attention_shared(kernel, part.states)
    launcher.launch(kernel, scanning + tiles * splits, threads, shared_bytes, args, device)


def _attention_shared(kernel: str, states: int) -> int:
    """Return a block's shared bytes: staging and, where there are products, a slab; or its warps' states in a scan."""
    tile, threads = _TILES.get(kernel, (_CHUNK, _CHUNK_THREADS))
    sides = 2 * tile
    stage = 12 * _CHANNELS * (sides + 2) + 4 * (_STATES + 1) * sides + 8 * _CHANNELS * _STATES
    slab = 0 if kernel == "attention_direct" else 8 * _INNER * (sides + 4)
    results = 4 * (6 + sides + tile) if kernel == _HEADS else 0  # the tile's index, and where its results go
    return max(stage + slab + results, _chunk_shared(states) if kernel == _HEADS else _scan_shared(states, threads))


def _scan_blocks(args: CCall, threads: int) -> int:
    """Blocks of a scan state by state: a warp a channel, the channels of a block in one group."""
    return int(args.batch * args.routes * args.groups * math.ceil(args.per_group / (threads // 32)))


def _scan_shared(states: int, threads: int) -> int:
    """Return a block's shared bytes in such a scan: B and C of a span for some states, and its warps' states."""
    return 2 * 4 * min(states, _STATES) * 2 * _SPAN + threads // 32 * states * 4


def _chunk_blocks(args: CCall) -> int:
    """Blocks of a scan by chunks: one for each head, or for 64 of its channels."""
    return int(args.batch * args.routes * args.channels * math.ceil(args.width / _SLICE))


def _chunk_shared(states: int) -> int:
    """Return a block's shared bytes in a scan by chunks: a slab, what is known of its steps, and states."""
    return 8 * _INNER * (2 * _CHUNK + 4) + 4 * (7 * _CHUNK + 4) + 4 * states * _SLICE


def _ask_for_y(args: CCall, record: ScanRecord, y: Tensor, merged: bool) -> None:
    axes = (*(("batch",) if merged else ("batch", "route")), "axis", "group", "position")
    args.y = output(by_head(y, -2, args.width), axes, WRITE if merged else STEP, add=merged and record.routes > 1)
    args.y_scale = record.scale if merged else 1.0


def _new_y(record: ScanRecord, merged: bool) -> Tensor:
    shape = (
        (record.batch, record.channels, record.tokens)
        if merged
        else (record.batch, record.routes, record.channels, record.length)
    )
    if merged:
        return torch.zeros(shape, device=record.source_delta.device)
    return torch.empty(shape, device=record.source_delta.device)  # every step is written, where a token may be left out


def _weight(weight: Tensor | None, routes: slice, frame: int, width: int) -> tuple[Tensor | None, CTensor]:
    """Return a weight's tensor, to keep alive, and its argument; (batch, channels, tokens) is in the token frame.

    ``width``: channels of a kernel's channel.
    """
    if weight is None:
        return None, CTensor()
    weight = _close(weight.detach() if supported(weight) else weight.detach().float())
    if weight.ndim == 3:
        return weight, tensor(by_head(weight, 1, width), ("batch", "axis", "group", "position"), frame)
    weight = by_head(weight[:, routes], 2, width)
    return weight, tensor(weight, ("batch", "route", "axis", "group", "position"))


def _parts(record: ScanRecord, merged: bool) -> Iterator[tuple[ScanRecord, Tensor | None, Tensor | None]]:
    """Yield the record and its orders: all routes at once or, for deterministic sums, one by one."""
    record = record.map_tensors(torch.Tensor.detach)
    read, write = _checked_orders(record, merged)
    size = 1 if merged and deterministic() else record.routes
    for start in range(0, record.routes, size):
        own = slice(start, start + size)
        part = record if size == record.routes else record.select_routes(own)
        yield part, None if read is None else read[own], None if write is None else write[own]


def _checked_orders(record: ScanRecord, merged: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return tokens read and written at each step, where needed: int64, contiguous, on the tensors' device."""
    gathers = record.source_frame == "tokens"
    read = _checked_order(record, "read_order") if gathers or merged else None
    return read, _checked_order(record, "write_order") if merged else None


def _checked_order(record: ScanRecord, name: str) -> Tensor:
    """Return an order for kernels to index with, checked again: it may have changed since the record was made."""
    order: Tensor = getattr(record, name)
    require_distinct(f"ScanRecord: {name}", order, record.tokens)
    return order.to(record.source_delta.device).long().contiguous()


def deterministic() -> bool:
    """Whether torch must avoid algorithms whose results depend on timing."""
    strict = not torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and strict


def _tf32() -> bool:
    """Whether the user allows float32 matrix products in TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9: once it is set, the older attribute raises
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _scale(record: ScanRecord, fold: str, merged: bool) -> float:
    mean = record.channels if fold in ("mean", "positive", "absolute") else 1
    return (record.scale if merged else 1.0) / mean


def _close(x: Tensor) -> Tensor:
    """Return a tensor whose lines the kernels' offsets can count."""
    return x if _row_bytes(x) < 2**32 else x.contiguous()


def _row_bytes(x: Tensor) -> int:
    """Bytes from a line's first position to its last one."""
    return (x.shape[-1] - 1) * x.stride(-1) * x.element_size()


def _pairs(record: ScanRecord, tile: int) -> int:
    chunks = math.ceil(record.length / tile)
    return chunks * (chunks + 1) // 2
