"""VMamba (arXiv 2401.10166) in plain PyTorch; parameter names and shapes are the official checkpoints'.

Both released generations: v0 ("vanilla": gated, 16 states, no MLP) and v05_noz. Tensors are channels last inside.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.models._layers import DropPath
from mamba_attn.models._options import checked, sides
from mamba_attn.models.ss2d import SS2D, finish, project

__all__ = ["SS2D", "VSSM", "VSSBlock", "finish", "project"]


class Mlp(nn.Module):
    """Two linear layers with GELU in between."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Transform every token independently."""
        output: Tensor = self.fc2(self.act(self.fc1(x)))
        return output


class VSSBlock(nn.Module):
    """x + op(norm(x)), then, with an MLP, x + mlp(norm2(x)).

    Args:
        features: size of a token.
        op: the mixer.
        mlp_ratio: hidden features of the MLP per feature; 0 for no MLP.
        drop_path: rate of stochastic depth while training.

    Example:
        >>> from mamba_attn.models.ss2d import SS2D
        >>> VSSBlock(16, SS2D(16), mlp_ratio=4.0, drop_path=0.0)(torch.rand(2, 4, 6, 16)).shape
        torch.Size([2, 4, 6, 16])
    """

    def __init__(self, features: int, op: SS2D, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.op = op
        self.drop_path = DropPath(drop_path)
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(features)
            self.mlp: Mlp | None = Mlp(features, int(mlp_ratio * features))
        else:
            self.mlp = None

    def forward(self, x: Float[Tensor, "batch height width features"]) -> Float[Tensor, "batch height width features"]:
        """Return the residual stream after this block."""
        mixed: Tensor = self.op(self.norm(x))
        x = x + self.drop_path(mixed)
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm2(x)))


class ChannelsLast(nn.Module):
    """Images (batch, features, rows, columns) to tokens (batch, rows, columns, features)."""

    def forward(self, x: Float[Tensor, "batch features rows columns"]) -> Float[Tensor, "batch rows columns features"]:
        """Move the features to the end."""
        return x.movedim(1, 3)


class ChannelsFirst(nn.Module):
    """Tokens (batch, rows, columns, features) to images (batch, features, rows, columns)."""

    def forward(self, x: Float[Tensor, "batch rows columns features"]) -> Float[Tensor, "batch features rows columns"]:
        """Move the features to the front."""
        return x.movedim(3, 1)


class PatchMerging(nn.Module):
    """Downsampling of v0: concatenate four neighbours, normalise, project; odd sides are padded with zeros."""

    def __init__(self, features: int, output: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * features)
        self.reduction = nn.Linear(4 * features, output, bias=False)

    def forward(self, x: Float[Tensor, "batch rows columns features"]) -> Float[Tensor, "batch height width output"]:
        """Halve the grid, rounding up."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        output: Tensor = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return output


class Stage(nn.Module):
    """Blocks at one resolution, then downsampling."""

    def __init__(self, blocks: Sequence[VSSBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "batch height width features"]) -> Float[Tensor, "batch rows columns output"]:
        """Run the blocks and downsample."""
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.downsample(x)
        return output


class Classifier(nn.Module):
    """Norm, mean over the grid, linear layer."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Float[Tensor, "batch height width features"]) -> Float[Tensor, "batch classes"]:
        """Return the logits from the tokens of the last stage."""
        logits: Tensor = self.head(self.norm(x).mean((1, 2)))
        return logits


