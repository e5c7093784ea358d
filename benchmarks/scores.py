"""What a map is worth: its energy inside boxes, and what the model loses when its highest cells are deleted."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn.evaluation.localisation import energy_share

CELL = 8  # pixels: the patches of vim_micro and vit_micro, the same squares for vmamba_micro
FRACTION = 0.2  # of the cells is deleted


def energy_inside(maps: Tensor, inside: Tensor) -> np.ndarray:
    """Return the share of every map's positive part that lies inside, as ``mamba_attn.evaluation.energy_share``."""
    return energy_share(maps.double().numpy(), inside.double().numpy())


def top_cells(maps: Tensor, seed: int, cell: int = CELL, fraction: float = FRACTION) -> Tensor:
    """Return where the highest cells are, in pixels: (images, rows, columns) bool.

    Args:
        maps: (images, rows, columns); their positive part is averaged over cells, cut off at the far edges.
        seed: of the order in which equal cells are taken, so that a constant map takes random ones.
        cell: side in pixels.
        fraction: of the cells, rounded to a whole number of them.
    """
    rows, columns = maps.shape[1:]
    cells = F.avg_pool2d(maps.clamp(min=0).unsqueeze(1), cell, ceil_mode=True).squeeze(1)
    values = cells.flatten(1)
    order = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    ranked = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))
    top = torch.zeros_like(values, dtype=torch.bool)
    top.scatter_(1, ranked[:, : round(fraction * values.shape[1])], True)
    return top.view_as(cells).repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :rows, :columns]


def probabilities(model: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Softmax probabilities, (images, classes), or that of one class per image, (images,)."""
    with torch.no_grad():
        found: Tensor = model(images).softmax(1)
    return found if classes is None else found.gather(1, classes[:, None]).squeeze(1)


def deleted(images: Tensor, where: Tensor) -> Tensor:
    """Normalised images with some pixels set to the mean colour, 0."""
    return images.masked_fill(where.unsqueeze(1), 0)


def random_map(shape: tuple[int, int, int], seed: int, cell: int = CELL) -> Tensor:
    """Return maps of independent uniform cells, (images, rows, columns)."""
    images, rows, columns = shape
    cells = torch.rand(images, -(-rows // cell), -(-columns // cell), generator=torch.Generator().manual_seed(seed))
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :rows, :columns]


def centred_map(shape: tuple[int, int, int]) -> Tensor:
    """Return Gaussians about the centre, standard deviation a quarter of each side: where objects mostly are."""
    images, rows, columns = shape
    vertical, horizontal = (
        torch.exp(-0.5 * ((torch.arange(side) + 0.5 - side / 2) / (side / 4)) ** 2) for side in (rows, columns)
    )
    return (vertical[:, None] * horizontal).expand(images, -1, -1)
