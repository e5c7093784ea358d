"""Images without some of their tokens, instead of with other pixels in their place.

A sequence model runs on the tokens that are left, at their own positions: nothing is made up. Vim and ViTs do so
exactly. A model with grids (VMamba) cannot lose cells; there the scans lose them, exactly, by ``knockout``, and what
convolutions and MLPs still see in their place is the mean colour.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Bool, Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models._layers import full_precision
from mamba_attn.models.vim import VisionMamba
from mamba_attn.tracing.interventions import knockout
from mamba_attn.tracing.tracer import trace

_MAJORITY = 0.5  # a token is gone if at least this part of its patch is


def answers_without(
    model: nn.Module,
    images: Float[Tensor, "batch colours height width"],
    gone: Bool[Tensor, "batch height width"],
    run: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch classes"]:
    """Return a model's logits of images that have lost tokens.

    Args:
        model: a Vim, a timm ViT, or any model whose layers have a place in the image.
        images: normalised.
        gone: pixels; a token is gone if at least half of its patch is.
        run: calls the model, and returns its logits. Default: the model.

    Raises:
        UnsupportedModelError: a model none of whose layers has a place in the image.
    """
    run = model if run is None else run
    if isinstance(model, VisionMamba):
        layout = model.layout(*images.shape[2:])
    elif _is_vit(model):
        embed: Any = model.patch_embed
        layout = TokenLayout(tuple(embed.dynamic_feat_size(images.shape[2:])), tuple(embed.patch_size))
    else:
        return _knocked_out(model, images, gone, run)
    kept = ~_lost(layout, gone)
    logits = images.new_empty(0)
    for count in kept.sum(1).unique().tolist():  # images with equally many tokens run together
        (those,) = (kept.sum(1) == count).nonzero(as_tuple=True)
        part = images[those], kept[those]
        found = _vim(model, *part) if isinstance(model, VisionMamba) else _vit(model, *part, run)
        logits = logits if len(logits) else found.new_empty(len(images), *found.shape[1:])
        logits[those] = found
    return logits


def _is_vit(model: nn.Module) -> bool:
    """Whether a model is timm's VisionTransformer; others have its place for dropping, and rotary positions besides."""
    vits = sys.modules.get("timm.models.vision_transformer")
    return vits is not None and isinstance(model, vits.VisionTransformer)


def _lost(layout: TokenLayout, gone: Bool[Tensor, "batch height width"]) -> Bool[Tensor, "batch patches"]:
    rows, columns = layout.grid
    share = F.adaptive_avg_pool2d(gone.float().unsqueeze(1), (rows, columns))
    return share.flatten(1) >= _MAJORITY


def _vim(model: VisionMamba, images: Tensor, kept: Bool[Tensor, "batch patches"]) -> Tensor:
    layout = model.layout(*images.shape[2:])
    everything = torch.ones(len(kept), layout.tokens, dtype=torch.bool, device=kept.device)
    everything[:, layout.patches] = kept
    tokens = full_precision(model.embed(images))[everything].view(len(images), -1, model.pos_embed.shape[2])
    routes = model.routes(layout)
    if routes is None:
        tokens = _through(model, tokens, None)
    else:  # each image has orders of its own
        tokens = torch.cat([_through(model, tokens[[i]], _renumbered(routes, its)) for i, its in enumerate(everything)])
    logits: Tensor = model.head(_pooled(model, tokens, everything, layout))
    return logits


def _through(model: VisionMamba, tokens: Tensor, orders: Tensor | None) -> Tensor:
    for layer in model.layers:
        tokens = layer(tokens, orders)
    normed: Tensor = model.norm_f(tokens)
    return normed


def _pooled(model: VisionMamba, tokens: Tensor, kept: Tensor, layout: TokenLayout) -> Tensor:
    if not layout.class_tokens:
        return tokens.mean(1)
    place = kept[:, : layout.class_tokens[0]].sum(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), place]


def _renumbered(routes: Int[Tensor, "routes length"], kept: Bool[Tensor, " tokens"]) -> Int[Tensor, "routes left"]:
    """Return the routes over the tokens that are left, by their new numbers."""
    number = kept.cumsum(0) - 1
    return torch.stack([number[route[kept[route]]] for route in routes])


def _vit(model: Any, images: Tensor, kept: Bool[Tensor, "batch patches"], run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a timm ViT whose place for dropping patches, after the position embeddings, drops these."""

    def drop(module: nn.Module, args: tuple[Tensor], tokens: Tensor) -> Tensor:
        first = tokens[:, : model.num_prefix_tokens]
        patches = tokens[:, model.num_prefix_tokens :][kept].view(len(tokens), -1, tokens.shape[2])
        return torch.cat([first, patches], 1)

    handle = model.patch_drop.register_forward_hook(drop)
    try:
        return run(images)
    finally:
        handle.remove()


def _knocked_out(
    model: nn.Module, images: Tensor, gone: Bool[Tensor, "batch height width"], run: Callable[[Tensor], Tensor]
) -> Tensor:
    with torch.no_grad(), trace(model) as record:
        model(images[:1])
    layouts = {layer.name: layer.layout for layer in record.layers if layer.layout is not None}
    if not layouts:
        raise UnsupportedModelError(
            f"{type(model).__name__}: none of its layers has a place in the image, so no tokens can be dropped; fill "
            "with black, mean, blur or road instead."
        )
    filled = images.masked_fill(gone.unsqueeze(1), 0)  # the mean colour, after normalisation
    with ExitStack() as stack:
        for name, layout in layouts.items():
            lost = torch.zeros(len(images), layout.tokens, dtype=torch.bool, device=gone.device)
            lost[:, layout.patches] = _lost(layout, gone)
            stack.enter_context(knockout(model, layers=name, columns=lost))
        return run(filled)
