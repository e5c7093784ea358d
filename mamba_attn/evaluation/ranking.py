"""Ranks the parts of an image by a map: cells of the token grid, or single pixels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Bool, Float, Int
from mamba_attn.errors import MambaAttnError, NonFiniteError
from mamba_attn.tracing.door_layers import AnyLayout
from mamba_attn.tracing.tracer import trace

_FEWEST = 14  # cells a side: the grid of the published protocol


def token_cell(model: nn.Module, images: Float[Tensor, "batch 3 height width"], layout: AnyLayout | None = None) -> int:
    """Return the side, in pixels, of the cells over which the model's maps are averaged before ranking.

    It is the coarsest token grid of the model with at least 14 cells a side (its finest, if none has that many): the
    patches of Vim and ViT, and for VMamba, whose grids halve from stage to stage, squares of the same size. A model
    that cannot be traced gets 14 cells a side.

    Args:
        model: any.
        images: as the model takes them.
        layout: as in ``mamba_attn.trace``.

    Example:
        >>> token_cell(model, images)
        16
    """
    side = min(images.shape[2:])
    try:
        with torch.no_grad(), trace(model, layout=layout) as record:
            model(images[:1])
            steps = {layer.layout.step for layer in record.layers if layer.layout is not None}
    except MambaAttnError:
        steps = set()
    if not steps:
        return max(1, side // _FEWEST)
    fine = [step for step in steps if side // step >= _FEWEST]
    return max(fine) if fine else min(steps)


def cells(maps: Float[Tensor, "batch height width"], cell: int) -> Float[Tensor, "batch rows columns"]:
    """Return the means of maps over square cells, cut off at the far edges, in float64.

    Args:
        maps: one per image.
        cell: side in pixels; 1 gives the pixels.
    """
    return F.avg_pool2d(maps.double().unsqueeze(1), cell, ceil_mode=True).squeeze(1)


def check_finite(maps: Float[Tensor, "batch height width"]) -> None:
    """Check that maps are finite.

    Raises:
        NonFiniteError: NaN or Inf.
    """
    broken = (~maps.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise NonFiniteError(f"maps: those of the images {broken} contain NaN or Inf and cannot be ranked.")


def constant(maps: Float[Tensor, "batch height width"]) -> Bool[Tensor, " batch"]:
    """Return which maps are constant."""
    flat = maps.flatten(1)
    return flat.amax(1) == flat.amin(1)


def ranking(maps: Float[Tensor, "batch height width"], cell: int, seeds: Sequence[int]) -> Int[Tensor, "batch cells"]:
    """Return the cells' indices, highest mean first.

    Equal cells come in random order: a constant map selects random cells, not the image's upper edge.

    Args:
        maps: one per image.
        cell: side in pixels; 1 ranks pixels.
        seeds: one per image, of the order of equal cells.

    Raises:
        NonFiniteError: NaN or Inf in a map.

    Example:
        >>> heat = torch.zeros(1, 4, 4)
        >>> heat[0, 0, 3] = 1
        >>> int(ranking(heat, cell=2, seeds=[0])[0, 0])  # the cell at the top right
        1
    """
    check_finite(maps)
    values = cells(maps, cell).flatten(1)
    shuffled = torch.stack(
        [torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(values.device)
    order = values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, order)


def to_pixels(
    chosen: Bool[Tensor, "*batch cells"], cell: int, size: tuple[int, int]
) -> Bool[Tensor, "*batch height width"]:
    """Expand cells to pixels.

    Args:
        chosen: which cells.
        cell: side in pixels.
        size: (rows, columns) of the image in pixels.
    """
    rows, columns = (-(-side // cell) for side in size)
    grid = chosen.unflatten(-1, (rows, columns))
    whole: Tensor = grid.repeat_interleave(cell, -2).repeat_interleave(cell, -1)
    return whole[..., : size[0], : size[1]]
