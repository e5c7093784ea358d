"""The ViT to compare our models with: timm's VisionTransformer (arXiv 2010.11929), built on demand."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from mamba_attn.core.layout import TokenLayout
from mamba_attn.models._options import check_known, checked, parameters, sides


@checked
def vision_transformer(*, image_size: int | Sequence[int] = 224, drop_path: float = 0.0, **options: Any) -> nn.Module:
    """Build timm's VisionTransformer, with options named as in our models.

    Args:
        image_size: side, or (height, width), in pixels.
        drop_path: rate of stochastic depth.
        options: further arguments of timm's VisionTransformer, e.g. ``num_classes``, ``depth``, ``reg_tokens``.

    Raises:
        ImportError: timm is not installed.
        TypeError: an unknown option, or a value of another type.
        ValueError: a number out of range, or two that do not fit each other.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError("a ViT needs timm: pip install 'mamba_attn[timm]'") from error
    theirs = inspect.signature(VisionTransformer.__init__).parameters
    own = [name for name in parameters(VisionTransformer.__init__) if name not in ("img_size", "drop_path_rate")]
    check_known("vision_transformer", options, ["image_size", "drop_path", *own])
    patch, dim, heads = (options.get(n, theirs[n].default) for n in ("patch_size", "embed_dim", "num_heads"))
    height, width = sides(image_size)
    if dim % heads:
        raise ValueError(
            f"vision_transformer(embed_dim={dim}, num_heads={heads}): expected heads that divide embed_dim."
        )
    if min(height, width) < patch:
        raise ValueError(
            f"vision_transformer(image_size={image_size}, patch_size={patch}): expected an image of at least one patch."
        )
    model: Any = VisionTransformer(img_size=(height, width), drop_path_rate=drop_path, **options)
    model.image_size = (height, width)  # the attribute of our models
    built: nn.Module = model
    return built


def position_layout(model: nn.Module) -> TokenLayout | None:
    """Return the layout of the tokens with position embeddings in a timm ViT; all but patches count as class tokens.

    None for a model of another kind, or one without position embeddings.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    positions = getattr(model, "pos_embed", None)
    if grid is None or positions is None:
        return None
    return TokenLayout((grid[0], grid[1]), class_tokens=tuple(range(positions.shape[1] - grid[0] * grid[1])))