class VSSM(nn.Module):
    """VMamba: four stages of SS2D blocks. Any image size runs.

    Args:
        image_size: side, or (height, width), in pixels; checked, otherwise without effect: nothing is tied to a size.
        num_classes: outputs of the classifier; 0 leaves the features.
        dims: size of a token in each stage, or that of the first, doubled from stage to stage.
        depths: blocks of each stage.
        d_state: states per channel.
        ssm_ratio: channels of a mixer per feature.
        mlp_ratio: hidden features of the MLPs per feature; 0 for no MLPs.
        generation: "v05_noz", or "v0": gated mixers, a biased convolution, 4x4 patches, patch merging.
        order: order of the first route, one of ``mamba_attn.orders.ORDERS``.
        second: how the second route views the grid, "transpose" or "mirror".
        drop_path: stochastic depth of the last block while training, growing linearly from the first.

    Raises:
        ValueError: an unknown generation, order or second view; a number out of range; an image too small for the
            patches.
        TypeError: an unknown option, or a value of another type.

    Example:
        >>> VSSM(dims=16, depths=(1, 1, 1, 1))(torch.zeros(1, 3, 64, 100)).shape
        torch.Size([1, 1000])
    """

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        dims: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        generation: str = "v05_noz",
        order: str = "raster",
        second: str = "transpose",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [dims << stage for stage in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(widths) != len(depths):
            raise ValueError(f"VSSM(dims={dims}, depths={depths}): expected one entry of each per stage.")
        if int(ssm_ratio * min(widths)) < 1 or (generation != "v0" and widths[0] < 2):
            raise ValueError(
                f"VSSM(dims={dims}, ssm_ratio={ssm_ratio}): a layer would have no channels; use larger numbers."
            )
        self.generation = generation
        self.num_classes = num_classes
        self.order = order
        self.second = second
        self.image_size = height, width = sides(image_size)
        self.layout(height, width, 0)
        v0 = generation == "v0"
        self.patch_embed = _patch_embed_v1(widths[0]) if v0 else _patch_embed_v2(widths[0])
        mixer = {"d_state": d_state, "ratio": ssm_ratio, "gated": v0, "conv_bias": v0, "order": order, "second": second}
        rates = iter(drop_path * block / max(sum(depths) - 1, 1) for block in range(sum(depths)))
        self.layers = nn.ModuleList()
        for stage, (features, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [
                VSSBlock(features, SS2D(features, **mixer), mlp_ratio, next(rates))  # type: ignore[arg-type]
                for _ in range(depth)
            ]
            down: nn.Module = nn.Identity()
            if stage + 1 < len(widths):
                down = (PatchMerging if v0 else _downsample_v3)(features, widths[stage + 1])
            self.layers.append(Stage(blocks, down))
        self.classifier = Classifier(widths[-1], num_classes)
        self.apply(_initialise)

    def layout(self, image_height: int, image_width: int, stage: int) -> TokenLayout:
        """Return where the tokens of a stage sit in an image.

        Args:
            image_height: in pixels.
            image_width: in pixels.
            stage: number of the stage, from 0.

        Raises:
            ValueError: the image is smaller than one patch.
        """
        smallest = 4 if self.generation == "v0" else 1
        if min(image_height, image_width) < smallest:
            raise ValueError(
                f"an image of {image_height} x {image_width} pixels leaves a stage of this VMamba without tokens; "
                f"the smallest possible size is {smallest} x {smallest}."
            )
        height, width = (
            side // 4 if self.generation == "v0" else -(-side // 4) for side in (image_height, image_width)
        )
        for _ in range(stage):
            height, width = (height + 1) // 2, (width + 1) // 2
        offset = None if self.generation == "v0" else 0.5  # centres of padded 3x3 convolutions
        return TokenLayout(grid=(height, width), patch_size=4 << stage, offset=offset)

    def forward(self, images: Float[Tensor, "batch colours rows columns"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images normalised with the ImageNet statistics."""
        logits: Tensor = self.classifier(self.forward_features(images))
        return logits

    def forward_features(
        self, images: Float[Tensor, "batch colours rows columns"]
    ) -> Float[Tensor, "batch height width features"]:
        """Return the tokens after the last stage."""
        self.layout(images.shape[2], images.shape[3], 0)
        x: Tensor = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
        return x

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, as timm's optimisers expect."""
        return {name for name, value in self.named_parameters() if getattr(value, "_no_weight_decay", False)}


def _patch_embed_v1(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, features, 4, 4), ChannelsLast(), nn.LayerNorm(features))


def _patch_embed_v2(features: int) -> nn.Sequential:
    half = features // 2
    first = [nn.Conv2d(3, half, 3, 2, 1), ChannelsLast(), nn.LayerNorm(half), ChannelsFirst(), nn.GELU()]
    return nn.Sequential(*first, nn.Conv2d(half, features, 3, 2, 1), ChannelsLast(), nn.LayerNorm(features))


def _downsample_v3(features: int, output: int) -> nn.Sequential:
    return nn.Sequential(ChannelsFirst(), nn.Conv2d(features, output, 3, 2, 1), ChannelsLast(), nn.LayerNorm(output))


def _initialise(module: nn.Module) -> None:
    """The official initialisation of linear layers; the rest keeps PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
