"""From the tokens of a coarse stage to those of the finer one before it: downsampling as an average."""

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import UnsupportedModelError


def to_finer(
    row: Float[Tensor, "batch coarse_tokens"], finer: TokenLayout, coarser: TokenLayout
) -> Float[Tensor, "batch fine_tokens"]:
    """Return ``row`` times the averaging matrix of what lies between two layers; its sum over patches is kept.

    A token takes the mean of the block of tokens that it covers. Convolutions with overlapping windows, as VMamba's of
    3 and stride 2, are treated so too: of all averages on their windows it is the only one that counts every token of
    the finer grid alike. Plain means over the windows count every other row and column twice, and one corner of the
    image more than the other. What a row has at the padding of windows goes nowhere: zeros, put there anew.

    Args:
        row: over the coarser layer's tokens.
        finer: token frame of the earlier layer.
        coarser: token frame of the later layer.

    Raises:
        UnsupportedModelError: frames of different grids that hold more than patches; a later grid that is finer.
    """
    if (finer.grid, finer.padded, finer.tokens) == (coarser.grid, coarser.padded, coarser.tokens):
        return row
    others = finer.class_tokens + finer.registers + coarser.class_tokens + coarser.registers
    if others or finer.grid[0] < coarser.grid[0] or finer.grid[1] < coarser.grid[1]:
        raise UnsupportedModelError(
            f"rollout from a grid of {finer.grid[0]}x{finer.grid[1]} to one of {coarser.grid[0]}x{coarser.grid[1]}: "
            "only patches, on grids that shrink, can be averaged; name the layers of one stage with layers=."
        )
    stride = round(coarser.step / finer.step)
    vertical, horizontal = (_blocks(finer.grid[axis], coarser.grid[axis], stride).to(row) for axis in (0, 1))
    fine = (vertical.mT @ coarser.to_grid(row) @ horizontal).flatten(1)
    return row.new_zeros(len(row), finer.tokens).index_copy(1, finer.patches.to(row.device), fine)


def _blocks(fine: int, coarse: int, stride: int) -> Float[Tensor, "coarse fine"]:
    """Means over blocks of so many neighbours, the last one maybe smaller; if that does not fit, as equal as can be."""
    owner = torch.arange(fine) // max(stride, 1)
    if owner[-1] != coarse - 1:
        owner = torch.arange(fine) * coarse // fine
    inside = (owner == torch.arange(coarse)[:, None]).double()
    return inside / inside.sum(1, keepdim=True)
