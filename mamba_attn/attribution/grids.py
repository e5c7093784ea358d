"""From numbers per token to maps of the inputs: on the tokens' grid, in pixels, in every colour."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout

Row = tuple[TokenLayout, Tensor]  # one number per token (batch, tokens), and the layout of the tokens


def rendered(call: str, rows: Sequence[Row], size: tuple[int, ...], grid: bool) -> Float[Tensor, "batch 1 *size"]:
    """Return the mean of the rows' maps.

    Args:
        call: the name of the caller, for the message.
        rows: of layers on one or several grids.
        size: of the images in pixels.
        grid: stay on the tokens' grid.

    Raises:
        ValueError: layers on several grids, and their maps are to stay there.
    """
    merged: dict[TokenLayout, Tensor] = {}
    # interpolation is linear, so rows on the same grid are summed first: one interpolation per grid
    for layout, values in rows:
        merged[layout] = merged[layout] + values if layout in merged else values
    if grid and len({layout.grid for layout in merged}) > 1:
        grids = ", ".join("x".join(map(str, layout.grid)) for layout in merged)
        raise ValueError(
            f"{call}(grid=True): the layers are on several grids ({grids}); choose the "
            "layers of one grid with layers=, or leave grid=False for a map in pixels."
        )
    # a token of a coarser grid spreads its value over the finer tokens that it covers
    finest = max(len(layout.patches) for layout in merged)
    maps = [layout.to_grid(values) * (len(layout.patches) / finest) for layout, values in merged.items()]
    with torch.autocast(maps[0].device.type, enabled=False):  # half precision is the model's, not the map's
        if not grid:
            sizes = [size[-len(layout.grid) :] for layout in merged]
            maps = [layout.to_pixels(each, its) for layout, each, its in zip(merged, maps, sizes, strict=True)]
        return (torch.stack(maps).sum(0) / len(rows)).unsqueeze(1)


def in_every_colour(maps: Tensor, images: Tensor) -> Tensor:
    """Maps in the images' shape, an equal part in every colour; spectrograms have none."""
    if maps.ndim > images.ndim:
        return maps.squeeze(1)
    axis = 1 if maps.shape[2:] == images.shape[2:] else 2  # of the colours: a video's frames may stand second
    return (maps.movedim(1, axis) / images.shape[axis]).expand_as(images).contiguous()


def frames_stand_second(layout: TokenLayout, shape: tuple[int, ...]) -> bool:
    """Whether a video is (batch, frames, colours, height, width), as what its tokens cover says."""
    either = (shape[2], *shape[3:]), (shape[1], *shape[3:])
    distance = [sum(abs(a - b) for a, b in zip(layout.covered, sizes, strict=False)) for sizes in either]
    return len(layout.grid) == 3 and distance[1] < distance[0]


def cell_means(
    maps: Float[Tensor, "batch 1 rows columns"], layout: TokenLayout
) -> Float[Tensor, "batch 1 height width"]:
    """Return the mean over each token's cell: the pixels nearer to its centre than to any other."""
    vertical, horizontal = (
        _means(pixels, count, layout).to(maps) for pixels, count in zip(maps.shape[2:], layout.grid, strict=True)
    )
    return vertical @ maps @ horizontal.mT


def _means(pixels: int, count: int, layout: TokenLayout) -> Float[Tensor, "count pixels"]:
    position = (torch.arange(pixels, dtype=torch.float64) + 0.5 - layout.centre) / layout.step
    owner = (position + 0.5).floor().clamp(0, count - 1)
    inside = (owner == torch.arange(count)[:, None]).double()
    return inside / inside.sum(1, keepdim=True).clamp(min=1)
