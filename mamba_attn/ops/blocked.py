"""The fast exact path in plain PyTorch: any device, differentiable, float64 or float32.

Hidden attention by halving: the rows of a node's lower half meet the columns of its upper half at the midpoint m,

    M[i, j] = (C_i exp(A (S_i - S_m))) . (exp(A (S_m - S_j)) B_j gain_j),

two factors <= 1 and one matrix product, channels and states as its inner dimension. Exponents are differences of
float64 cumulative sums. Padding has delta = 0 and B = C = 0, which is exact.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import chunk_scan
from mamba_attn.ops.arguments import Weights, gathered, pick, working_dtype
from mamba_attn.ops.backend import Backend, by_route, merge_tokens
from mamba_attn.ops.heads import by_head, unit_width

_LEAF = 4  # nodes up to this length are computed pair by pair
_WORKSPACE = 2**24  # elements of one temporary


class Blocked(Backend):
    """Backend "blocked": plain PyTorch on any device."""

    takes_any_orders = True

    def unavailable(self, record: ScanRecord) -> str | None:
        """Return None: this backend runs any record on any device."""
        return None

    def selective_scan(self, record: ScanRecord, merged: bool) -> Tensor:
        """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
        if chunk_scan.channels_share_decays(record):
            return chunk_scan.selective_scan(record, merged)
        dtype = working_dtype(record)
        part = per_channel(record, dtype)
        u = record.u.to(dtype)
        y = recurrence(part, part.delta, part.gain * u)
        if record.D is not None and record.D.ndim == 2:
            y = y + record.D.to(dtype).unsqueeze(-1) * u
        return merge_tokens(record, y) if merged else y

    def hidden_attention(
        self, record: ScanRecord, row_weight: Tensor | None, col_weight: Tensor | None, fold: str, merged: bool
    ) -> Tensor:
        """(batch, [channels,] tokens, tokens) merged, else (batch, routes, [channels,] length, length)."""
        if unit_width(record) > 1:
            return by_head(_attention, record, (row_weight, col_weight), fold, merged)
        return by_route(record, (row_weight, col_weight), merged, partial(_attention, fold=fold))


BACKEND = Blocked()


