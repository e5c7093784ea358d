"""Norms with a fixed denominator: the formula that reproduces a module's own output."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mamba_attn.attribution.lrp.functional_layers import on_axis_1
from mamba_attn.errors import UnsupportedModelError

_TOLERANCE = 64  # of the output's precision, relative to its largest value
_PLAIN = (nn.LayerNorm.forward, nn.RMSNorm.forward)


def frozen_norm(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the norm of x with its denominator detached, and its bias as a tensor that broadcasts over it.

    Layer norms keep their mean in the graph, RMS norms have none. A class with a forward of its own may norm the last
    axis or, as LayerNorm2d, axis 1, and may move one to the place of the other: taken is what reproduces its output.

    Args:
        module: the norm.
        x: its input.
        y: its own output.

    Raises:
        UnsupportedModelError: no formula reproduces the output.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    shape = getattr(module, "normalized_shape", None) or (() if weight is None else weight.shape)
    own = type(module).forward not in _PLAIN and len(shape) == 1 and x.ndim > 2
    for axis in (-1, 1) if own else (-1,):
        moved = x.movedim(1, -1) if axis == 1 else x
        if not shape or list(moved.shape[-len(shape) :]) != list(shape):
            continue
        for linear, first in _frames(_formula(module, moved, len(shape), weight, bias), own=own):
            if _agree(linear, y):
                return linear, bias if bias is None or not first else on_axis_1(bias, linear)
    raise UnsupportedModelError(
        f"{type(module).__name__}: its output is neither a layer norm nor an RMS norm of its input over the features, "
        "so what would be held fixed in it is not known."
    )


def _frames(linear: Tensor, *, own: bool) -> Iterator[tuple[Tensor, bool]]:
    """The output with its features last and, of a class with its own forward, on axis 1; whether they are there."""
    yield linear, False
    if own:
        yield linear.movedim(-1, 1), True


def _formula(module: nn.Module, x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The norm over the last axes."""
    over = tuple(range(-axes, 0))
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__:
        x = x - x.mean(over, keepdim=True)
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(x.detach().square().mean(over, keepdim=True) + eps)
    x = x * (scale if weight is None else scale * weight.detach())
    return x if bias is None else x + bias


def _agree(linear: Tensor, y: Tensor) -> bool:
    """Whether two outputs are the same up to rounding."""
    if linear.shape != y.shape:
        return False
    difference = (linear.detach() - y).abs().max()
    allowed = _TOLERANCE * torch.finfo(y.dtype).eps * y.abs().max()
    return not bool(difference > allowed)  # NaN is the business of others
