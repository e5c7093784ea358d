"""SS2D and its variants from their names and equations: every scan walked token by token, nothing of ours inside."""

import functools
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import naive

FEATURES, STATES, RANK = 4, 3, 2


def paths(height: int, width: int, scan: str) -> list[list[int]]:
    rows = [row * width + column for row in range(height) for column in range(width)]
    columns = [row * width + column for column in range(width) for row in range(height)]
    return {
        "cross2d": [rows, columns, rows[::-1], columns[::-1]],
        "unidi": [rows, rows, rows, rows],
        "bidi": [rows, rows, rows[::-1], rows[::-1]],
    }[scan]


def selective_scan_fn(mixer: Any, x: torch.Tensor, scan: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, channels, height, width) to the sum of the four routes, each walked and put back token by token."""
    walks, wide = paths(*x.shape[2:], scan), torch.promote_types(x.dtype, torch.float32)
    sequences = [x.flatten(2)[..., walk] for walk in walks]
    if hasattr(mixer, "x_proj"):
        projected = mixer.x_proj(torch.cat(sequences, 1)).chunk(4, 1)
        steps = mixer.dt_projs(torch.cat([part[:, :RANK] for part in projected], 1)).chunk(4, 1)
    else:
        projected = [mixer.x_proj_weight[k] @ u for k, u in enumerate(sequences)]
        projected = projected if bias is None else [p + bias[k, :, None] for k, p in enumerate(projected)]
        steps = [mixer.dt_projs_weight[k] @ part[:, :RANK] for k, part in enumerate(projected)]
    A, D = (-torch.exp(mixer.A_logs)).chunk(4), mixer.Ds.chunk(4)
    total = torch.zeros(x.flatten(2).shape, dtype=wide)
    for k, walk in enumerate(walks):
        delta = naive.softplus(steps[k].mT.to(wide) + mixer.dt_projs_bias[k])
        B, C = projected[k][:, RANK:].mT.to(wide).chunk(2, -1)
        y = naive.scan(sequences[k].mT.to(wide), delta, A[k], B, C, D[k])
        for step, token in enumerate(walk):
            total[..., token] += y[:, step]
    return total.view(x.shape)


class Grouped(nn.Linear):
    """Four 1x1 convolutions side by side."""

    groups = 4

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, 4 * outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, self.weight.unsqueeze(-1), groups=4)


class OnImages(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight[..., None, None], self.bias)


class NormOfImages(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SpatialSoftmax(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.axes = (2, 3) if first else (1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp() / x.exp().sum(self.axes, keepdim=True)


class Mixer(nn.Module):
    """The parameters that all have; ``channels`` of them are mixed."""

    def __init__(
        self, *, gated: bool = True, first: bool = False, act: Any = nn.SiLU, conv: bool = True, bias: bool = False,
        one_file: bool = False, ratio: float = 1.5, x_proj_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_inner = channels = int(ratio * FEATURES)
        linear = OnImages if first else nn.Linear
        self.in_proj = linear(FEATURES, (2 if gated else 1) * channels, bias=bias)
        self.act = act()
        if conv:
            self.conv2d = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias)
        if one_file:
            self.x_proj, self.dt_projs = Grouped(channels, RANK + 2 * STATES), Grouped(RANK, channels)
        else:
            self.x_proj_weight = nn.Parameter(torch.zeros(4, RANK + 2 * STATES, channels))
            self.dt_projs_weight = nn.Parameter(torch.zeros(4, channels, RANK))
        if x_proj_bias:
            self.x_proj_bias = nn.Parameter(torch.zeros(4, RANK + 2 * STATES))
        self.dt_projs_bias = nn.Parameter(torch.zeros(4, channels))
        self.A_logs = nn.Parameter(torch.zeros(4 * channels, STATES))
        self.Ds = nn.Parameter(torch.zeros(4 * channels))
        self.out_norm: nn.Module = NormOfImages(channels) if first else nn.LayerNorm(channels)
        self.out_proj = linear(channels, FEATURES, bias=bias)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, z = self.in_proj(x).chunk(2, -1)
        x = x.permute(0, 3, 1, 2)
        return self.act(self.conv2d(x) if hasattr(self, "conv2d") else x), z


class Official(Mixer):
    """v01..v05 and their suffixes: functions bound on the instance, the scan named where they are."""

    def __init__(self, scan: str = "cross2d", *, gate_act: bool = True, norm: nn.Module | None = None,
                 out_act: bool = False, dropout: float = 0.0, **options: Any) -> None:  # fmt: skip
        super().__init__(**options)
        self.channel_first = options.get("first", False)
        self.disable_z, self.disable_z_act = not options.get("gated", True), not gate_act
        self.out_norm = self.out_norm if norm is None else norm
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.forward = self.forwardv2
        self.forward_core = functools.partial(self.forward_corev2, force_fp32=False, scan_mode=scan)

    def forward_corev2(
        self, x: torch.Tensor, force_fp32: bool = False, ssoflex: bool = True,
        selective_scan_backend: str | None = None, scan_mode: str = "cross2d",
    ) -> torch.Tensor:  # fmt: skip
        assert selective_scan_backend in [None, "oflex", "mamba", "torch"]
        y = selective_scan_fn(self, x, scan_mode, getattr(self, "x_proj_bias", None))
        return self.out_norm(y if self.channel_first else y.permute(0, 2, 3, 1)).to(x.dtype)

    def forwardv2(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = self.in_proj(x)
        if not self.disable_z:
            x, z = x.chunk(2, 1 if self.channel_first else -1)
            z = z if self.disable_z_act else self.act(z)
        x = x if self.channel_first else x.permute(0, 3, 1, 2)
        y = self.out_act(self.forward_core(self.act(self.conv2d(x) if hasattr(self, "conv2d") else x)))
        return self.dropout(self.out_proj(y if self.disable_z else y * z))


class Earlier(Official):
    """When "core" was still a backend."""

    def forward_corev2(  # type: ignore[override]
        self, x: torch.Tensor, selective_scan_backend: str | None = None, scan_mode: str = "cross2d", **kwargs: Any
    ) -> torch.Tensor:
        assert selective_scan_backend in [None, "oflex", "core", "mamba", "torch"]
        return self.out_norm(selective_scan_fn(self, x, scan_mode).permute(0, 2, 3, 1)).to(x.dtype)


class V0(Mixer):
    """The first release: always gated, the norm on a line of tokens."""

    def __init__(self, seq: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.dropout = nn.Identity()
        self.forward = functools.partial(self.forwardv0, seq=True) if seq else self.forwardv0

    def forwardv0(self, x: torch.Tensor, seq: bool = False, force_fp32: bool = True, **kwargs: Any) -> torch.Tensor:
        u, z = self.split(x)
        y = selective_scan_fn(self, u, "cross2d", getattr(self, "x_proj_bias", None)).flatten(2).transpose(1, 2)
        return self.dropout(self.out_proj(self.out_norm(y).view(z.shape) * self.act(z)))


class January(Mixer):
    """Forks of January 2024 (VM-UNet, MedMamba, Swin-UMamba): the norm in ``forward``, whose gate is always SiLU."""

    dropout: ClassVar[None] = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.expand, self.d_state = 1.5, STATES
        self.forward_core = self.forward_corev0

    def forward_corev0(self, x: torch.Tensor) -> torch.Tensor:
        self.selective_scan = selective_scan_fn
        return self.selective_scan(self, x, "cross2d")

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x, z = self.split(x)
        return self.out_proj(self.out_norm(self.forward_core(x).permute(0, 2, 3, 1)) * F.silu(z))


def rename(function: FunctionType, name: str) -> FunctionType:
    return FunctionType(function.__code__, function.__globals__, name, function.__defaults__)


class February(Mixer):
    """VMamba of February 2024: softmax over the line of tokens, or a norm, inside the core."""

    def __init__(self, softmax: bool = False, core: str = "forward_corev2", **options: Any) -> None:
        super().__init__(**options)
        self.K, self.K2, self.ssm_low_rank, self.disable_z_act = 4, 4, False, False
        self.out_norm = nn.Softmax(dim=1) if softmax else self.out_norm
        self.forward_core = getattr(self, core)

    def forward_corev2(self, x: torch.Tensor, nrows: int = -1, channel_first: bool = False) -> torch.Tensor:
        y = selective_scan_fn(self, x, "cross2d").flatten(2).transpose(1, 2)
        return self.out_norm(y).view(x.permute(0, 2, 3, 1).shape).to(x.dtype)

    forward_corev0_seq = rename(forward_corev2, "forward_corev0_seq")

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x, z = self.split(x)
        return self.out_proj(self.forward_core(x) * (z if self.disable_z_act else self.act(z)))


class CrossScan:
    scan = "cross2d"


class CrossMerge:
    pass


class CrossScan_Ab_1direction:  # noqa: N801
    scan = "unidi"


class CrossMerge_Ab_1direction:  # noqa: N801
    pass


class CrossScan_Ab_2direction:  # noqa: N801
    scan = "bidi"


class CrossMerge_Ab_2direction:  # noqa: N801
    pass


def cross_selective_scan(mixer: Any, x: torch.Tensor, CrossScan: Any = CrossScan, CrossMerge: Any = CrossMerge) -> Any:
    y = selective_scan_fn(mixer, x, CrossScan.scan)
    if mixer.out_norm_shape == "v1":
        y = mixer.out_norm(y)
        return y if mixer.channel_first else y.permute(0, 2, 3, 1)
    if mixer.channel_first:
        return mixer.out_norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return mixer.out_norm(y.flatten(2).transpose(1, 2)).view(y.permute(0, 2, 3, 1).shape)


class April(Official):
    """VMamba of April 2024 (ChangeMamba): scans given as classes, and two frames for the norm."""

    def __init__(self, directions: int = 4, shape: str = "v0", **options: Any) -> None:
        super().__init__(**options)
        self.out_norm_shape = shape
        ends = f"_Ab_{directions}direction" if directions < 4 else ""
        classes = {name: globals()[name + ends] for name in ("CrossScan", "CrossMerge") if ends}
        self.forward_core = functools.partial(self.forward_corev2, force_fp32=False, **classes)

    def forward_corev2(  # type: ignore[override]
        self, x: torch.Tensor, cross_selective_scan: Any = cross_selective_scan, force_fp32: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        return cross_selective_scan(self, x, **kwargs)


class LowRank(nn.Module):
    """Around a linear layer or a convolution, as LoRA."""

    def __init__(self, base: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.extra = base, extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.extra(x)


class Moved(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(*self.axes)


class Model(nn.Module):
    """A stem and mixers; ``seen`` keeps the shapes between."""

    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, FEATURES, 4, 4)
        self.mixers = nn.ModuleList(mixers)
        naive.randomise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for mixer in self.mixers:
            if getattr(mixer, "channel_first", False):
                x = x + mixer(x, unused=1)
            else:
                x = x + mixer(x.permute(0, 2, 3, 1), unused=1).permute(0, 3, 1, 2)
        return x


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 12, 20, dtype=dtype)
