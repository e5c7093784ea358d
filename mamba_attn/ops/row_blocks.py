"""Rows of the hidden attention of every channel, in factors; fold="each" of ``hidden_attention`` has all of it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_attn._types import Float, Int
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import working_dtype
from mamba_attn.ops.blocked import Channels, halving, per_channel


class RowBlock(NamedTuple):
    """Rows of one route: queries @ keys over all tokens, and the square in the columns of the rows' own steps.

    Args:
        places: which of the rows that were asked for.
        queries: one per row.
        keys: one per token, 0 but for what the route reads before the first of these rows.
        square: what the rows read of each other.
        columns: the tokens that stand for the square's columns.
    """

    places: Int[Tensor, " rows"]
    queries: Float[Tensor, "batch channels rows states"]
    keys: Float[Tensor, "batch channels states tokens"]
    square: Float[Tensor, "batch channels rows rows"]
    columns: Int[Tensor, " rows"]


def row_blocks(record: ScanRecord, rows: Int[Tensor, " rows"]) -> Iterator[RowBlock]:
    """Yield what rows of the attention of every channel are the sums of, in the token frame, times the record's scale.

    Rows that a route writes one after the other are a block. With a the first of its steps,

        M[i, j] = (C_i exp(A (S_i - S_a))) . (exp(A (S_a - S_j)) B_j gain_j)    for j < a.

    Args:
        record: all images share its orders, and every step has a token.
        rows: tokens, each once.

    Raises:
        ValueError: a record of other orders.
    """
    if not record.shares_orders:
        raise ValueError("row_blocks(record): expected orders that all images share, with a token for every step.")
    part = per_channel(record, working_dtype(record))
    for route in range(record.routes):
        read, write = record.read_order[route], record.write_order[route]
        places = torch.full((record.tokens,), -1, device=rows.device)
        places[rows] = torch.arange(len(rows), device=rows.device)
        places = places[write]
        steps = (places >= 0).nonzero().flatten()
        delta, B, C, gain = (x[:, route] for x in (part.delta, part.B, part.C, part.gain))
        one = Channels(delta, part.A[route], B, C * record.scale, gain)
        S = delta.double().cumsum(-1)
        for run in steps.tensor_split((steps.diff() != 1).nonzero().flatten().add(1).tolist()):
            if len(run):
                start, stop = int(run[0]), int(run[-1]) + 1
                queries, keys, square = _of_run(one, S, slice(start, stop))
                framed = keys.new_zeros(*keys.shape[:3], record.tokens).index_copy_(3, read[:start], keys)
                yield RowBlock(places[run], queries, framed, square, read[start:stop])


def _of_run(part: Channels, S: Float[Tensor, "batch channels length"], run: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and square of the rows of a run of steps of one route, in scan order."""
    delta, A, B, C, gain = part
    before, middle = slice(run.start), S[..., run.start, None]
    queries = (C[..., run] * _decay(A, S[..., run] - middle)).mT
    keys = B[..., before] * gain[..., None, before] * _decay(A, middle - S[..., before])
    own, *others = (x[:, None, ..., run] for x in (delta, B, C, gain))
    return queries, keys, halving(Channels(own, A[None], *others), (None, None), keep_channels=True)[:, 0]


def _decay(A: Float[Tensor, "channels states"], past: Tensor) -> Float[Tensor, "batch channels states steps"]:
    return torch.exp(A.unsqueeze(-1) * past.to(A.dtype).unsqueeze(2))
