"""Depthwise convolutions as weighted shifts of tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float, Int
from mamba_attn.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Taps:
    """Convolutions that some routes share, as shifts of tokens.

    Args:
        routes: which routes.
        weight: per tap.
        source: per tap, the token that each token reads.
        inside: per tap, whether there is one.
    """

    routes: slice
    weight: Float[Tensor, "channels taps"]
    source: Int[Tensor, "taps tokens"]
    inside: Tensor


def plain(parameter: Tensor, like: Tensor) -> Tensor:
    """Return a parameter's values, usable in autograd even where the model was made in inference mode."""
    return parameter.detach().to(like).clone()


def shifts(routes: slice, module: nn.Conv1d | nn.Conv2d, place: Tensor, *, conv: bool) -> Taps:
    """Return the taps along a line of tokens (causal) or over a grid of them; sources ordered as in ``place``.

    Args:
        routes: the routes that share them.
        module: the convolution.
        place: (tokens) or (rows, columns), the token at each place.
        conv: False for the identity in its stead.

    Raises:
        UnsupportedModelError: a padding that is no number.
    """
    channels = module.weight.shape[0]
    if not conv:
        one = module.weight.detach().new_ones(channels, 1)
        return Taps(routes, one, place.flatten()[None], torch.ones_like(place.flatten()[None], dtype=torch.bool))
    weight = module.weight.detach().clone().flatten(2)[:, 0]
    sources = []
    if isinstance(module, nn.Conv1d):
        width = weight.shape[1]
        padded = F.pad(place, (width - 1, 0), value=-1)
        sources = [padded[tap : tap + len(place)] for tap in range(width)]
    else:
        (up, left), (down, across) = _pair(module.padding), _pair(module.dilation)
        padded = F.pad(place, (left, left, up, up), value=-1)
        rows, columns = module.kernel_size
        sources = [
            padded[r * down : r * down + place.shape[0], c * across : c * across + place.shape[1]].flatten()
            for r in range(rows)
            for c in range(columns)
        ]
    source = torch.stack(sources)
    return Taps(routes, weight, source.clamp(min=0), source >= 0)


def _pair(value: int | str | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, str):
        raise UnsupportedModelError(f"ImplicitAttention: a convolution with padding={value!r} is not known.")
    return (value, value) if isinstance(value, int) else (value[0], value[1])
