"""Scans whose channels share decays head by head, as in Mamba-2: matrix products of chunks, not a loop over steps.

With one decay for all states, the channels of a head differ only in their input (arXiv 2405.21060, section 6). In a
chunk whose first step follows the state h, S counted from the chunk's start,

    y[i] = sum_{j <= i} (C_i . B_j) exp(A (S[i] - S[j])) gain[j] u[j] + exp(A S[i]) C_i . h,

where the products C_i . B_j are made once per group and the exponentials, all of them <= 1, once per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import working_dtype
from mamba_attn.ops.backend import merge_tokens
from mamba_attn.ops.heads import per_unit, unit_width

_CHUNK = 64
_NOTHING = 1e-30


def channels_share_decays(record: ScanRecord) -> bool:
    """Whether several channels have one decay for all of their states."""
    return record.A.shape[2] == 1 and unit_width(record) > 1


def selective_scan(record: ScanRecord, merged: bool) -> Tensor:
    """y: (batch, channels, tokens) merged, else (batch, routes, channels, length)."""
    u = record.u.to(working_dtype(record))
    with torch.autocast(u.device.type, enabled=False):  # half-precision products would cost 1e-3
        y = _chunks(record, u.mT).mT
    return merge_tokens(record, y) if merged else y


def _chunks(
    record: ScanRecord, u: Float[Tensor, "batch routes length channels"]
) -> Float[Tensor, "batch routes length channels"]:
    """One chunk after the other; the units of a group stand side by side in the products with B and C."""
    groups = record.source_B.shape[2]
    delta, gain, A = per_unit(record)
    units = A.shape[1] // groups
    exponents = (delta.double().cumsum(-1) * A.double()).mT.unflatten(-1, (groups, units))  # (b, r, l, g, units)
    inputs = u.unflatten(-1, (groups, units, -1)) * gain.to(u.dtype).mT.unflatten(-1, (groups, units)).unsqueeze(-1)
    B, C = record.B.to(u.dtype), record.C.to(u.dtype).mT  # (b, r, g, states, l), and its transpose
    before: Tensor | float = 0.0
    h: Tensor | None = None  # (b, r, g, states, units * width)
    found = []
    for start in range(0, record.length, _CHUNK):
        own = slice(start, start + _CHUNK)
        b, c = B[..., own], C[..., own, :]
        x = inputs[:, :, own].transpose(2, 3)  # (b, r, g, steps, units, width)
        e = exponents[:, :, own].movedim(2, -1)  # (b, r, g, units, steps)
        decays = _decay((e.unsqueeze(-1) - e.unsqueeze(-2)).tril().to(u.dtype))
        y = (((c @ b).tril().unsqueeze(3) * decays) @ x.transpose(3, 4)).transpose(3, 4)
        since = _decay((e - before).to(u.dtype)).mT  # decay from the chunk's start to each step
        if h is not None:
            y = y + (c @ h).unflatten(-1, (units, -1)) * since.unsqueeze(-1)
        if own.stop < record.length:
            left = _decay((e[..., -1:] - e).to(u.dtype)).mT  # from each step to the chunk's end
            added = b @ (x * left.unsqueeze(-1)).flatten(-2)
            whole = since[..., -1:, :].repeat_interleave(x.shape[-1], -1)
            h = added if h is None else h * whole + added
        found.append(y.transpose(2, 3).flatten(3))
        before = e[..., -1:]
    y = torch.cat(found, dim=2)
    if record.D is not None and record.D.ndim == 2:
        y = y.addcmul(record.D.to(u.dtype).unsqueeze(-2), u)
    return y


def _decay(exponent: Tensor) -> Tensor:
    """exp(exponent), but 0 where it is next to nothing: products with denormal numbers take ten times as long."""
    return F.threshold(exponent.exp(), _NOTHING, 0.0)
