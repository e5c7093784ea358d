"""The hidden states of a selective scan, computed only for the requested routes and channels."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import Call, as_record, working_dtype
from mamba_attn.ops.backend import Backend
from mamba_attn.ops.blocked import Channels, per_channel
from mamba_attn.ops.dispatch import choose, require_bytes

_WORKSPACE = 2**22  # elements of one temporary


def scan_states(
    u: Tensor | ScanRecord,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    *,
    routes: int | Iterable[int] | None = None,
    channels: int | Iterable[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the hidden state after every step: h = exp(delta A) h + delta B u (arXiv 2312.00752, eq. 2, Euler for B).

    Time is linear in length. ``reference.states`` computes the same step by step. C . h + D u is the scan's output.

    Args:
        u: (batch, channels, length) or (batch, routes, channels, length); or a ScanRecord in place of all tensors.
        delta: like u, after bias and softplus.
        A: (channels, states) or (routes, channels, states), negative; states may be 1 and shared.
        B: (batch, states, length) or (batch, routes, states, length); with groups before the states too.
        routes: the number of one route, or several. Default: all.
        channels: the number of one channel, or several. Default: all.
        backend: see ``hidden_attention``.

    Returns:
        (batch, routes, channels, states, length) in scan order, routes and channels in the order given;
        of tensors without an axis of routes (batch, channels, states, length). float64 if an input is, else float32.

    Raises:
        ValueError: shapes that disagree, A >= 0, a route or channel out of range, an unknown backend.
        MatrixTooLargeError: the states would not fit into memory.
        BackendUnavailableError: the requested backend cannot run.

    Example:
        >>> u, delta, A, B = torch.randn(2, 8, 5), torch.rand(2, 8, 5), -torch.ones(8, 4), torch.randn(2, 4, 5)
        >>> scan_states(u, delta, A, B, channels=[0, 3]).shape
        torch.Size([2, 2, 4, 5])
    """
    call = _call(u, delta, A, B)
    chosen_routes = _indices(call, "routes", routes, call.record.routes)
    chosen_channels = _indices(call, "channels", channels, call.record.channels)
    record = _of_channels(call.record, chosen_channels)
    shape = (record.batch, len(chosen_routes), len(chosen_channels), record.states, record.length)
    _require_memory(call, shape)
    found = [_route(record.select_routes(slice(route, route + 1)), call, backend) for route in chosen_routes]
    states = found[0] if len(found) == 1 else torch.cat(found, dim=1)
    return states if call.merged or call.route_axis else states.squeeze(1)


def _call(u: Tensor | ScanRecord, delta: Tensor | None, A: Tensor | None, B: Tensor | None) -> Call:
    if not isinstance(u, ScanRecord):
        if not isinstance(delta, Tensor):
            raise TypeError(f"scan_states: delta must be a floating-point tensor, got {type(delta).__name__}.")
        return as_record("scan_states", u, delta, A, B, B)  # the states do not depend on C
    given = {"delta": delta, "A": A, "B": B}
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise TypeError(f"scan_states(ScanRecord): the record already holds {', '.join(extra)}; leave them out.")
    return as_record("scan_states", None, u, None, None, None)


def _indices(call: Call, name: str, wanted: int | Iterable[int] | None, size: int) -> list[int]:
    if wanted is None:
        return list(range(size))
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < size:
            raise ValueError(f"{call.text}: {name}={wanted!r}: {index!r} must be an integer in 0..{size - 1}.")
    if not indices:
        raise ValueError(f"{call.text}: {name}={wanted!r} is empty; leave it out for all {size}.")
    return indices


def _of_channels(record: ScanRecord, channels: list[int]) -> ScanRecord:
    """Return the record of some channels, each with its own head; B stays shared if there is one group."""
    if channels == list(range(record.channels)):
        return record
    index = torch.tensor(channels, device=record.source_u.device)
    heads = index // (record.channels // record.heads)
    groups = record.source_B.shape[2]
    B = record.source_B if groups == 1 else record.source_B[:, :, index // (record.channels // groups)]
    gain = None if record.source_gain is None else record.source_gain[:, :, heads]
    return record.replace(
        source_u=record.source_u[:, :, index],
        source_delta=record.source_delta[:, :, heads],
        A=record.A[:, heads],
        source_B=B,
        source_C=B,
        D=None,
        source_gain=gain,
        gate=None,
    )


def _require_memory(call: Call, shape: tuple[int, ...]) -> None:
    needed = torch.Size(shape).numel() * working_dtype(call.record).itemsize
    what = f"{call.text}: the states {shape} of (batch, routes, channels, states, length)"
    require_bytes(what, needed, call.record.source_delta.device, "Choose fewer routes= or channels=.")


def _route(record: ScanRecord, call: Call, backend: str | None) -> Tensor:
    """States of one route, channel block by channel block: (batch, 1, channels, states, length)."""
    part, u = per_channel(record, working_dtype(record)), record.u
    size = max(1, _WORKSPACE // (record.batch * record.states * record.length))
    blocks: list[Tensor] = []
    whole: Tensor | None = None
    for start in range(0, record.channels, size):
        own = slice(start, start + size)
        block = part.block(own)
        single = _one_state_per_channel(u[:, :, own].to(block.delta.dtype), block)
        chosen: Backend = choose(Call(single, False, True, call.text), backend)
        found: Tensor = chosen.selective_scan(single, merged=False).unflatten(2, (-1, record.states))
        if size >= record.channels:
            return found
        if found.requires_grad:
            blocks.append(found)
            continue
        if whole is None:
            whole = found.new_empty(*found.shape[:2], record.channels, *found.shape[3:])
        whole[:, :, own] = found
    return torch.cat(blocks, dim=2) if whole is None else whole


def _one_state_per_channel(u: Tensor, block: Channels) -> ScanRecord:
    """The scan whose output is the state: a channel per channel and state, its input B u, its own B and C one."""
    batch, _, channels, length = u.shape
    states = block.A.shape[-1]

    def steps(x: Tensor) -> Tensor:
        return x.unsqueeze(3).expand(-1, -1, -1, states, -1).flatten(2, 3)

    one = u.new_ones(()).expand(batch, 1, 1, 1, length)
    inputs, A = (u.unsqueeze(3) * block.B).flatten(2, 3), block.A.reshape(1, channels * states, 1)
    gain = None if block.gain is block.delta else steps(block.gain)
    return ScanRecord.from_scan(inputs, steps(block.delta), A, one, one, gain=gain)
