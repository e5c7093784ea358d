"""The product of the layers' I + W, W the attention weighted by a gradient, less what the identities alone carry."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.attribution._stages import to_finer
from mamba_attn.tracing.layers import AnyLayer, Layer

Product = Callable[[Tensor], Tensor]  # row -> row @ W
Step = Callable[[AnyLayer], tuple[Product, Tensor | float]]


def roll_out(
    layers: Sequence[AnyLayer],
    start: Float[Tensor, "batch last_tokens"],
    step: Step[AnyLayer],
) -> Float[Tensor, "batch first_tokens"]:
    """Return ``start`` times the product of the layers' I + W, less what the identities alone carry.

    The two parts are carried apart: W can be thousands of times smaller than the identity.

    Args:
        layers: in execution order.
        start: over the tokens of the last layer.
        step: for a layer, the product with its W from the left, and what the rows of I + W are divided by.
    """
    alone, rest = start, torch.zeros_like(start)
    for index in reversed(range(len(layers))):
        product, divisor = step(layers[index])
        alone, rest = alone / divisor, rest / divisor
        rest = rest + product(alone + rest)
        if index > 0:
            finer, coarser = layers[index - 1].layout, layers[index].layout
            alone, rest = to_finer(alone, finer, coarser), to_finer(rest, finer, coarser)
    return rest


def of_one_token(layer: Layer, gradient: Tensor) -> Tensor:
    """Return the gradient of the logit as it were if the head read one token alone.

    A head that averages over tokens hands each of them 1 / tokens of the logit's gradient, and the query that stands
    for such a head averages over them once more; a class token is one token already.

    Args:
        layer: the layer.
        gradient: of the logit, of any shape.
    """
    layout = layer.layout
    return gradient if layout.class_tokens else gradient * len(layout.patches)


def dense(weighted: Float[Tensor, "batch tokens tokens"]) -> tuple[Product, float]:
    """Return the step of a W that is held as a matrix, nothing divided."""
    return lambda row: (row.unsqueeze(1) @ weighted).squeeze(1), 1.0
