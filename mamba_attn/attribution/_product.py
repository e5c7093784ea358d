"""The product of the layers' I + W, W the attention weighted by a gradient, less what the identities alone carry."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.attribution._stages import Downsampling, to_finer
from mamba_attn.layers import Layer

AnyLayer = TypeVar("AnyLayer", bound=Layer)
Product = Callable[[Tensor], Tensor]  # row -> row @ W
Step = Callable[[AnyLayer], tuple[Product, Tensor | float]]


def roll_out(
    layers: Sequence[AnyLayer],
    start: Float[Tensor, "batch last_tokens"],
    between: Sequence[Sequence[Downsampling]],
    step: Step[AnyLayer],
) -> Float[Tensor, "batch first_tokens"]:
    """Return ``start`` times the product of the layers' I + W, less what the identities alone carry.

    The two parts are carried apart: W can be thousands of times smaller than the identity.

    Args:
        layers: in execution order.
        start: over the tokens of the last layer.
        between: what lies between neighbouring layers, see ``downsamplings``.
        step: for a layer, the product with its W from the left, and what the rows of I + W are divided by.
    """
    alone, rest = start, torch.zeros_like(start)
    for index in reversed(range(len(layers))):
        product, divisor = step(layers[index])
        alone, rest = alone / divisor, rest / divisor
        rest = rest + product(alone + rest)
        if index > 0:
            finer, coarser, way = layers[index - 1].layout, layers[index].layout, between[index - 1]
            alone, rest = to_finer(alone, finer, coarser, way), to_finer(rest, finer, coarser, way)
    return rest


def dense(weighted: Float[Tensor, "batch tokens tokens"]) -> tuple[Product, float]:
    """Return the step of a W that is held as a matrix, nothing divided."""
    return lambda row: (row.unsqueeze(1) @ weighted).squeeze(1), 1.0
