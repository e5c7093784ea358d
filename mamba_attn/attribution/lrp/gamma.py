"""The generalised gamma rule of linear layers and convolutions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba_attn.attribution.lrp.functional_layers import added_bias, bare_layer, own_weight
from mamba_attn.attribution.lrp.linear_rules import fitting, same_value
from mamba_attn.errors import nearest

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def generalised_gamma(
    module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor], gamma: float
) -> tuple[Tensor, Tensor | None]:
    """Return the layer's output with the gradient of the rule, and what its bias adds there.

    With w+ = max(w, 0), w- = min(w, 0), likewise x and b (arXiv 2406.07592): where the output z is positive,
    z' = (w + gamma w+) x+ + (w + gamma w-) x- + b + gamma b+; elsewhere w+ and w-, b+ and b- change places. The
    gradient is that of z' (z / z'), the ratio fixed. z' is z and gamma times its terms of z's own sign, so
    |z'| >= |z|: where z' is 0 so is z, and the layer hands on nothing.

    Args:
        module: the layer.
        x: its input.
        call: its own forward.
        gamma: at least 0.
    """
    with torch.no_grad():
        z = call(x)
    weight, bias = own_weight("the gamma rule", module), added_bias(module, x, z)
    raised, lowered = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
    plus, minus = torch.where(x > 0, x, 0), torch.where(x < 0, x, 0)
    by_raised, by_lowered = bare_layer(module, raised), bare_layer(module, lowered)
    constant: Tensor | None = None
    changed = torch.where(z > 0, by_raised(plus) + by_lowered(minus), by_lowered(plus) + by_raised(minus))
    if bias is not None:
        b = bias.detach()
        constant = torch.where(z > 0, b + gamma * b.clamp(min=0), b + gamma * b.clamp(max=0))
        changed = changed + constant
    zero = changed.detach() == 0
    ratio = torch.where(zero, 0, z / torch.where(zero, 1, changed.detach()))
    y = same_value(z, changed * ratio)
    return y, None if constant is None else constant * ratio


def check_gamma_layers(call: str, model: nn.Module, patterns: tuple[str, ...], gamma: float) -> None:
    """Refuse a gamma below 0, and patterns that fit no linear layer or convolution.

    Args:
        call: the name of the method, for the message.
        model: whose layers.
        patterns: of names.
        gamma: of the rule.

    Raises:
        ValueError: see above.
    """
    if not gamma >= 0:
        raise ValueError(f"{call}(gamma={gamma!r}): expected a number of at least 0.")
    names = [name for name, module in model.named_modules() if isinstance(module, _KINDS)]
    for pattern in patterns:
        if not any(fitting(name, (pattern,)) for name in names):
            raise ValueError(
                f"{call}(gamma_layers={pattern!r}): fits no linear layer and no convolution. {nearest(pattern, names)}"
            )
