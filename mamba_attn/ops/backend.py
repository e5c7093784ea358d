"""The interface of every backend."""

from abc import ABC, abstractmethod

from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.reference import merge, merge_tokens


class Backend(ABC):
    """An implementation of the operators; with ``merged=False`` results are in scan order, one per route."""

    gathers_weights = False  # whether it takes weights (batch, channels, tokens) as they are when routes merge
    takes_any_orders = False  # whether images may walk different orders, and steps may have no token

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
        """Return the results of ``selective_scan`` and ``hidden_attention``."""
        return self.selective_scan(record, merged), self.hidden_attention(record, None, None, fold, merged)


class InScanOrder(Backend):
    """A backend for records whose images walk different orders, or whose steps may have no token.

    It runs the backend in scan order, without orders, and scatters the results to each image's tokens.

    Args:
        backend: the backend that runs.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def unavailable(self, record: ScanRecord) -> str | None:
        """Return why the backend cannot take this record, or None."""
        return self.backend.unavailable(record)

    def selective_scan(self, record: ScanRecord, merged: bool) -> Tensor:
        """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
        y = self.backend.selective_scan(record.in_scan_order(), merged=False)
        return merge_tokens(record, y) if merged else y

    def hidden_attention(
        self, record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
    ) -> Tensor:
        """(batch, [channels,] tokens, tokens) merged, else (batch, routes, [channels,] length, length)."""
        if not merged:
            return self.backend.hidden_attention(record.in_scan_order(), row_weight, col_weight, fold, merged)
        total: Tensor | None = None
        for route in range(record.routes):  # one at a time: the matrices of all routes are never held at once
            own = slice(route, route + 1)
            part = record.select_routes(own)
            rows, columns = (None if weight is None else weight[:, own] for weight in (row_weight, col_weight))
            matrix = self.backend.hidden_attention(part.in_scan_order(), rows, columns, fold, merged=False)
            placed = merge(part, matrix)
            total = placed if total is None else total + placed
        if total is None:
            raise ValueError("hidden_attention: the record has no route.")
        return total
