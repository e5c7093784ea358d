"""The equations of SS2D, the mixer of VMamba (arXiv 2401.10166), in one place.

``project`` and ``finish`` are called by ``SS2D`` and, on foreign modules with the same parameter names, by the
adapters.
"""

import functools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import orders as patch_orders
from mamba_attn._types import Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models._layers import full_precision, step_projection, undecayed
from mamba_attn.ops import selective_scan

ROUTES = 4


def project(
    module: nn.Module,
    x: Float[Tensor, "batch height width features"],
    *,
    orders: Int[Tensor, "routes length"] | None = None,
    rules: Rules = PLAIN,
    layout: TokenLayout | None = None,
) -> ScanRecord:
    """Compute everything in SS2D before its scans.

    [x, z] = in_proj(x), u = act(conv3x3(x)), per route [dt, B, C] = x_proj(u), delta = softplus(dt_proj(dt) + bias),
    A = -exp(A_logs); the gate, where there is one, is act(z), and act is SiLU (arXiv 2401.10166, section 4.3). These
    are 1x1 projections, which commute with the routes' permutations: all stays in the token frame, and all routes share
    u.

    Args:
        module: a module with SS2D's names, of either naming scheme, channels first or last inside (its attribute
            ``channel_first``); its submodules are called as modules.
        x: the mixer's input, channels last.
        orders: token visited at each step of each route. Default: VMamba's cross-scan.
        rules: what an attribution method changes.
        layout: where the tokens sit in the image. Default: the grid alone, one pixel per patch.

    Returns:
        The record, in the token frame; features of u and delta are contiguous in memory.

    Example:
        >>> record = project(SS2D(16), torch.rand(2, 4, 6, 16))
        >>> record.routes, record.tokens
        (4, 24)
    """
    height, width = x.shape[1:3]
    parts: Any = module
    routes, channels = parts.dt_projs_bias.shape
    inner, gate = _channels_last(module, parts.in_proj, x), None
    if inner.shape[-1] == 2 * channels:
        inner, z = inner.chunk(2, dim=-1)
        if not getattr(parts, "disable_z_act", False):
            z = _channels_last(module, functools.partial(rules.activation, parts.act), z)
        gate = z.flatten(1, 2).mT
    inner = inner.movedim(3, 1)
    if hasattr(parts, "conv2d"):
        inner = parts.conv2d(inner)
    u = rules.activation(parts.act, inner).movedim(1, 3).flatten(1, 2)

    A = -torch.exp(full_precision(parts.A_logs)).view(routes, channels, -1)
    dt, bc = _project_routes(module, u, A.shape[-1])
    B, C = bc.mT.unsqueeze(2).chunk(2, dim=3)
    dt = full_precision(dt) + full_precision(parts.dt_projs_bias).unsqueeze(1)
    return ScanRecord.from_tokens(
        u.mT.unsqueeze(1),
        F.softplus(dt).mT,
        A,
        B,
        C,
        full_precision(parts.Ds).view(routes, channels),
        order=cross_scan(height, width, x.device) if orders is None else orders,
        gate=gate,
        layout=layout or TokenLayout(grid=(height, width)),
    )


def finish(
    module: nn.Module,
    record: ScanRecord,
    y: Float[Tensor, "batch channels tokens"],
    rules: Rules = PLAIN,
    *,
    norm_frame: str | None = None,
    precision: str = "features",
) -> Float[Tensor, "batch height width features"]:
    """Compute everything in SS2D after its scans: norm, gate, output projection.

    Args:
        module: the module that ``record`` came from.
        record: what ``project`` returned.
        y: output of the scans, routes summed in the token frame.
        rules: what an attribution method changes.
        norm_frame: axes that out_norm gets: "last" (batch, height, width, channels), "first" (batch, channels, height,
            width) or "flat" (batch, tokens, channels). Default: first or last, as the module's ``channel_first`` says.
        precision: "features" rounds y to the type of u before the norm; "scan" leaves y, the norm's output and the
            gate's as wide as the scans made them; "norm" rounds after the norm.

    Raises:
        ValueError: a record without a layout, whose grid is unknown.

    Example:
        >>> from mamba_attn.ops import selective_scan
        >>> mixer, x = SS2D(16), torch.rand(2, 4, 6, 16)
        >>> record = project(mixer, x)
        >>> torch.allclose(finish(mixer, record, selective_scan(record)), mixer(x), atol=1e-5)
        True
    """
    if record.layout is None:
        raise ValueError("finish(record): the record has no layout; use a record from project.")
    parts: Any = module
    grid, narrow = (record.batch, *record.layout.grid, record.channels), record.source_u.dtype
    merged = (y.to(narrow) if precision == "features" else y).mT.reshape(grid)
    frame = frame_of_norm(module, norm_frame)
    call = None if frame == "last" else functools.partial(_in_frame, parts.out_norm, frame)
    output = rules.norm(parts.out_norm, merged, call)
    output = output.to(narrow) if precision == "norm" else output
    if hasattr(parts, "out_act"):
        output = _channels_last(module, functools.partial(rules.activation, parts.out_act), output)
    if record.gate is not None:
        output = rules.gate(output, record.gate.mT.reshape(grid))
    dropout = getattr(parts, "dropout", None)
    tail = parts.out_proj if dropout is None else lambda x: dropout(parts.out_proj(x))
    return cast(Tensor, _channels_last(module, tail, output))


def frame_of_norm(module: nn.Module, norm_frame: str | None) -> str:
    """Return the axis order that out_norm expects, as in ``finish``."""
    return norm_frame or ("first" if getattr(module, "channel_first", False) else "last")


