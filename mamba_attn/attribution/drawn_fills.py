"""What stands in the place of removed cells, several fills by turns: a map then belongs to none of them."""

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.blur import blurred
from mamba_attn.errors import nearest

FILLS = ("dark", "mean", "blur", "shuffle")


def fill_names(called: str, fills: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of fills.

    Args:
        called: whose argument they are, for the message.
        fills: one name, or several.

    Raises:
        ValueError: none, or an unknown one.
    """
    names = (fills,) if isinstance(fills, str) else tuple(fills)
    for name in names or ("",):
        if name not in FILLS:
            raise ValueError(f"{called}(fills={fills!r}): {nearest(name, FILLS)}")
    return names


def in_turn(
    fills: Sequence[str], images: Float[Tensor, "batch colours height width"], grid: tuple[int, int]
) -> Iterator[Float[Tensor, "batch colours height width"]]:
    """Yield the images' fills in turn, without end; of one image they are the same, wherever it is in a batch.

    Args:
        fills: "dark", the darkest value of each colour in the image; "mean", its mean colour; "blur", itself blurred;
            "shuffle", its cells in random order, drawn anew each time.
        images: as the model takes them.
        grid: rows and columns of the cells.
    """
    seeds = [zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes()) for image in images]
    drawn = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        for name in fills:
            if name == "shuffle":
                yield torch.stack([_shuffled(image, grid, each) for image, each in zip(images, drawn, strict=True)])
            else:
                yield _content(name, images)


def _content(fill: str, images: Float[Tensor, "batch colours height width"]) -> Tensor:
    if fill == "blur":
        return blurred(images)
    sides = (2, 3)
    flat = images.amin(sides, keepdim=True) if fill == "dark" else images.mean(sides, keepdim=True)
    return flat.expand_as(images)


def _shuffled(image: Tensor, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return an image with its cells in random order; rows and columns beyond whole cells stay."""
    rows, columns = grid
    high, wide = (max(1, side // count) for side, count in zip(image.shape[1:], grid, strict=True))
    part = image[:, : rows * high, : columns * wide]
    tiles = part.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).permute(1, 3, 0, 2, 4)
    order = torch.randperm(tiles.shape[0] * tiles.shape[1], generator=generator).to(image.device)
    mixed = tiles.flatten(0, 1)[order].unflatten(0, tiles.shape[:2]).permute(2, 0, 3, 1, 4)
    whole = image.clone()
    whole[:, : part.shape[1], : part.shape[2]] = mixed.reshape_as(part)
    return whole
