"""The equations of Mamba-2's mixer (arXiv 2405.21060, section 7), in one place.

``project`` and ``finish`` are called by the adapter of modules with transformers' or mamba_ssm's attribute names:
``n_groups`` or ``ngroups``, ``time_step_limit`` or ``dt_limit``, and a ``norm`` that takes the gate.
"""

from collections.abc import Collection
from functools import partial
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Compute everything in a mixer of Mamba-2 before its scan.

    [z, x B C, dt] = in_proj(x), the last of its outputs; [u, B, C] = act(conv1d(x B C)); delta = softplus(dt + dt_bias)
    within its limits, one per head; A = -exp(A_log). The gate is SiLU(z), and comes before the norm. Falcon H1
    scales the projection's input and outputs.

    Args:
        module: the mixer; its submodules are called as modules.
        x: its input.
        rules: what an attribution method changes.
        layout: of the tokens; kept in the record.
        real: 0 at padding, which is set to zero.
        masked: where, see ``MASKED``.

    Returns:
        The record: one route, its heads folded as Mamba-2 has them, each with its own step size and A.
    """
    keep = None if real is None else real[..., None].to(x.dtype)
    x = x if keep is None or "input" not in masked else x * keep
    x = x * getattr(module, "ssm_in_multiplier", 1)
    projected = module.in_proj(x)
    scales = getattr(module, "mup_vector", None)
    projected = projected if scales is None else projected * scales.to(projected.dtype)
    channels, heads, mixed = module.out_proj.in_features, module.A_log.shape[0], module.conv1d.in_channels
    z, inner, dt = projected[..., -(channels + mixed + heads) :].split([channels, mixed, heads], -1)
    inner = rules.activation(module.act, module.conv1d(inner.mT)[..., : x.shape[1]].mT)
    inner = inner if keep is None or "scanned" not in masked else inner * keep
    groups = getattr(module, "n_groups", None) or module.ngroups
    u, both = inner.split([channels, mixed - channels], -1)
    B, C = both.mT.unflatten(1, (2, groups, -1)).unsqueeze(2).unbind(1)
    limits = getattr(module, "time_step_limit", None) or getattr(module, "dt_limit", None)
    limits = limits or (getattr(module, "time_step_min", 0.0), inf)
    delta = F.softplus(full_precision(dt) + full_precision(module.dt_bias)).clamp(*limits)
    return ScanRecord.from_scan(
        u.mT.unsqueeze(1),
        delta.mT.unsqueeze(1),
        -torch.exp(full_precision(module.A_log))[None, :, None],
        B,
        C,
        full_precision(module.D).repeat_interleave(channels // heads)[None],
        gate=rules.activation(F.silu, full_precision(z)).mT,
        layout=layout,
    )


def finish(
    module: Any, record: ScanRecord, y: Float[Tensor, "batch channels tokens"], rules: Rules = PLAIN
) -> Float[Tensor, "batch tokens features"]:
    """Compute everything in a mixer of Mamba-2 after its scan: gate, norm and output projection.

    Args:
        module: the mixer that ``record`` came from.
        record: what ``project`` returned.
        y: output of the scan.
        rules: what an attribution method changes.
    """
    output: Tensor = module.out_proj(normed(module, record, y, rules).to(record.source_u.dtype))
    return output


def normed(
    module: Any, record: ScanRecord, y: Float[Tensor, "batch channels tokens"], rules: Rules = PLAIN
) -> Float[Tensor, "batch tokens channels"]:
    """Return what the output projection receives: the scan's output after its gate and norm.

    Args:
        module: the mixer that ``record`` came from.
        record: what ``project`` returned.
        y: output of the scan.
        rules: what an attribution method changes.
    """
    norm = getattr(module, "norm", None) if getattr(module, "mamba_rms_norm", True) else None
    if norm is None:
        return rules.gate(y, _gate(record)).mT
    if getattr(norm, "norm_before_gate", False):
        return rules.gate(_norm(norm, y.mT, rules), _gate(record).mT)
    return _norm(norm, rules.gate(y, _gate(record)).mT, rules)


def _norm(norm: nn.Module, x: Tensor, rules: Rules) -> Tensor:
    """The norm alone, which takes the gate as a second argument where it has not come before."""
    return rules.norm(norm, x, partial(norm))


def _gate(record: ScanRecord) -> Tensor:
    if record.gate is None:
        raise TypeError("mamba2_mixer.finish(record): expected the record that project returned, which has a gate.")
    return record.gate
