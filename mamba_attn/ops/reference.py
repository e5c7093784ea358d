"""The specification of a selective scan: its equations, in float64, without optimisations.

Everything faster is compared with this file. One channel c of one route, steps j <= i (arXiv 2312.00752, eq. 2;
arXiv 2403.01590, eq. 11):

    S[i] = sum_{k <= i} delta[k]
    M[i, j] = sum_n C[n, i] * exp(A[n] * (S[i] - S[j])) * B[n, j] * gain[j]
    y[i] = sum_j M[i, j] * u[j] + D * u[i]

gain is delta, unless the record has one of its own. A D of tokens adds D[t] * u[t] in the token frame.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord

Weight = Float[Tensor, "batch routes channels length"]


def channel_matrices(record: ScanRecord) -> Float[Tensor, "batch routes channels length length"]:
    """M of every channel and route, in scan order, float64."""
    delta, gain, A, B, C = _per_channel(record)
    S = delta.cumsum(-1)
    decay = (S.unsqueeze(-1) - S.unsqueeze(-2)).tril()  # S[i] - S[j], zero above the diagonal
    M = torch.zeros_like(decay)
    for n in range(record.states):
        weight = torch.exp(A[..., n, None, None] * decay)
        M = M + C[..., n, :, None] * weight * B[..., n, None, :] * gain.unsqueeze(-2)
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
    """The recurrence itself, token by token: h = exp(delta A) h + gain B u, y = C h + D u; scan order, float64.

    A D of tokens is added where routes merge: ``add_skip``.
    """
    y = (_per_channel(record)[4] * states(record)).sum(-2)
    if record.D is None or record.D.ndim == 3:
        return y
    return y + record.D.double().unsqueeze(-1) * record.u.double()


def states(record: ScanRecord) -> Float[Tensor, "batch routes channels states length"]:
    """The hidden state h after every step, float64."""
    delta, gain, A, B, _ = _per_channel(record)
    u = record.u.double()
    h = torch.zeros_like(B[..., 0])
    trajectory = []
    for t in range(record.length):
        h = torch.exp(delta[..., t, None] * A) * h + gain[..., t, None] * B[..., t] * u[..., t, None]
        trajectory.append(h)
    return torch.stack(trajectory, dim=-1)


def merge(
    record: ScanRecord, matrices: Float[Tensor, "batch routes *channels length length"]
) -> Float[Tensor, "batch *channels tokens tokens"]:
    """Routes summed in the token frame: W[write[i], read[j]] += M[i, j]; times the record's scale."""
    side = _side(record)
    merged = matrices.new_zeros((*matrices.shape[:1], *matrices.shape[2:-2], side, side))
    for images, route, columns, rows in _walks(record):
        merged[images][..., rows[:, None], columns[None, :]] += matrices[images, route]
    return merged[..., : record.tokens, : record.tokens] * record.scale


def merge_tokens(
    record: ScanRecord, values: Float[Tensor, "batch routes *channels length"]
) -> Float[Tensor, "batch *channels tokens"]:
    """Routes summed in the token frame: y[write[i]] += values[i]; times the record's scale."""
    merged = values.new_zeros((*values.shape[:1], *values.shape[2:-1], _side(record)))
    for images, route, _, rows in _walks(record):
        merged[images][..., rows] += values[images, route]
    return merged[..., : record.tokens] * record.scale


def add_skip(record: ScanRecord, y: Float[Tensor, "batch *routes channels tokens"]) -> Tensor:
    """Add a per-token D to a merged output: y[t] += D[t] * u[t], times the record's scale."""
    if record.D is None or record.D.ndim == 2:
        return y
    return y + record.D.to(y.dtype) * record.token_u.to(y.dtype) * record.scale


def _walks(record: ScanRecord) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Yield images that share a route's order, the route, and the tokens that it reads and writes at each step."""
    orders = record.read_order, record.write_order
    if _side(record) > record.tokens:
        orders = orders[0].where(orders[0] >= 0, record.tokens), orders[1].where(orders[1] >= 0, record.tokens)
    alike = orders[0].ndim == orders[1].ndim == 2
    for image in range(1 if alike else record.batch):
        reads, writes = (order if order.ndim == 2 else order[image] for order in orders)
        for route in range(record.routes):
            yield slice(None) if alike else slice(image, image + 1), route, reads[route], writes[route]


def _side(record: ScanRecord) -> int:
    """Number of tokens, plus one for steps without a token, which is cut off at the end."""
    return record.tokens + any(lacking is not False for lacking in record.lacking)


def _per_channel(record: ScanRecord) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Delta and gain (b r c l), A (r c n), B and C (b r c n l): heads, groups, shared states spelt out, float64."""
    heads, groups = record.channels // record.heads, record.channels // record.source_B.shape[2]
    delta, gain = (x.double().repeat_interleave(heads, dim=2) for x in (record.delta, record.gain))
    A = record.A.double().repeat_interleave(heads, dim=1).expand(-1, -1, record.states)
    B, C = (x.double().repeat_interleave(groups, dim=2) for x in (record.B, record.C))
    return delta, gain, A, B, C
