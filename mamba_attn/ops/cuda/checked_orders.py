"""The orders that kernels follow: checked before anything is read or written where they point."""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mamba_attn.core.scan_record import ScanRecord

_SEEN: MutableMapping[Tensor, tuple[int, int]] = WeakIdKeyDictionary()


def checked_orders(record: ScanRecord, merged: bool) -> tuple[Tensor | None, Tensor | None]:
    """Tokens read and written at each step, where a kernel asks: int64, contiguous, on the tensors' device."""
    gathers = record.source_frame == "tokens"
    read = _checked(record, "read_order") if gathers or merged else None
    return read, _checked(record, "write_order") if merged else None


def _checked(record: ScanRecord, name: str) -> Tensor:
    """An order whose tokens exist; one that was looked at before is not looked at again: that waits for the GPU."""
    order: Tensor = getattr(record, name)
    state = None if order.is_inference() else (record.tokens, order._version)  # which inference tensors have not
    if not capturing(order) and (state is None or _SEEN.get(order) != state):
        smallest, largest = (int(end) for end in order.aminmax())
        if smallest < 0 or largest >= record.tokens:
            raise ValueError(
                f"ScanRecord: {name} visits {smallest}..{largest}, but there are {record.tokens} tokens; pass tokens= "
                "too."
            )
        if state is not None:
            _SEEN[order] = state
    return order.to(record.source_delta.device).long().contiguous()


def capturing(order: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which must not wait; kernels skip what does not exist anyway."""
    return order.is_cuda and torch.cuda.is_current_stream_capturing()
