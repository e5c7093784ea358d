"""The equations of Zamba's mixer (arXiv 2405.16712): Mamba's, with weights of their own for each of a few heads."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn._types import Float, Num
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models._layers import full_precision
from mamba_attn.models.vim_mixer import MASKED


def project(
    module: Any,
    x: Float[Tensor, "batch tokens features"],
    *,
    rules: Rules = PLAIN,
    layout: TokenLayout | None = None,
    real: Num[Tensor, "batch tokens"] | None = None,
    masked: Collection[str] = MASKED[0],
) -> ScanRecord:
    """Compute everything in a mixer of Zamba before its scan; what follows is Mamba's, ``vim_mixer.finish``.

    A head has B and C of its own, as a group of channels has in Mamba-2; the input projection returns pairs of a
    channel and its gate.

    Args:
        module: the mixer; its submodules are called as modules.
        x: its input.
        rules: what an attribution method changes.
        layout: of the tokens; kept in the record.
        real: 0 at padding, which is set to zero.
        masked: where, see ``MASKED``.
    """
    keep = None if real is None else real[..., None].to(x.dtype)
    x = x if keep is None or "input" not in masked else x * keep
    inner, z = module.in_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
    inner = inner if keep is None or "inner" not in masked else inner * keep
    u = rules.activation(module.act, module.conv1d(inner.mT)[..., : x.shape[1]].mT)
    u = u if keep is None or "scanned" not in masked else u * keep
    heads, _, rank = module.dt_proj_weight.shape
    states = module.A_log.shape[-1]
    by_head = u.unflatten(-1, (heads, -1)).movedim(2, 1)  # (batch, heads, tokens, width)
    dt, B, C = (by_head @ module.x_proj_weight.mT).split([rank, states, states], -1)
    step = full_precision(dt @ module.dt_proj_weight.mT) + full_precision(module.dt_proj_bias)[:, None]
    return ScanRecord.from_scan(
        u.mT.unsqueeze(1),
        F.softplus(step).mT.flatten(1, 2).unsqueeze(1),
        -torch.exp(full_precision(module.A_log)).flatten(0, 1)[None],
        B.mT.unsqueeze(1),
        C.mT.unsqueeze(1),
        full_precision(module.D).flatten()[None],
        gate=rules.activation(module.act, z).mT,
        layout=layout,
    )
