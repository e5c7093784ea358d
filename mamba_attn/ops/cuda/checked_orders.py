"""The orders that kernels follow: looked at before anything is read or written where they point."""

from torch import Tensor

from mamba_attn.core.order_check import require_distinct
from mamba_attn.core.scan_record import ScanRecord


def checked_orders(record: ScanRecord, merged: bool) -> tuple[Tensor | None, Tensor | None]:
    """Tokens read and written at each step, where a kernel asks: int64, contiguous, on the tensors' device."""
    gathers = record.source_frame == "tokens"
    read = _checked(record, "read_order") if gathers or merged else None
    return read, _checked(record, "write_order") if merged else None


def _checked(record: ScanRecord, name: str) -> Tensor:
    """An order as kernels index with it; it may have been changed since the record was made."""
    order: Tensor = getattr(record, name)
    require_distinct(f"ScanRecord: {name}", order, record.tokens)
    return order.to(record.source_delta.device).long().contiguous()
