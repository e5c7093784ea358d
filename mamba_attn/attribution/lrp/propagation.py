"""How relevance goes through one operation: arXiv 2012.09838 (section 3) and its code, alpha = 1, beta = 0.

Every rule conserves: what goes in sums to what came out, up to outputs that are zero. Element-wise operations
(activations, norms, softmax, layer scale) pass relevance on unchanged and have no function here.
"""

import torch
from torch import Tensor

from mamba_attn._types import Float

_SMALL = 1e-9


def divide(a: Tensor, b: Tensor) -> Tensor:
    """A / b, moved away from zero by 1e-9, and 0 where b is 0."""
    away = b + torch.where(b < 0, -_SMALL, _SMALL)
    return torch.where(b == 0, 0, a / away)


def linear(
    relevance: Float[Tensor, "*batch outputs"],
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
) -> Float[Tensor, "*batch inputs"]:
    """Through x @ weight^T + bias: in proportion to the positive products x_i w_ji, the bias left out."""
    high, low = weight.clamp(min=0), weight.clamp(max=0)
    positive, negative = x.clamp(min=0), x.clamp(max=0)
    share = divide(relevance, positive @ high.mT + negative @ low.mT)
    return positive * (share @ high) + negative * (share @ low)


def product(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Through a @ b: in proportion to each term, half to either factor."""
    share = divide(relevance, a @ b) / 2
    return a * (share @ b.mT), b * (a.mT @ share)


def add(
    relevance: Float[Tensor, "batch *shape"], a: Float[Tensor, "batch *shape"], b: Float[Tensor, "batch *shape"]
) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
    """Through a + b: in proportion to both, then each scaled, image by image, to |its sum| of all."""
    share = divide(relevance, a + b)
    parts = (a * share, b * share)
    sums = [part.flatten(1).sum(1) for part in parts]
    total = divide(relevance.flatten(1).sum(1), sums[0].abs() + sums[1].abs())
    first, second = (
        part * divide(own.abs() * total, own).view(-1, *[1] * (part.ndim - 1))
        for part, own in zip(parts, sums, strict=True)
    )
    return first, second


def mean(relevance: Float[Tensor, "batch features"], x: Float[Tensor, "batch tokens features"]) -> Tensor:
    """Through a mean over tokens: in proportion to each token's part, which conserves like the rules above."""
    return x * divide(relevance, x.sum(1)).unsqueeze(1)
