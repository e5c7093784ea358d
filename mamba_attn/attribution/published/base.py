"""The three maps that published code makes of the class token's rows (arXiv 2403.01590 and 2405.16504).

Published code runs one image at a time: where it takes a minimum or a maximum of a tensor, here it is per image.
Its layers are the late ones, see ``late_layers``, unless the caller named some.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.attribution._base import Row, TokenAttribution
from mamba_attn.attribution._queries import Query
from mamba_attn.attribution._targets import Target
from mamba_attn.attribution.published.conventions import (
    Watch,
    broadcast_rollout,
    class_row,
    late_layers,
    min_max,
    require_class_token,
)
from mamba_attn.tracing.layers import ScanLayer, require

Vectors = list[Float[Tensor, "batch channels tokens"]]  # the class token's row, layer by layer


def raw_attention(vectors: Vectors) -> Float[Tensor, "batch tokens"]:
    """Per layer the rows scaled to 0..1 over channels and tokens together, the mean over channels; their mean."""
    return torch.stack([min_max(vector, (1, 2)).mean(1) for vector in vectors]).mean(0).clamp(min=0)


def attention_rollout(vectors: Vectors, token: int) -> Float[Tensor, "batch tokens"]:
    """The broadcast rollout of the signed means over channels; its positive part."""
    return broadcast_rollout([vector.mean(1) for vector in vectors], token).clamp(min=0)


def mamba_attribution(
    convention: str, vectors: Vectors, gradients: Sequence[Tensor], token: int
) -> Float[Tensor, "batch tokens"]:
    """The broadcast rollout of the rows' positive parts, channels averaged, times the weights of the tokens.

    "hidden_mamba" scales the positive parts to 0..1 over channels and tokens, "implicit_unified" the product over
    tokens.
    """
    fused = []
    for vector, gradient in zip(vectors, gradients, strict=True):
        positive, weight = vector.clamp(min=0), token_weight(gradient)
        if convention == "hidden_mamba":
            fused.append(min_max(positive, (1, 2)).mean(1) * weight)
        else:
            fused.append(min_max(positive.mean(1) * weight, (1,)))
    return broadcast_rollout(fused, token).clamp(min=0)


def token_weight(gradient: Float[Tensor, "batch *grid features"]) -> Float[Tensor, "batch tokens"]:
    """Return the published weight of every token: the gradient's positive part, its largest feature, scaled to 0..1.

    Args:
        gradient: of the target logit with respect to the mixer's output.
    """
    return min_max(gradient.flatten(1, -2).clamp(min=0).amax(2), (1,))


def explain(
    method: TokenAttribution, convention: str, inputs: Tensor, target: Target, query: Query | None,
    combine: Callable[[Vectors, list[Tensor], int], Tensor], *, gradients: bool = False,
) -> list[Row]:  # fmt: skip
    """Return the map that ``combine`` makes of the late layers' rows and of the gradients at their outputs.

    Args:
        method: whose model and layers.
        convention: "hidden_mamba" or "implicit_unified".
        inputs: as in ``attribute``.
        target: likewise.
        query: likewise; must be None.
        combine: function of (rows, gradients, index of the class token).
        gradients: whether it needs them.

    Raises:
        ValueError: a model without a class token, a query.
        UnsupportedModelError: layers that are softmax attention.
    """
    watch = Watch()
    rules = watch if convention == "implicit_unified" else None
    call = f"{type(method).__name__}(convention={convention!r})"
    with method._traced(inputs, target, gradients=gradients, rules=rules) as (record, logit):
        layers = require(call, record.layers, ScanLayer)
        token = require_class_token(call, method.model, layers, query)
        found: Mapping[str, Tensor] = record.gradients(logit, of="output") if gradients else {}
    chosen = layers if method.layers is not None else late_layers(layers)
    vectors = [class_row(convention, method.model, layer, token, watch) for layer in chosen]
    return [(chosen[0].layout, combine(vectors, [found[layer.name] for layer in chosen if gradients], token))]
