"""From the tokens of a coarse stage to those of the finer one before it: downsampling as an average."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.layers import Layer
from mamba_attn.layout import TokenLayout


class Downsampling(NamedTuple):
    """A strided convolution, (rows, columns) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


def downsamplings(model: nn.Module, layers: Sequence[Layer]) -> list[list[Downsampling]]:
    """Return, for every pair of neighbouring layers, the strided convolutions that the model holds between them.

    Args:
        model: where the layers are; read, not touched.
        layers: in execution order.
    """
    modules = list(model.named_modules())
    place = {name: index for index, (name, _) in enumerate(modules)}
    between = []
    for finer, coarser in pairwise(layers):
        inside = (module for _, module in modules[place[finer.name] : place[coarser.name]])
        convolutions = (module for module in inside if isinstance(module, nn.Conv2d) and max(module.stride) > 1)
        between.append([found for module in convolutions if (found := _downsampling(module))])
    return between


def to_finer(
    row: Float[Tensor, "batch coarse_tokens"], finer: TokenLayout, coarser: TokenLayout, between: Sequence[Downsampling]
) -> Float[Tensor, "batch fine_tokens"]:
    """Return ``row`` times the averaging matrix of what lies between two layers; its sum is kept.

    Args:
        row: over the coarser layer's tokens.
        finer: token frame of the earlier layer.
        coarser: token frame of the later layer.
        between: the strided convolutions on the way. Where they do not lead from one grid to the other (patch merging
            is none) a token takes the mean of the block of tokens that it covers.

    Raises:
        UnsupportedModelError: frames of different grids that hold more than patches; a later grid that is finer.
    """
    if finer.grid == coarser.grid and finer.tokens == coarser.tokens:
        return row
    others = finer.class_tokens + finer.registers + coarser.class_tokens + coarser.registers
    if others or finer.grid[0] < coarser.grid[0] or finer.grid[1] < coarser.grid[1]:
        raise UnsupportedModelError(
            f"rollout from a grid of {finer.grid[0]}x{finer.grid[1]} to one of {coarser.grid[0]}x{coarser.grid[1]}: "
            "only patches, on grids that shrink, can be averaged; name the layers of one stage with layers=."
        )
    vertical, horizontal = (_chain(axis, finer.grid[axis], coarser.grid[axis], between).to(row) for axis in (0, 1))
    coarse = row.view(-1, *coarser.grid)
    return (vertical.mT @ coarse @ horizontal).flatten(1)


def _chain(axis: int, fine: int, coarse: int, between: Sequence[Downsampling]) -> Float[Tensor, "coarse fine"]:
    """The averaging matrix along one axis; rows sum to 1."""
    matrix = torch.eye(fine, dtype=torch.float64)
    for step in between:
        matrix = _windows(matrix.shape[0], step.kernel[axis], step.stride[axis], step.padding[axis]) @ matrix
    return matrix if matrix.shape[0] == coarse else _blocks(fine, coarse)


def _windows(fine: int, kernel: int, stride: int, padding: int) -> Float[Tensor, "coarse fine"]:
    """Means over a convolution's windows, a token that k of them see weighted by 1 / k; padding is not counted.

    Without the weights the windows' overlap would print its own lattice on every map: of a kernel of 3 and a stride of
    2, tokens between two windows would count twice, those in the middle of one once.
    """
    coarse = (fine + 2 * padding - kernel) // stride + 1
    distance = torch.arange(fine) - (torch.arange(coarse)[:, None] * stride - padding)
    inside = ((distance >= 0) & (distance < kernel)).double()
    shared = inside / inside.sum(0).clamp(min=1)
    return shared / shared.sum(1, keepdim=True)


def _blocks(fine: int, coarse: int) -> Float[Tensor, "coarse fine"]:
    """Means over blocks of neighbours, as equal as they can be; an odd side halved, rounding up, leaves one alone."""
    owner = torch.arange(fine) * coarse // fine
    inside = (owner == torch.arange(coarse)[:, None]).double()
    return inside / inside.sum(1, keepdim=True)


def _downsampling(module: nn.Conv2d) -> Downsampling | None:
    """Its geometry, unless it is padded by a word or dilated."""
    if isinstance(module.padding, str) or set(module.dilation) != {1}:
        return None
    return Downsampling(
        (module.kernel_size[0], module.kernel_size[1]),
        (module.stride[0], module.stride[1]),
        (module.padding[0], module.padding[1]),
    )
