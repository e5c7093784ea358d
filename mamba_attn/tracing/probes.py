"""Gradients that say where tokens stand: cotangents by cell, and functions whose gradients stay on their token."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import prod
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHARE = 0.2  # of a step's gradient that must come from its own cell; stricter limits chose inner tensors in silence
_FUSED_NORMS = ("layer_norm_fn", "rms_norm_fn")  # of mamba_ssm, wherever a module holds them
LAYER_NORMS = (F.layer_norm, torch.layer_norm)
SHOWN = (*LAYER_NORMS, F.linear)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_MEANS = (torch.mean, Tensor.mean, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_SPREAD = (*CONVOLUTIONS, *_MEANS, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_LITTLE = 1e-3  # of their gradient is kept: it may be all there is, as where routes are merged by a mean
Show = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], Any]


class Centre(TorchFunctionMode):
    """Values as they are, and gradients that stay on their token.

    Convolutions that keep the grid have the gradient of their middle tap. Means and other convolutions have little: a
    gate made of all tokens, or the coarse grids inside a U-Net, would send every step's gradient to many.

    Args:
        show: gets every convolution, linear layer and layer norm, its arguments and what it returned; code gets what it
            gives back.
    """

    def __init__(self, show: Show | None = None) -> None:
        super().__init__()
        self.show = show

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.show is not None and (func in CONVOLUTIONS or func in SHOWN):
            shown = self.show(func, args, kwargs or {}, out)
            if shown is not out:
                return shown
        if func not in _SPREAD or not out.requires_grad:
            return out
        if func in CONVOLUTIONS and len(args) > 1 and out.shape[2:] == args[0].shape[2:]:
            x, weight = args[:2]
            if set(weight.shape[2:]) == {1}:
                return out
            middle, at = torch.zeros_like(weight), (..., *(size // 2 for size in weight.shape[2:]))
            middle[at] = weight.detach()[at]
            only = func(x, middle, *args[2:], **(kwargs or {}))
            return out.detach() + only - only.detach()
        return out.detach() + _LITTLE * (out - out.detach())


class OnItsToken(torch.autograd.Function):
    """A linear layer of features with the gradient of one of rank one: it costs little, and keeps to its token, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, axis: int) -> Tensor:
        """Return the layer's own output; ``axis`` is that of features."""
        ctx.given, ctx.axis = (x.shape[axis], x.dtype), axis
        return out.clone()  # no view: code may write over it, as MONAI's blocks do (x += identity)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return what the layer with random weights read_i write_j hands on."""
        (count, dtype), generator = ctx.given, torch.Generator().manual_seed(3)
        gradient = gradient.movedim(ctx.axis, -1)
        read, write = (torch.randn(n, generator=generator).to(gradient) for n in (count, gradient.shape[-1]))
        write /= gradient.shape[-1] ** 0.5
        return ((gradient @ write).unsqueeze(-1) * read).movedim(-1, ctx.axis).to(dtype), None, None


class Probe:
    """Random cotangents on a tensor T: plain, weighted by cell, and by bits of the cells' numbers."""

    def __init__(self, out: Tensor, axis: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.noise = noise_on(out, generator)
        sizes = [n for a, n in enumerate(out.shape) if a != axis]
        self.cells = prod(sizes)
        self.bits = max(1, (self.cells - 1).bit_length())
        # numbers at random: neighbours differ in many bits
        self._number = torch.randperm(self.cells, generator=generator)
        self._sizes, self._axis = sizes, axis
        self.weight = torch.randn(self.cells, generator=generator).to(out.device)  # by cell
        self.weighted = self.noise * self._spread(self.weight)

    def _spread(self, values: Tensor) -> Tensor:
        """One value for each cell, as T."""
        return values.view(self._sizes).unsqueeze(self._axis).to(self.noise)

    def with_bit(self, bit: int) -> Tensor:
        """The noise on the cells whose number has the bit."""
        return self.noise * self._spread((self._number >> bit) & 1)

    def cell_of(self, number: Tensor) -> Tensor:
        """The cells with these numbers."""
        return torch.argsort(self._number).to(number.device)[number.clamp_max(self.cells - 1)]


def noise_on(out: Tensor, generator: torch.Generator) -> Tensor:
    """Away from zero everywhere."""
    sign = torch.randn(out.shape, generator=generator).sign()
    return (sign * (0.5 + torch.rand(out.shape, generator=generator))).to(out)


def watch_fused_norms(stack: ExitStack, see: Callable[[Any], None]) -> None:
    """Show what every fused norm returns: they are called as functions, and may come last in a model.

    Args:
        stack: puts the functions back.
        see: gets what one returned.
    """

    def normed(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        see(output)
        return output

    for holder in list(sys.modules.values()):
        for name in _FUSED_NORMS:
            own = getattr(holder, "__dict__", {}).get(name)
            if isinstance(own, FunctionType):
                stack.callback(setattr, holder, name, own)
                setattr(holder, name, partial(normed, own))
