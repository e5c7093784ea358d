"""Folds heads whose channels share one matrix, as in Mamba-2, head by head instead of channel by channel.

The channels of one head and one group, a *unit*, have one matrix M_h; only their weights r and k differ. With
W_h[i, j] = sum_c r_c[i] k_c[j] over a unit's channels,

    sum_c r_c[i] M_c[i, j] k_c[j] = sum_h M_h[i, j] W_h[i, j].

Where states share their decay too, M_h[i, j] = G[i, j] E_h[i, j] (arXiv 2405.21060): G[i, j] = C_i . B_j is one product
per group, and E_h[i, j] = exp(A_h (S_h[i] - S_h[j])) gain_h[j] the matrix of a scan with one state and B = C = 1.
|.| and max(., 0) of such products are products of their factors' parts. A row is a matrix of one row.
"""

from collections.abc import Callable
from functools import partial, reduce
from math import gcd

import torch
from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import Weights, pick, working_dtype
from mamba_attn.ops.backend import by_route

Run = Callable[[ScanRecord, Weights, str], Tensor]
_WORKSPACE = 2**20  # elements of one temporary
_ALL = slice(None)
_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x,
    "absolute": lambda x: x.abs(),
    "positive": lambda x: x.clamp(min=0),
    "negative": lambda x: (-x).clamp(min=0),
}


