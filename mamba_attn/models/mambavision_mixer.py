"""The equations of the MambaVision mixer (arXiv 2407.08083), in one place.

``project`` and ``finish`` are called by ``MambaVisionMixer`` and, on foreign modules with the same attribute names, by
the adapter.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models._layers import full_precision, step_projection, undecayed
from mamba_attn.ops import selective_scan


def project(
    module: nn.Module,
    x: Float[Tensor, "sequences length features"],
    *,
    rules: Rules = PLAIN,
    layout: TokenLayout | None = None,
) -> ScanRecord:
    """Compute everything in a MambaVision mixer before its scan.

    [x, z] = in_proj(input), u = SiLU(conv(x)), v = SiLU(conv(z)), [dt, B, C] = x_proj(u), A = -exp(A_log); v goes
    around the scan and is no gate (arXiv 2407.08083, section 3). The convolutions are depthwise and see both sides.
    dt_proj adds its bias and, as in the official code, the scan adds it again: delta = softplus(dt_proj(dt) + bias).

    Args:
        module: a mixer with MambaVision's attribute names; its projections are called as modules, and of its
            convolutions the weight and bias are read, as its own forward does.
        x: the mixer's input: images or, where ``layout`` has windows, the windows of one image after the other's.
        rules: what an attribution method changes.
        layout: the token frame; kept in the record.

    Returns:
        The record of images, one route per window, in scan order; features of u and delta are contiguous in memory.
    """
    parts: Any = module
    states = parts.A_log.shape[1]
    inner, bypass = parts.in_proj(x).chunk(2, dim=-1)
    u = rules.activation(F.silu, _convolved(parts.conv1d_x, inner)).contiguous()
    v = rules.activation(F.silu, _convolved(parts.conv1d_z, bypass))
    low, B, C = parts.x_proj(u.flatten(0, 1)).tensor_split([-2 * states, -states], dim=-1)
    dt = full_precision(parts.dt_proj(low)) + full_precision(parts.dt_proj.bias)

    windows = None if layout is None else layout.windows(x.device)
    routes = 1 if windows is None else len(windows)
    delta, B, C = (value.view(-1, routes, x.shape[1], value.shape[-1]).mT for value in (F.softplus(dt), B, C))
    return ScanRecord.from_scan(
        u.unflatten(0, (-1, routes)).mT,
        delta,
        -torch.exp(full_precision(parts.A_log)).expand(routes, -1, -1),
        B.unsqueeze(2),
        C.unsqueeze(2),
        full_precision(parts.D).expand(routes, -1),
        order=windows,
        tokens=None if layout is None else layout.tokens,
        bypass=(v if layout is None else layout.from_windows(v, axis=1)).mT,
        layout=layout,
    )


def finish(
    module: nn.Module, record: ScanRecord, y: Float[Tensor, "batch channels tokens"], rules: Rules = PLAIN
) -> Float[Tensor, "sequences length features"]:
    """Compute everything in a MambaVision mixer after its scan: append the bypassed channels, project.

    Args:
        module: the mixer that ``record`` came from.
        record: what ``project`` returned.
        y: output of the scan in the token frame.
        rules: what an attribution method changes: nothing here.
    """
    output: Tensor = module.get_submodule("out_proj")(side_by_side(record, y))
    return output


def side_by_side(
    record: ScanRecord, y: Float[Tensor, "batch channels tokens"]
) -> Float[Tensor, "sequences length features"]:
    """Return what out_proj receives: the scan's output, then the bypassed channels, window by window.

    Args:
        record: what ``project`` returned.
        y: output of the scan in the token frame.

    Raises:
        ValueError: a record of another family, all of whose channels are scanned.
    """
    if record.bypass is None:
        raise ValueError("side_by_side(record): the record has no bypass; use a record from project.")
    joined = torch.cat([y.to(record.bypass.dtype), record.bypass], dim=1).mT
    return joined if record.layout is None else record.layout.to_windows(joined, axis=1)


def _convolved(conv: Any, x: Float[Tensor, "sequences length channels"]) -> Float[Tensor, "sequences length channels"]:
    """Apply a depthwise convolution padded to the same length; with an even number of taps, the right gets one more."""
    taps = conv.weight.shape[-1]
    padded = F.pad(x.mT, ((taps - 1) // 2, taps // 2))
    return F.conv1d(padded, conv.weight, conv.bias, groups=conv.weight.shape[0]).mT


class MambaVisionMixer(nn.Module):
    """A mixer with one scan over half of the channels; the other half bypasses it.

    Args:
        features: size of a token.
        d_state: states per channel.
        d_conv: taps of the convolutions.
        expand: channels per feature, both halves together.
        dt_rank: rank of the step-size projection. Default: features / 16, rounded up.
    """

    def __init__(
        self, features: int, *, d_state: int = 8, d_conv: int = 3, expand: int = 1, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        channels = expand * features // 2
        rank = dt_rank or math.ceil(features / 16)
        self.in_proj = nn.Linear(features, 2 * channels, bias=False)
        self.conv1d_x = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=False)
        self.conv1d_z = nn.Conv1d(channels, channels, d_conv, groups=channels, bias=False)
        self.x_proj = nn.Linear(channels, rank + 2 * d_state, bias=False)
        self.dt_proj = step_projection(rank, channels)
        self.A_log = undecayed(torch.arange(1.0, d_state + 1).log().repeat(channels, 1))
        self.D = undecayed(torch.ones(channels))
        self.out_proj = nn.Linear(2 * channels, features, bias=False)

    def forward(
        self, x: Float[Tensor, "sequences length features"], layout: TokenLayout | None = None
    ) -> Float[Tensor, "sequences length features"]:
        """Mix tokens; ``layout`` as in ``project``."""
        record = project(self, x, layout=layout)
        return finish(self, record, selective_scan(record))
