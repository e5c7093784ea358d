"""Some rows of the hidden attention of every channel: of all rows, ``hidden_attention`` with fold="each" has them."""

import torch
from torch import Tensor

from mamba_attn._types import Float, Int
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import working_dtype
from mamba_attn.ops.blocked import Channels, halving, per_channel


def channel_rows(record: ScanRecord, rows: Int[Tensor, " rows"]) -> Float[Tensor, "batch channels rows tokens"]:
    """Return rows of the attention of every channel, routes summed in the token frame, times the record's scale.

    Steps of a route that follow each other are a block. With a its first step,

        M[i, j] = (C_i exp(A (S_i - S_a))) . (exp(A (S_a - S_j)) B_j gain_j)    for j < a

    is one matrix product per channel; the square on the diagonal is computed like a whole matrix.

    Args:
        record: all images share its orders, and every step has a token.
        rows: tokens, each once.

    Raises:
        ValueError: a record of other orders.
    """
    if not record.shares_orders:
        raise ValueError("channel_rows(record): expected orders that all images share, with a token for every step.")
    part = per_channel(record, working_dtype(record))
    found = part.delta.new_zeros(record.batch, record.channels, len(rows), record.tokens)
    for route in range(record.routes):
        # which of the rows each step writes, if any
        places = torch.full((record.tokens,), -1, device=rows.device)
        places[rows] = torch.arange(len(rows), device=rows.device)
        places = places[record.write_order[route]]
        steps = (places >= 0).nonzero().flatten()
        delta, B, C, gain = (x[:, route] for x in (part.delta, part.B, part.C, part.gain))
        one = Channels(delta, part.A[route], B, C, gain)
        S = delta.double().cumsum(-1)
        for run in steps.tensor_split((steps.diff() != 1).nonzero().flatten().add(1).tolist()):
            if len(run):
                block = _rows_of_run(
                    one, S, slice(int(run[0]), int(run[-1]) + 1), record.read_order[route], record.tokens
                )
                found.index_add_(2, places[run], block)
    return found * record.scale


def _rows_of_run(
    part: Channels, S: Float[Tensor, "batch channels length"], run: slice, read: Int[Tensor, " length"], tokens: int
) -> Float[Tensor, "batch channels run tokens"]:
    """Rows of the steps of a run, on one route; columns in the token frame."""
    delta, A, B, C, gain = part
    before = slice(run.start)
    middle = S[..., run.start, None]
    shape = (*delta.shape[:2], A.shape[-1], tokens)
    keys = B[..., before] * gain[..., None, before] * _decay(A, middle - S[..., before])
    framed = keys.new_zeros(shape).index_copy_(3, read[before], keys)
    rows = (C[..., run] * _decay(A, S[..., run] - middle)).mT @ framed
    own, *others = (x[:, None, ..., run] for x in (delta, B, C, gain))
    square = halving(Channels(own, A[None], *others), (None, None), keep_channels=True)[:, 0]
    return rows.index_add_(3, read[run], square)


def _decay(A: Float[Tensor, "channels states"], past: Tensor) -> Float[Tensor, "batch channels states steps"]:
    return torch.exp(A.unsqueeze(-1) * past.to(A.dtype).unsqueeze(2))