def unit_width(record: ScanRecord) -> int:
    """Return how many channels share a matrix: those of one head and one group."""
    return gcd(record.channels // record.heads, record.channels // record.source_B.shape[2])


def as_units(record: ScanRecord, width: int) -> ScanRecord:
    """Return a record of every ``width``-th channel, each with a head of its own."""
    if record.heads == record.channels:
        return record
    delta, A, gain = _repeated(
        record.channels // record.heads // width, record.source_delta, record.A, record.source_gain
    )
    D = None if record.D is None else record.D[:, ::width]
    gate = None if record.gate is None else record.gate[:, ::width]
    u = record.source_u[:, :, ::width]
    return record.replace(source_u=u, source_delta=delta, A=A, D=D, source_gain=gain, gate=gate)


def per_unit(record: ScanRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Return delta, gain (batch, routes, units, length) and A (routes, units, states or 1) in scan order."""
    repeats = record.channels // record.heads // unit_width(record)
    own = None if record.source_gain is None else record.gain
    delta, A, gain = _repeated(repeats, record.delta, record.A, own)
    return delta, delta if gain is None else gain, A


def by_group(record: ScanRecord) -> list[ScanRecord]:
    """Return a record for each group of B and C, of channels that have heads of their own."""
    groups = record.source_B.shape[2]
    if groups == 1:
        return [record]
    size = record.channels // groups
    return [
        _channels(record, slice(g * size, (g + 1) * size)).replace(
            source_B=record.source_B[:, :, g : g + 1], source_C=record.source_C[:, :, g : g + 1]
        )
        for g in range(groups)
    ]


def by_head(run: Run, record: ScanRecord, weights: Weights, fold: str, merged: bool) -> Tensor:
    """Fold channels that share matrices, as ``Backend.hidden_attention`` does.

    Args:
        run: see ``fold_heads``.
        record: all routes.
        weights: see ``fold_heads``, of all routes.
        fold: see ``hidden_attention``.
        merged: whether the routes are summed in the token frame; a unit's matrix is, before its channels get it.
    """
    found = by_route(record, weights, merged, partial(fold_heads, run, fold=fold))
    return to_channels(found, record.channels, -3) if fold == "each" else found


def fold_heads(
    run: Run, record: ScanRecord, weights: Weights, fold: str, rows: slice = _ALL, columns: slice = _ALL
) -> Tensor:
    """Fold the matrices of one route's channels: (batch, 1, [channels,] rows, columns), in scan order.

    "each" without weights returns those of units, not yet given to their channels.

    Args:
        run: does the same for a record of one group whose channels have heads of their own; it is given at most one
            weight, and none with "each".
        record: one route.
        weights: of rows and columns, (batch, 1, channels, length), or None.
        fold: see ``hidden_attention``.
        rows: all, or one.
        columns: all, or one.
    """
    width, dtype = unit_width(record), working_dtype(record)
    r, k = (None if x is None else x.to(dtype).unflatten(2, (-1, width)) for x in weights)
    folded: list[Tensor] = []
    with torch.autocast(record.source_delta.device.type, enabled=False):  # half-precision products would cost 1e-3
        for part in by_group(as_units(record.in_scan_order(), width)):
            own = slice(len(folded) * part.channels, (len(folded) + 1) * part.channels)
            group = _Group(run, part, width, dtype, rows, columns)
            folded.append(group.fold(pick((r, k), _ALL, _ALL, own), fold))
    if fold == "each":
        return folded[0] if len(folded) == 1 else torch.cat(folded, dim=2)
    total = reduce(torch.add, folded)
    return total if fold == "sum" else total / record.channels


def to_channels(matrices: Tensor, channels: int, axis: int) -> Tensor:
    """Give the channels of every unit its matrix; copies."""
    axis %= matrices.ndim
    width = channels // matrices.shape[axis]
    return (
        matrices.unsqueeze(axis + 1)
        .expand(*matrices.shape[: axis + 1], width, *matrices.shape[axis + 1 :])
        .flatten(axis, axis + 1)
    )


class _Group:
    """The units of one group. Weights are (batch, 1, units, width, length)."""

    def __init__(self, run: Run, units: ScanRecord, width: int, dtype: torch.dtype, rows: slice, columns: slice):
        self.run, self.units, self.width, self.rows, self.columns = run, units, width, rows, columns
        self.G: Tensor | None = None
        if units.A.shape[2] == 1:
            C, B = (x[:, :, 0].to(dtype) for x in (units.source_C, units.source_B))
            self.G = (C[..., rows].mT @ B[..., columns]).tril((rows.start or 0) - (columns.start or 0))
            one = C.new_ones(()).expand(units.batch, 1, 1, 1, units.length)
            decays = units.map_tensors(lambda x: x.to(dtype))
            self.units = decays.replace(source_B=one, source_C=one)  # the record of E

    def fold(self, weights: Weights, fold: str) -> Tensor:
        """Sum the folded matrices of all channels; "each" keeps them."""
        if fold == "each":
            return self._each(weights)
        if fold in ("mean", "sum"):
            return self._total(weights, "sum")
        rows, columns = weights
        gain = self.units.source_gain
        if self.G is not None and gain is not None:  # E may not be negative
            self.units = self.units.replace(source_gain=gain.abs())
            sign = gain.sign().unsqueeze(3).expand(-1, -1, -1, self.width, -1)
            columns = sign if columns is None else sign * columns
        if fold == "absolute":
            return self._total((None if rows is None else rows.abs(), None if columns is None else columns.abs()), fold)
        same, opposite = _by_sign(rows, columns)
        total = self._total(same, "positive")
        return total if opposite is None else total + self._total(opposite, "negative")

    def _each(self, weights: Weights) -> Tensor:
        matrices = self.run(self.units, (None, None), "each")
        matrices = matrices if self.G is None else matrices * self.G.unsqueeze(2)
        rows, columns = weights
        if rows is None and columns is None:
            return matrices
        matrices = matrices.unsqueeze(3)
        if rows is not None:
            matrices = matrices * rows[..., self.rows].unsqueeze(-1)
        if columns is not None:
            matrices = matrices * columns[..., self.columns].unsqueeze(-2)
        return matrices.flatten(2, 3)

    def _total(self, weights: Weights, part: str) -> Tensor:
        """Sum a part of every M_h times W_h, which is not negative unless the part is the whole, "sum"."""
        if self.G is not None:
            return _PARTS[part](self.G) * self._weighted(self.units, weights, "sum")
        if part == "negative":
            return self._weighted(self.units.replace(source_B=-self.units.source_B), weights, "positive")
        return self._weighted(self.units, weights, part)

    def _weighted(self, units: ScanRecord, weights: Weights, part: str) -> Tensor:
        rows, columns = weights
        if rows is None or columns is None:
            sums = None if rows is None else rows.sum(3), None if columns is None else columns.sum(3)
            mean = units.channels if part in ("absolute", "positive") else 1
            total = self.run(units, sums, part)
            return total * (mean * (self.width if rows is None and columns is None else 1))

        def of_block(start: int) -> Tensor:
            own = slice(start, start + size)
            matrices = _PARTS[part](self.run(_channels(units, own), (None, None), "each"))
            return (matrices * (rows[:, :, own, :, self.rows].mT @ columns[:, :, own, :, self.columns])).sum(2)

        entries = units.batch * units.length * (units.length if self.rows == self.columns else 1)
        size = max(1, _WORKSPACE // entries)
        return reduce(torch.add, map(of_block, range(0, units.channels, size)))


def _repeated(repeats: int, delta: Tensor, A: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give each of ``repeats`` units of a head its values."""
    if repeats > 1:
        delta, A = delta.repeat_interleave(repeats, dim=2), A.repeat_interleave(repeats, dim=1)
        gain = None if gain is None else gain.repeat_interleave(repeats, dim=2)
    return delta, A, gain


def _channels(record: ScanRecord, channels: slice) -> ScanRecord:
    return record.replace(
        source_u=record.source_u[:, :, channels],
        source_delta=record.source_delta[:, :, channels],
        A=record.A[:, channels],
        D=None if record.D is None else record.D[:, channels],
        source_gain=None if record.source_gain is None else record.source_gain[:, :, channels],
        gate=None if record.gate is None else record.gate[:, channels],
    )


def _by_sign(rows: Tensor | None, columns: Tensor | None) -> tuple[Weights, Weights | None]:
    """Return weights whose products are the positive parts of r k, channel by channel, and those of -r k."""
    r, k = ([] if x is None else [x.clamp(min=0), (-x).clamp(min=0)] for x in (rows, columns))
    if rows is None and columns is None:
        return (None, None), None
    if rows is None:
        return (None, k[0]), (None, k[1])
    if columns is None:
        return (r[0], None), (r[1], None)
    both = torch.cat(r, dim=3)
    return (both, torch.cat(k, dim=3)), (both, torch.cat(k[::-1], dim=3))
