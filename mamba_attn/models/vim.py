"""Vim (arXiv 2401.09417) in plain PyTorch; parameter names and shapes are the official checkpoints'."""

import functools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import orders as patch_orders
from mamba_attn._types import Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.models._layers import DropPath, RMSNorm, full_precision
from mamba_attn.models._options import checked, sides
from mamba_attn.models.vim_mixer import VimMixer, finish, project

__all__ = ["VimMixer", "VisionMamba", "finish", "project", "resize_positions"]


class VimLayer(nn.Module):
    """Norm and mixer of one layer; the residual stream is the caller's."""

    def __init__(self, norm: nn.Module, mixer: VimMixer, drop_path: float) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(
        self, residual: Float[Tensor, "batch tokens features"], orders: Int[Tensor, "routes length"] | None = None
    ) -> Float[Tensor, "batch tokens features"]:
        """Return the residual stream after this layer."""
        mixed: Tensor = self.mixer(self.norm(residual), orders)
        return residual + cast(Tensor, self.drop_path(mixed))


class PatchEmbed(nn.Module):
    """Embed patches as tokens with one convolution.

    Args:
        features: size of a token.
        patch_size: side of a patch, in pixels.
        stride: distance between patches, in pixels.
    """

    def __init__(self, features: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride
        self.proj = nn.Conv2d(3, features, patch_size, stride)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the patch grid of an image.

        Raises:
            ValueError: the image is smaller than one patch.
        """
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than a patch of {self.patch_size} x "
                f"{self.patch_size}; give at least {self.patch_size} pixels per side."
            )
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def forward(self, images: Float[Tensor, "batch colours rows columns"]) -> Float[Tensor, "batch patches features"]:
        """Return the patches' tokens in raster order."""
        self.grid(*images.shape[-2:])
        patches: Tensor = self.proj(images)
        return patches.flatten(2).mT


class VisionMamba(nn.Module):
    """Vim: patches, a class token, ``depth`` bidirectional Mamba layers, a linear classifier.

    Any image size runs: position embeddings are interpolated bicubically when the grid is not the trained one.

    Args:
        image_size: side, or (height, width), in pixels, that the position embeddings are made for.
        patch_size: side of a patch, in pixels.
        stride: distance between patches, in pixels. Default: ``patch_size``.
        num_classes: outputs of the classifier; 0 leaves the features.
        embed_dim: size of a token.
        depth: number of layers.
        d_state: states per channel.
        d_conv: taps of the causal convolution.
        expand: channels per feature.
        class_token: where the class token stands, "middle" or "first"; None takes the mean over patches.
        order: the order in which the scans visit the patches, one of ``mamba_attn.orders.ORDERS``.
        drop_path: stochastic depth of the last layer while training, growing linearly from the first.
        if_divide_out: halve the sum of the two directions.

    Raises:
        ValueError: an unknown order or class token, a number out of range, an image smaller than one patch.
        TypeError: an unknown option, or a value of another type.

    Example:
        >>> VisionMamba(depth=2, class_token="first", order="spiral")(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 1000])
    """

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        class_token: str | None = "middle",
        order: str = "raster",
        drop_path: float = 0.0,
        if_divide_out: bool = True,
    ) -> None:
        super().__init__()
        self.class_token = class_token
        self.order = order
        self.num_classes = num_classes
        self.image_size = height, width = sides(image_size)
        self.patch_embed = PatchEmbed(embed_dim, patch_size, patch_size if stride is None else stride)
        if class_token is not None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.layout(height, width).tokens, embed_dim))
        self.layers = nn.ModuleList(
            VimLayer(
                RMSNorm(embed_dim),
                VimMixer(embed_dim, d_state=d_state, d_conv=d_conv, expand=expand, if_divide_out=if_divide_out),
                drop_path * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._initialise(depth)

    def layout(self, image_height: int, image_width: int) -> TokenLayout:
        """Return the layout of an image's tokens.

        Args:
            image_height: in pixels.
            image_width: in pixels.

        Raises:
            ValueError: the image is smaller than one patch.
        """
        grid = self.patch_embed.grid(image_height, image_width)
        positions = {"middle": (grid[0] * grid[1] // 2,), "first": (0,), None: ()}[self.class_token]
        return TokenLayout(grid, self.patch_embed.patch_size, self.patch_embed.stride, class_tokens=positions)

    def routes(self, layout: TokenLayout) -> Int[Tensor, "routes length"] | None:
        """Return the token visited at each step of the two routes; None if they run first to last and back."""
        if self.order == "raster":
            return None
        return _routes(self.order, layout.grid, layout.class_tokens, self.pos_embed.device)

    def forward(self, images: Float[Tensor, "batch colours rows columns"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images normalised with the ImageNet statistics."""
        logits: Tensor = self.head(self.pool(self.forward_features(images), *images.shape[-2:]))
        return logits

    def forward_features(
        self, images: Float[Tensor, "batch colours rows columns"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Return all tokens after the last norm."""
        layout = self.layout(*images.shape[-2:])
        orders = self.routes(layout)
        residual = full_precision(self.embed(images))
        for layer in self.layers:
            residual = layer(residual, orders)
        tokens: Tensor = self.norm_f(residual)
        return tokens

    def embed(self, images: Float[Tensor, "batch colours rows columns"]) -> Float[Tensor, "batch tokens features"]:
        """Return patches and class token with their position embeddings: the input of the first layer."""
        layout = self.layout(*images.shape[-2:])
        tokens: Tensor = self.patch_embed(images)
        for position in layout.class_tokens:
            class_token = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :position], class_token, tokens[:, position:]], dim=1)
        trained = self.layout(*self.image_size)
        return tokens + resize_positions(self.pos_embed, trained, layout)

    def pool(
        self, tokens: Float[Tensor, "batch tokens features"], image_height: int, image_width: int
    ) -> Float[Tensor, "batch features"]:
        """Return the class token, or the mean over patches of a model without one."""
        positions = self.layout(image_height, image_width).class_tokens
        return tokens[:, positions[0]] if positions else tokens.mean(1)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, as timm's optimisers expect."""
        marked = {name for name, value in self.named_parameters() if getattr(value, "_no_weight_decay", False)}
        return marked | {"pos_embed", "cls_token"}

    def _initialise(self, depth: int) -> None:
        """Apply the official initialisation; mixers initialise their own layers."""
        for tensor in (self.pos_embed, *([self.cls_token] if self.class_token else [])):
            nn.init.trunc_normal_(tensor, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        convolution = self.patch_embed.proj
        nn.init.trunc_normal_(convolution.weight, std=convolution.weight[0].numel() ** -0.5)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
        with torch.no_grad():
            for mixer in self.modules():
                if isinstance(mixer, VimMixer):
                    mixer.out_proj.weight /= math.sqrt(depth)


def resize_positions(
    pos_embed: Float[Tensor, "1 _ features"], old: TokenLayout, new: TokenLayout
) -> Float[Tensor, "1 _ features"]:
    """Interpolate position embeddings bicubically to another grid; the class token keeps its own.

    Args:
        pos_embed: position embeddings of the tokens of ``old``.
        old: the layout they were made for.
        new: the layout wanted.

    Example:
        >>> old, new = (TokenLayout(grid=grid, patch_size=16, class_tokens=(0,)) for grid in ((14, 14), (8, 8)))
        >>> resize_positions(torch.rand(1, 197, 192), old, new).shape
        torch.Size([1, 65, 192])
    """
    if old.grid == new.grid:
        return pos_embed
    patches = old.to_grid(full_precision(pos_embed).mT)
    resized = (
        F.interpolate(patches, size=new.grid, mode="bicubic", align_corners=False).flatten(2).mT.to(pos_embed.dtype)
    )
    for before, after in zip(old.class_tokens, new.class_tokens, strict=True):
        kept = pos_embed[:, before : before + 1]
        resized = torch.cat([resized[:, :after], kept, resized[:, after:]], dim=1)
    return resized


@functools.lru_cache(maxsize=64)
def _routes(order: str, grid: tuple[int, int], class_tokens: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor could not be used while training
        patches = patch_orders.order(order, *grid)
        return patch_orders.both_ways(patch_orders.insert_tokens(patches, class_tokens)).to(device)
