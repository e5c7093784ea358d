"""The interface of every backend."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import reference
from mamba_attn.ops.arguments import Weights, pick


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

    def hidden_attentions(
        self, record: ScanRecord, weights: Sequence[Weights], folds: Sequence[str], merged: bool
    ) -> list[Tensor]:
        """Return several matrices of one record, as ``hidden_attention`` does; here one after the other."""
        return [self.hidden_attention(record, *its, fold, merged) for its, fold in zip(weights, folds, strict=True)]

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
        return by_route(
            record,
            (row_weight, col_weight),
            merged,
            lambda part, its: self.backend.hidden_attention(part.in_scan_order(), *its, fold, merged=False),
        )


def merge(record: ScanRecord, matrices: Tensor) -> Tensor:
    """Return the sum of the routes' matrices in the token frame: ``reference.merge``, without copies of text."""
    return _scaled(record, matrices) if _in_line(record) else reference.merge(record, matrices)


def merge_tokens(record: ScanRecord, values: Tensor) -> Tensor:
    """Return the sum of the routes' values in the token frame: ``reference.merge_tokens``, without copies of text."""
    return _scaled(record, values) if _in_line(record) else reference.merge_tokens(record, values)


def _scaled(record: ScanRecord, values: Tensor) -> Tensor:
    return values[:, 0] if record.scale == 1 else values[:, 0] * record.scale


def _in_line(record: ScanRecord) -> bool:
    """Whether one route walks the tokens one after the other; looked at where that waits for no device."""
    orders = record.read_order, record.write_order
    if record.routes > 1 or record.length != record.tokens or any(x.ndim > 2 or not x.is_cpu for x in orders):
        return False
    if torch.compiler.is_compiling():
        return False
    line = torch.arange(record.length)
    return all(torch.equal(x[0], line) for x in {id(x): x for x in orders}.values())


def by_route(
    record: ScanRecord, weights: Weights, merged: bool, matrix: Callable[[ScanRecord, Weights], Tensor]
) -> Tensor:
    """Compute one route's matrix after the other: when they merge, those of all routes are never held at once.

    Args:
        record: all routes.
        weights: of rows and columns, in scan order.
        merged: as in ``Backend.hidden_attention``, whose result this returns.
        matrix: of one route, in scan order: (batch, 1, [channels,] length, length).
    """
    results: list[Tensor] = []
    for route in range(record.routes):
        own = slice(route, route + 1)
        part = record.select_routes(own)
        found = matrix(part, pick(weights, slice(None), own))
        results.append(merge(part, found) if merged else found)
        if merged and route:
            results = [results[0] + results[1]]
    return results[0] if merged or len(results) == 1 else torch.cat(results, dim=1)