def attention_gradients(
    record: ScanRecord,
    weights: Weights,
    fold: str,
    merged: bool,
    gradient: Tensor,
    needed: Sequence[bool],
    graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of the matrix with respect to source_delta, A, source_B, source_C and the weights, where needed.

    The backward pass of kernels without one; with ``graph`` they can be differentiated again.
    """
    names = ("source_delta", "A", "source_B", "source_C")
    sources = [*(getattr(record, name) for name in names), *weights]
    leaves = sources if graph else [None if x is None else x.detach() for x in sources]
    for leaf, need in zip(leaves, needed, strict=True):
        if leaf is not None and need and not graph:
            leaf.requires_grad_()
    with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
        again = record.replace(**dict(zip(names, leaves, strict=False)))
        rows, columns = (
            gathered(again, name, weight, merged)
            for name, weight in zip(("row_weight", "col_weight"), leaves[4:], strict=True)
        )
        result = BACKEND.hidden_attention(again, rows, columns, fold, merged)
        wanted = [x for x, need in zip(leaves, needed, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=graph))
    return [next(found) if need else None for need in needed]


class Channels(NamedTuple):
    """A scan with heads, groups and shared states expanded to channels.

    delta and gain (b r c l), which may be one tensor; A (r c n), B and C (b r c|1 n l).
    """

    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gain: Tensor

    def block(self, channels: slice) -> "Channels":
        """Return a slice of the channels."""
        shared = self.B.shape[2] == 1
        B, C = (x if shared else x[:, :, channels] for x in (self.B, self.C))
        delta = self.delta[:, :, channels]
        gain = delta if self.gain is self.delta else self.gain[:, :, channels]
        return Channels(delta, self.A[:, channels], B, C, gain)


def per_channel(record: ScanRecord, dtype: torch.dtype) -> Channels:
    """Expand heads, groups and shared states of a record; B and C stay shared if there is one group."""
    width, groups = record.channels // record.heads, record.source_B.shape[2]
    delta, A, B, C = (x.to(dtype) for x in (record.delta, record.A, record.B, record.C))
    if width > 1:
        delta, A = delta.repeat_interleave(width, dim=2), A.repeat_interleave(width, dim=1)
    gain = delta
    if record.source_gain is not None:
        gain = record.gain.to(dtype)
        gain = gain.repeat_interleave(width, dim=2) if width > 1 else gain
    if groups > 1:
        B, C = (x.repeat_interleave(record.channels // groups, dim=2) for x in (B, C))
    return Channels(delta, A.expand(-1, -1, record.states), B, C, gain)


def recurrence(
    part: Channels, step: Float[Tensor, "batch routes channels length"], inputs: Float[Tensor, "batch routes _ length"]
) -> Float[Tensor, "batch routes channels length"]:
    """y_t = C_t . h_t with h_t = exp(step_t A) h_{t-1} + inputs_t B_t, in blocks of about sqrt(length) steps.

    All blocks advance together from zero states; the true states at block boundaries follow in a second, short loop.
    """
    length = step.shape[-1]
    size = max(1, math.isqrt(length))
    padding = -length % size

    def cut(x: Tensor) -> Tensor:  # (batch, routes, blocks, channels, [states,] size)
        x = torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, size))
        return x.movedim(-2, 2)

    step, inputs, B, C = cut(step), cut(inputs), cut(part.B), cut(part.C)
    A = part.A.unsqueeze(1)
    S = step.double().cumsum(-1)
    h = torch.zeros_like(A * B[..., 0])
    local = []
    for t in range(size):
        h = torch.exp(step[..., t, None] * A) * h + inputs[..., t, None] * B[..., t]
        local.append((C[..., t] * h).sum(-1))
    ends, carry = h.unbind(2), torch.zeros_like(h[:, :, 0])
    decay = torch.exp(S[..., -1, None].to(A.dtype) * A).unbind(2)
    carries = []
    for block_end, block_decay in zip(ends, decay, strict=True):
        carries.append(carry)
        carry = block_decay * carry + block_end
    before = torch.stack(carries, dim=2)
    y = [own + (C[..., t] * torch.exp(S[..., t, None].to(A.dtype) * A) * before).sum(-1) for t, own in enumerate(local)]
    return rearrange(torch.stack(y, -1), "b r m c t -> b r c (m t)")[..., :length]


def _attention(
    record: ScanRecord, weights: Weights, fold: str
) -> Float[Tensor, "batch routes *channels length length"]:
    """The matrices of a record in scan order, folded; channel blocks bound the temporaries."""
    dtype, length, channels = working_dtype(record), record.length, record.channels
    part = per_channel(record, dtype)
    signed = fold in ("mean", "sum")
    per_block = record.batch * record.routes * length * (record.states * 2 if signed else max(length, record.states))
    size = max(1, _WORKSPACE // per_block)
    total, kept = None, []
    for start in range(0, channels, size):
        own = slice(start, start + size)
        matrix = halving(part.block(own), pick(weights, slice(None), slice(None), own), keep_channels=not signed)
        if fold == "each":
            kept.append(matrix)
            continue
        if not signed:
            matrix = (matrix.clamp(min=0) if fold == "positive" else matrix.abs()).sum(2)
        total = matrix if total is None else total + matrix
    if total is None:
        return torch.cat(kept, dim=2)
    return total if fold == "sum" else total / channels


def halving(part: Channels, weights: Weights, keep_channels: bool) -> Tensor:
    """Return the matrices, leaves on the diagonal, then one matrix product per level.

    Args:
        part: the scans.
        weights: of rows and columns.
        keep_channels: do not sum over channels.

    Returns:
        (batch, routes, [channels,] length, length)
    """
    rows, columns = (None if weight is None else weight.to(part.delta.dtype) for weight in weights)
    length = part.delta.shape[-1]
    levels = max(0, math.ceil(math.log2(length / _LEAF)))
    leaf = math.ceil(length / 2**levels)
    padding = leaf * 2**levels - length
    inputs = part.gain if columns is None else part.gain * columns

    def states_last(x: Tensor) -> Tensor:  # (batch, routes, length, channels, states or 1)
        return torch.nn.functional.pad(x.movedim(-1, 2), (0, 0) * (x.ndim - 3) + (0, padding))

    S = states_last(part.delta).double().cumsum(2)
    KB = states_last(part.B.expand(-1, -1, inputs.shape[2], -1, -1)) * states_last(inputs).unsqueeze(-1)
    QC = states_last(part.C)
    QC = QC if rows is None else QC * states_last(rows).unsqueeze(-1)
    QC = QC.expand_as(KB)
    A = part.A.unsqueeze(1).unsqueeze(1)
    equation = "brmicn,brmjcn->brcmij" if keep_channels else "brmicn,brmjcn->brmij"
    matrix = _leaves(S, KB, QC, A, leaf, keep_channels)
    half = leaf
    while half < S.shape[2]:
        s, kb, qc = (x.unflatten(2, (-1, 2, half)) for x in (S, KB, QC))
        middle = s[:, :, :, 0, -1:]
        Q = qc[:, :, :, 1] * torch.exp(A * (s[:, :, :, 1] - middle).to(A.dtype).unsqueeze(-1))
        K = kb[:, :, :, 0] * torch.exp(A * (middle - s[:, :, :, 0]).to(A.dtype).unsqueeze(-1))
        with torch.autocast(Q.device.type, enabled=False):  # a half-precision product would cost 1e-3
            lower = torch.einsum(equation, Q, K)
        upper_left, lower_right = matrix[..., 0::2, :, :], matrix[..., 1::2, :, :]
        top = torch.nn.functional.pad(upper_left, (0, half))
        matrix = torch.cat([top, torch.cat([lower, lower_right], -1)], -2)
        half *= 2
    return matrix.squeeze(-3)[..., :length, :length]


def _leaves(S: Tensor, KB: Tensor, QC: Tensor, A: Tensor, leaf: int, keep_channels: bool) -> Tensor:
    """(batch, routes, [channels,] nodes, leaf, leaf): row by row, every pair by its own exponential."""
    s, kb, qc = (x.unflatten(2, (-1, leaf)) for x in (S, KB, QC))
    rows = []
    for i in range(leaf):
        decay = (s[:, :, :, i : i + 1] - s[:, :, :, : i + 1]).to(A.dtype)
        pairs = qc[:, :, :, i : i + 1] * torch.exp(A * decay.unsqueeze(-1)) * kb[:, :, :, : i + 1]
        row = pairs.sum(-1).movedim(-1, 2) if keep_channels else pairs.sum((-2, -1))
        rows.append(torch.nn.functional.pad(row, (0, leaf - 1 - i)))
    return torch.stack(rows, dim=-2)
