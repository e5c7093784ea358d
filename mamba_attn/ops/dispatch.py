"""Chooses the backend of a call: the one requested, or the fastest that can run it.

"native" and "blocked" fold channels that share a head's matrix per head, and "fused" does where the head's states share
their decay, as in Mamba-2. "reference" computes every channel's matrix by definition.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from mamba_attn.core.decisions import decided
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import BackendUnavailableError, MatrixTooLargeError
from mamba_attn.ops import blocked, reference
from mamba_attn.ops.arguments import Call, matrix_bytes, working_dtype
from mamba_attn.ops.backend import Backend, InScanOrder
from mamba_attn.ops.cpu import native
from mamba_attn.ops.cuda import fused


class _Reference(Backend):
    """The specification as a backend; computes in float64, returns the working type."""

    takes_any_orders = True

    def unavailable(self, record: ScanRecord) -> str | None:
        return None

    def selective_scan(self, record: ScanRecord, merged: bool) -> Tensor:
        y = reference.selective_scan(record)
        return (reference.merge_tokens(record, y) if merged else y).to(working_dtype(record))

    def hidden_attention(
        self, record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
    ) -> Tensor:
        attention = reference.hidden_attention(record, row_weight, col_weight, fold)
        return (reference.merge(record, attention) if merged else attention).to(working_dtype(record))


BACKENDS: dict[str, Backend] = {
    "reference": _Reference(),
    "blocked": blocked.BACKEND,
    "native": native.BACKEND,
    "fused": fused.BACKEND,
}
_UNASKED = 2**26  # bytes to allocate without checking free memory, which takes longer than a small layer
_FASTEST_FIRST = ("fused", "native", "blocked")
_OF_PYTORCH = ("blocked", "reference")  # of PyTorch's own operations alone, which torch.func can transform


def choose(call: Call, backend: str | None) -> Backend:
    """Return the backend of a call.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: the requested backend cannot run; there is no fallback.
    """
    if backend is None:
        device, reasons = call.record.source_delta.device, []
        for name in _FASTEST_FIRST:
            reason = _why_not(name, call.record)
            if not reason:
                break
            if name != "fused" or device.type != "cpu":  # nobody expects that one there
                reasons.append(f"; not {name}, for {reason}")
        decided("operators on %s: backend %s%s", device, name, "".join(reasons))
        return _for_orders(BACKENDS[name], call.record)
    if backend not in BACKENDS:
        raise ValueError(f"{call.text}: backend={backend!r} is not one of {tuple(BACKENDS)}.")
    reason = _why_not(backend, call.record)
    if reason:
        raise BackendUnavailableError(f"{call.text}: backend={backend!r} was requested, but {reason}")
    return _for_orders(BACKENDS[backend], call.record)


def _why_not(backend: str, record: ScanRecord) -> str | None:
    """Why a backend cannot run here; None if it can."""
    if backend not in _OF_PYTORCH and torch._C._are_functorch_transforms_active():
        return "torch.func cannot transform it; leave backend= out, or give 'blocked'."
    return BACKENDS[backend].unavailable(record)


def _for_orders(backend: Backend, record: ScanRecord) -> Backend:
    return backend if backend.takes_any_orders or record.shares_orders else InScanOrder(backend)


def require_memory(call: Call, fold: str) -> None:
    """Refuse a dense matrix that would not fit into memory, before allocating anything.

    Raises:
        MatrixTooLargeError: it would not fit; the message gives the bytes and the linear-memory alternative.
    """
    record = call.record
    side = record.tokens if call.merged else record.length
    require_bytes(
        f"{call.text}: the dense attention matrix ({record.batch} images, {side} x {side}, fold={fold!r})",
        matrix_bytes(record, fold, call.merged),
        record.source_delta.device,
        "Rows, columns and products take linear memory: attention_row, attention_column, left_product, right_product.",
    )


def require_bytes(what: str, needed: int, device: torch.device, remedy: str) -> None:
    """Refuse what would not fit into a device's memory; small sizes pass unchecked.

    Args:
        what: name of what needs the memory, for the message.
        needed: bytes.
        device: where to allocate.
        remedy: a sentence that ends the message.

    Raises:
        MatrixTooLargeError: fewer bytes are free.

    Example:
        >>> require_bytes("a small matrix", 1024, torch.device("cpu"), "use rows")  # raises where memory is short
    """
    free = free_bytes(device) if needed > _UNASKED else None
    if free is not None and needed > free:
        raise MatrixTooLargeError(f"{what} needs {needed:,} bytes, {free:,} are free on {device}. {remedy}")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on a device, in bytes; None when the system does not say.

    Args:
        device: a CPU, or a CUDA device.

    Example:
        >>> free = free_bytes(torch.device("cpu"))
        >>> free is None or free > 0
        True
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    limits = [limit for limit in (_meminfo_available(), _cgroup_available()) if limit is not None]
    return min(limits, default=None)


def _meminfo_available() -> int | None:
    if not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as lines:
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kilobytes["MemAvailable"] * 1024


def _cgroup_available() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics.get("inactive_file", 0))  # the page cache gives way
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return None
