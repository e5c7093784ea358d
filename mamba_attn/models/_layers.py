"""Small layers shared by both families."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float


def full_precision(x: Tensor) -> Tensor:
    """Return float32 for half-precision tensors; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def undecayed(value: Tensor) -> nn.Parameter:
    """Return a parameter that is exempt from weight decay."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def step_projection(rank: int, channels: int) -> nn.Linear:
    """dt_proj; softplus of its bias is log-uniform in 1e-3..1e-1 (Mamba's initialisation)."""
    layer = nn.Linear(rank, channels)
    nn.init.uniform_(layer.weight, -(rank**-0.5), rank**-0.5)
    step = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
    layer.bias = undecayed(step + torch.log(-torch.expm1(-step)))
    return layer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467, eq. 4); no bias.

    Args:
        features: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Normalise in float32 or better; the result has the weight's type."""
        x = full_precision(x)
        # on a CPU, a vector norm is one pass; square and mean are two
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype) * self.weight


class DropPath(nn.Module):
    """Stochastic depth: while training, whole images skip the branch (arXiv 1603.09382).

    Args:
        rate: probability of skipping; the kept ones are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Return ``x``, with whole images zeroed while training."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        """The rate, for the module's repr."""
        return f"rate={self.rate:g}"


class CausalConv1d(nn.Conv1d):
    """The depthwise convolution of a Mamba mixer: step t sees steps t - width + 1 .. t.

    Parameters are those of ``nn.Conv1d(channels, channels, width, groups=channels)``; the output is as long as the
    input, and its memory runs along channels.

    Args:
        channels: channels, each with its own taps.
        width: number of taps.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, channels, width, groups=channels, padding=width - 1)

    def forward(self, x: Float[Tensor, "batch channels length"]) -> Float[Tensor, "batch channels length"]:
        """Convolve along the last axis."""
        length = x.shape[-1]
        # PyTorch's own depthwise Conv1d is fast on a GPU and slow on a CPU
        single = x.dtype == self.weight.dtype == torch.float32
        transformed = torch._C._are_functorch_transforms_active()  # by torch.func, which knows PyTorch's own alone
        if x.device.type == "cpu" and (single or torch.is_autocast_enabled("cpu")) and not transformed:
            output: Tensor = _DepthwiseOnCpu.apply(x.mT, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return output.mT
        if x.device.type == "cpu" and x.dtype == self.weight.dtype:
            width = self.kernel_size[0]
            taps = F.pad(x, (width - 1, 0)).unfold(-1, width, 1)
            output = (taps * self.weight).sum(-1)
            return output if self.bias is None else output + self.bias[:, None]
        return super().forward(x)[..., :length]


class _DepthwiseOnCpu(torch.autograd.Function):
    """A causal depthwise convolution through the channels-last 2-d one, which has a fast kernel; differentiable twice.

    Computes in float32 under autocast: half precision has no fast kernel.

    x (batch, length, channels), weight (channels, 1, width), bias (channels) or None.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)[:, : x.shape[1]]

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        width, length = weight.shape[2], x.shape[1]
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _convolve(gradient, weight.flip(2), None)[:, width - 1 :]
        if ctx.needs_input_grad[1]:
            late = range(width - 1, -1, -1)  # tap k sees the step this much earlier
            taps = [(gradient[:, s:] * x[:, : max(length - s, 0)]).sum(1).sum(0) for s in late]
            to_weight = torch.stack(taps, dim=1).unsqueeze(1)
        if ctx.needs_input_grad[2]:
            to_bias = gradient.sum(1).sum(0)  # two sums: sum((0, 1)) is slow on strided memory
        return to_x, to_weight, to_bias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The full correlation along axis 1: (batch, length + width - 1, channels)."""
    image = x.mT.unsqueeze(2)  # (batch, channels, 1, length), channels last in memory when x is contiguous
    padding = (0, weight.shape[2] - 1)
    return F.conv2d(image, weight.unsqueeze(2), bias, padding=padding, groups=weight.shape[0]).squeeze(2).mT
