"""The equations of VSSD's non-causal mixer (arXiv 2407.18559), in one place: Mamba-2's with one sum over all tokens.

    y[i] = sum_j (C_i . B_j) gain[j] u[j] + D u[i],   gain = delta exp(A_log), or its negative

which no step orders and no state decays in. As scans, these are two without decay: one there, whose tokens read those
before them and themselves, and a strict one back, whose tokens read those behind them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models._layers import full_precision


def project(
    module: Any,
    x: Float[Tensor, "batch tokens features"],
    height: int,
    width: int,
    *,
    rules: Rules = PLAIN,
    layout: TokenLayout | None = None,
) -> ScanRecord:
    """Compute everything before the sum over tokens.

    [z, u B C, dt] = in_proj(x); [u, B, C] = act(conv2d(u B C)) on the grid; delta = softplus(dt + dt_bias), one per
    head. Head h has group h mod groups of B and C. The gate z has no activation, and comes after the norm.

    Args:
        module: the mixer; its submodules are called as modules.
        x: its input.
        height: of the grid of tokens.
        width: of the grid of tokens.
        rules: what an attribution method changes.
        layout: of the tokens; kept in the record.
    """
    heads, channels, mixed = module.A_log.shape[0], module.out_proj.in_features, module.conv2d.in_channels
    z, inner, dt = module.in_proj(x).split([channels, mixed, heads], -1)
    grid = inner.mT.unflatten(2, (height, width)).contiguous()
    u, both = rules.activation(module.act, module.conv2d(grid)).flatten(2).split([channels, mixed - channels], 1)
    B, C = both.unflatten(1, (2, module.ngroups, -1)).unsqueeze(2).unbind(1)  # (batch, 1, groups, states, tokens)
    if module.ngroups > 1:
        group = torch.arange(heads, device=x.device) % module.ngroups
        B, C = B[:, :, group], C[:, :, group]
    delta = F.softplus(full_precision(dt) + full_precision(module.dt_bias)).mT.unsqueeze(1)
    rate = torch.exp(full_precision(module.A_log))[:, None]
    D = full_precision(module.D).repeat_interleave(channels // heads)[:, None].expand(len(x), channels, x.shape[1])
    there = torch.arange(x.shape[1], device=x.device)
    return ScanRecord(
        source_u=u.unsqueeze(1),
        source_delta=torch.zeros_like(delta),
        A=-torch.ones_like(rate).expand(2, heads, 1),
        source_B=B,
        source_C=torch.cat([C, C.roll(1, -1)], 1),  # a step back reads a token, and writes the one before
        D=D,
        source_gain=delta * (rate if module.ssd_positve_dA else -rate),
        gate=full_precision(z).mT,
        read_order=torch.stack([there, there.flip(0)]),
        write_order=torch.stack([there, there.flip(0) - 1]),
        tokens=x.shape[1],
        source_frame="tokens",
        layout=layout,
    )


def finish(
    module: Any, record: ScanRecord, y: Float[Tensor, "batch channels tokens"], rules: Rules = PLAIN
) -> Float[Tensor, "batch tokens features"]:
    """Compute everything after the sum over tokens: norm, gate and output projection.

    Args:
        module: the mixer that ``record`` came from.
        record: what ``project`` returned.
        y: output of the sum, D u in it.
        rules: what an attribution method changes.
    """
    if record.gate is None:
        raise TypeError("non_causal_mixer.finish(record): expected the record that project returned, which has a gate.")
    kind = record.source_u.dtype
    normed = rules.norm(module.norm, y.mT.to(kind))
    output: Tensor = module.out_proj(rules.gate(normed, record.gate.mT.to(kind)))
    return output
