"""The specification: what a selective scan is, equation by equation, in float64 and without tricks.

Everything faster is compared with this file. One channel c of one route, steps j <= i (arXiv 2312.00752, eq. 2;
arXiv 2403.01590, eq. 11):

    S[i] = sum_{k <= i} delta[k]
    M[i, j] = sum_n C[n, i] * exp(A[n] * (S[i] - S[j])) * B[n, j] * delta[j]
    y[i] = sum_j M[i, j] * u[j] + D * u[i]
"""

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord

Weight = Float[Tensor, "batch routes channels length"]


def channel_matrices(record: ScanRecord) -> Float[Tensor, "batch routes channels length length"]:
    """M of every channel and route, in scan order, float64."""
    delta, A, B, C = _per_channel(record)
    S = delta.cumsum(-1)
    decay = (S.unsqueeze(-1) - S.unsqueeze(-2)).tril()  # S[i] - S[j], zero above the diagonal
    M = torch.zeros_like(decay)
    for n in range(record.states):
        weight = torch.exp(A[..., n, None, None] * decay)
        M = M + C[..., n, :, None] * weight * B[..., n, None, :] * delta.unsqueeze(-2)
    return M.tril()


def hidden_attention(
    record: ScanRecord, row_weight: Weight | None, col_weight: Weight | None, fold: str
) -> Float[Tensor, "batch routes *channels length length"]:
    """Channels folded: attention[i, j] = sum_c row_weight[c, i] * M_c[i, j] * col_weight[c, j] for fold "sum".

    "mean" divides that sum by the channels; "each" keeps the channels apart; "positive" and "absolute" take max(., 0)
    and |.| of every weighted channel before the mean over channels.
    """
    M = channel_matrices(record)
    if row_weight is not None:
        M = M * row_weight.double().unsqueeze(-1)
    if col_weight is not None:
        M = M * col_weight.double().unsqueeze(-2)
    if fold == "each":
        return M
    if fold == "positive":
        M = M.clamp(min=0)
    elif fold == "absolute":
        M = M.abs()
    return M.sum(2) if fold == "sum" else M.mean(2)


def selective_scan(record: ScanRecord) -> Float[Tensor, "batch routes channels length"]:
    """The recurrence itself, token by token: h = exp(delta A) h + delta B u, y = C h + D u; scan order, float64."""
    C = _per_channel(record)[3]
    y = (C * states(record)).sum(-2)
    return y if record.D is None else y + record.D.double().unsqueeze(-1) * record.u.double()


def states(record: ScanRecord) -> Float[Tensor, "batch routes channels states length"]:
    """The hidden state h after every step, float64."""
    delta, A, B, _ = _per_channel(record)
    u = record.u.double()
    h = torch.zeros_like(B[..., 0])
    trajectory = []
    for t in range(record.length):
        step = delta[..., t, None]
        h = torch.exp(step * A) * h + step * B[..., t] * u[..., t, None]
        trajectory.append(h)
    return torch.stack(trajectory, dim=-1)


def merge(
    record: ScanRecord, matrices: Float[Tensor, "batch routes *channels length length"]
) -> Float[Tensor, "batch *channels tokens tokens"]:
    """Routes summed in the token frame: W[write[i], read[j]] += M[i, j]; times the record's scale."""
    shape = (*matrices.shape[:1], *matrices.shape[2:-2], record.tokens, record.tokens)
    merged = matrices.new_zeros(shape)
    for route in range(record.routes):
        rows, columns = record.write_order[route], record.read_order[route]
        merged[..., rows[:, None], columns[None, :]] += matrices[:, route]
    return merged * record.scale


def merge_tokens(
    record: ScanRecord, values: Float[Tensor, "batch routes *channels length"]
) -> Float[Tensor, "batch *channels tokens"]:
    """Routes summed in the token frame: y[write[i]] += values[i]; times the record's scale."""
    merged = values.new_zeros((*values.shape[:1], *values.shape[2:-1], record.tokens))
    for route in range(record.routes):
        merged[..., record.write_order[route]] += values[:, route]
    return merged * record.scale


def _per_channel(record: ScanRecord) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Delta (b r c l), A (r c n), B and C (b r c n l) with heads, groups and shared states spelt out, float64."""
    heads, groups = record.channels // record.heads, record.channels // record.source_B.shape[2]
    delta = record.delta.double().repeat_interleave(heads, dim=2)
    A = record.A.double().repeat_interleave(heads, dim=1).expand(-1, -1, record.states)
    B = record.B.double().repeat_interleave(groups, dim=2)
    C = record.C.double().repeat_interleave(groups, dim=2)
    return delta, A, B, C
