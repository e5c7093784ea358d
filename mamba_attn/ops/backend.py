"""What every backend offers."""

from abc import ABC, abstractmethod

from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord


class Backend(ABC):
    """One way to run the operators; every result of ``merged=False`` is in scan order, one per route."""

    gathers_weights = False  # whether it takes weights (batch, channels, tokens) as they are when routes merge

    @abstractmethod
    def unavailable(self, record: ScanRecord) -> str | None:
        """Return why this backend cannot take the record here, or None."""

    @abstractmethod
    def selective_scan(self, record: ScanRecord, merged: bool) -> Tensor:
        """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""

    @abstractmethod
    def hidden_attention(
        self, record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
    ) -> Tensor:
        """(batch, [channels,] tokens, tokens) merged, else (batch, routes, [channels,] length, length)."""

    def scan_and_attention(self, record: ScanRecord, fold: str, merged: bool) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.selective_scan(record, merged), self.hidden_attention(record, None, None, fold, merged)
