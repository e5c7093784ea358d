"""Norms with a fixed denominator: the formula that reproduces a module's own output."""

import torch
from torch import Tensor, nn

from mamba_attn.errors import UnsupportedModelError

_TOLERANCE = 64  # of the output's precision, relative to its largest value


def frozen_norm(module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Return the norm of x with its denominator detached, and the axis of its features, -1 or 1.

    Layer norms keep their mean in the graph, RMS norms have none. A class with a forward of its own may norm the last
    axis or, as LayerNorm2d, axis 1: taken is what reproduces its output.

    Args:
        module: the norm.
        x: its input.
        y: its own output.

    Raises:
        UnsupportedModelError: no formula reproduces the output.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    shape = getattr(module, "normalized_shape", None) or (None if weight is None else weight.shape)
    axes = [tuple(range(-len(shape), 0))] if shape is not None else []
    if type(module).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward) and shape is not None and len(shape) == 1:
        axes.append((1,))
    eps = getattr(module, "eps", None)
    eps = getattr(module, "variance_epsilon", None) if eps is None else eps
    centred = isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__
    for axis in axes:
        if [x.shape[k] for k in axis] == list(shape or ()):
            linear = _formula(x, axis, weight, bias, torch.finfo(x.dtype).eps if eps is None else eps, centred=centred)
            if _agree(linear, y):
                return linear, axis[0] if axis == (1,) else -1
    raise UnsupportedModelError(
        f"{type(module).__name__}: its output is neither a layer norm nor an RMS norm of its input over the features, "
        "so what would be held fixed in it is not known."
    )


def axis_of(module: nn.Module, y: Tensor) -> int:
    """Return the axis of a linear layer's outputs: -1, or 1 of convolutions and of linear layers that act as one."""
    if not isinstance(module, nn.Linear):
        return 1
    if type(module).forward is nn.Linear.forward or y.ndim != 4 or y.shape[1] != module.out_features:
        return -1
    return 1 if y.shape[-1] != module.out_features or "2d" in type(module).__name__ else -1


def _formula(
    x: Tensor, axis: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool
) -> Tensor:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    x = x - x.mean(axis, keepdim=True) if centred else x
    scale = torch.rsqrt(x.detach().square().mean(axis, keepdim=True) + eps)
    trailing = [1] * (x.ndim - 2) if axis == (1,) else []
    x = x * (scale if weight is None else scale * weight.detach().view(*weight.shape, *trailing))
    return x if bias is None else x + bias.view(*bias.shape, *trailing)


def _agree(linear: Tensor, y: Tensor) -> bool:
    """Whether two outputs are the same up to rounding."""
    if linear.shape != y.shape:
        return False
    difference = (linear.detach() - y).abs().max()
    allowed = _TOLERANCE * torch.finfo(y.dtype).eps * y.abs().max()
    return not bool(difference > allowed)  # NaN is the business of others
