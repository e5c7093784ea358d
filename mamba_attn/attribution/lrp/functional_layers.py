"""Linear layers and convolutions apart from their modules: with another weight, and what their bias adds."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba_attn.errors import UnsupportedModelError


def bare_layer(module: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the layer's function with another weight and no bias; the module itself is left alone."""
    other = copy.copy(module)
    other.__dict__.pop("forward", None)
    other._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    forward: Callable[[Tensor], Tensor] = other.forward
    return forward


def own_weight(call: str, module: nn.Module) -> Tensor:
    """Return a layer's weight.

    Args:
        call: what needs it, for the message.
        module: the layer.

    Raises:
        UnsupportedModelError: a layer that computes its weight.
    """
    weight = module._parameters.get("weight")
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{call} needs a layer's weight, and this {type(module).__name__} computes its own; leave it out of "
            "gamma_layers, or merge what computes it."
        )
    return weight.detach()


def added_bias(module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """Return what a layer's bias adds to its output, as a tensor that broadcasts over it; None without one.

    Features are last in linear layers, on axis 1 in convolutions. Foreign linear layers may have them on either, where
    their sizes do not tell, the output without the bias does.

    Args:
        module: the layer.
        x: its input.
        y: its output.
    """
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        return None
    if not isinstance(module, nn.Linear):
        return on_axis_1(bias, y)
    if type(module).forward is nn.Linear.forward or y.shape[1] != len(bias) or y.ndim < 3:
        return bias
    if y.shape[-1] != len(bias):
        return on_axis_1(bias, y)
    with torch.no_grad():
        return y.detach() - bare_layer(module, own_weight("the share of its bias", module))(x)


def on_axis_1(vector: Tensor, like: Tensor) -> Tensor:
    """Return a vector over features as a tensor that broadcasts over one that has them on axis 1."""
    return vector.view(-1, *[1] * (like.ndim - 2))