def framed(x: Float[Tensor, "batch height width channels"], frame: str) -> Tensor:
    """Convert a channels-last tensor to the frame "last", "first" or "flat"."""
    if frame == "flat":
        return x.flatten(1, 2)
    return x.movedim(3, 1) if frame == "first" else x


def _in_frame(
    norm: nn.Module, frame: str, x: Float[Tensor, "batch height width channels"]
) -> Float[Tensor, "batch height width channels"]:
    """Call a norm that expects another frame on a channels-last tensor."""
    output: Tensor = norm(framed(x, frame))
    return output.movedim(1, 3) if frame == "first" else output.view(x.shape)


@functools.lru_cache(maxsize=64)
def cross_scan(
    height: int, width: int, device: torch.device, order: str = "raster", second: str = "transpose"
) -> Int[Tensor, "routes length"]:
    """Return the four routes of ``orders.cross`` on a device, cached."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used while training
        return patch_orders.cross(order, height, width, second).to(device)


@functools.lru_cache(maxsize=64)
def raster_scan(height: int, width: int, device: torch.device, both_ways: bool) -> Int[Tensor, "routes length"]:
    """Return four routes along the raster order, remembered: all of them, or the first two, before its reversals."""
    with torch.inference_mode(False):
        order = torch.arange(height * width, device=device)
        return torch.stack([order, order, order.flip(0), order.flip(0)] if both_ways else [order] * ROUTES)


def _project_routes(
    module: nn.Module, u: Float[Tensor, "batch tokens channels"], states: int
) -> tuple[Float[Tensor, "batch routes tokens channels"], Float[Tensor, "batch routes tokens both"]]:
    """Return dt before its bias, and B concatenated with C, for every route."""
    parts: Any = module
    routes = parts.dt_projs_bias.shape[0]
    if hasattr(parts, "x_proj_weight"):
        bias = getattr(parts, "x_proj_bias", None)
        projected = F.linear(u, parts.x_proj_weight.flatten(0, 1), None if bias is None else bias.flatten())
        projected = projected.view(*u.shape[:2], routes, -1).permute(0, 2, 1, 3)
        low, bc = projected.tensor_split([projected.shape[-1] - 2 * states], dim=-1)
        return low @ parts.dt_projs_weight.mT, bc
    # the one-file VMamba stacks the routes in grouped 1x1 convolutions
    every_route = u.mT.unsqueeze(1).expand(-1, routes, -1, -1).flatten(1, 2)
    projected = parts.x_proj(every_route).unflatten(1, (routes, -1))
    low, bc = projected.tensor_split([projected.shape[2] - 2 * states], dim=2)
    return parts.dt_projs(low.flatten(1, 2)).unflatten(1, (routes, -1)).mT, bc.mT


def _channels_last(module: nn.Module, function: Any, x: Tensor) -> Any:
    """Call a submodule on a channels-last tensor, converting to the frame it expects."""
    if getattr(module, "channel_first", False):
        return function(x.movedim(3, 1)).movedim(1, 3)
    return function(x)


class SS2D(nn.Module):
    """VMamba's mixer: a depthwise 3x3 convolution and four scans over the grid.

    Args:
        features: size of a token.
        d_state: states per channel.
        ratio: channels per feature.
        gated: keep the gate z (v0); the v05_noz models have none.
        conv_bias: give the convolution a bias.
        order: order of the first route, one of ``mamba_attn.orders.ORDERS``.
        second: how the second route views the grid, "transpose" or "mirror".

    Example:
        >>> SS2D(16)(torch.rand(2, 4, 6, 16)).shape
        torch.Size([2, 4, 6, 16])
    """

    def __init__(
        self,
        features: int,
        *,
        d_state: int = 1,
        ratio: float = 1.0,
        gated: bool = False,
        conv_bias: bool = False,
        order: str = "raster",
        second: str = "transpose",
    ) -> None:
        super().__init__()
        channels = int(ratio * features)
        rank = math.ceil(features / 16)
        self.order = order
        self.second = second
        self.in_proj = nn.Linear(features, channels * (2 if gated else 1), bias=False)
        self.act = nn.SiLU()
        self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=conv_bias)
        steps = [step_projection(rank, channels) for _ in range(ROUTES)]
        projections = [nn.Linear(channels, rank + 2 * d_state, bias=False).weight for _ in range(ROUTES)]
        self.x_proj_weight = nn.Parameter(torch.stack(projections).detach())
        self.dt_projs_weight = nn.Parameter(torch.stack([step.weight for step in steps]).detach())
        self.dt_projs_bias = undecayed(torch.stack([step.bias for step in steps]).detach())
        self.A_logs = undecayed(torch.arange(1.0, d_state + 1).log().repeat(ROUTES * channels, 1))
        self.Ds = undecayed(torch.ones(ROUTES * channels))
        self.out_norm = nn.LayerNorm(channels)
        self.out_proj = nn.Linear(channels, features, bias=False)

    def routes(self, height: int, width: int) -> Int[Tensor, "routes length"]:
        """Return the token visited at each step of the four routes."""
        return cross_scan(height, width, self.A_logs.device, self.order, self.second)

    def forward(self, x: Float[Tensor, "batch height width features"]) -> Float[Tensor, "batch height width features"]:
        """Mix tokens along the four routes of the grid."""
        record = project(self, x, orders=self.routes(*x.shape[1:3]))
        return finish(self, record, selective_scan(record))
