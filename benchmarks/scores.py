"""What a map is worth: its energy inside boxes, and what the model loses when its highest cells are deleted."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 8  # pixels: the patches of vim_micro and vit_micro, the same squares for vmamba_micro
FRACTION = 0.2  # of the cells is deleted
DRAWS = 2000  # resamplings of the bootstrap


@dataclass(frozen=True)
class Interval:
    """A figure over a sample of images, and how far resampling the images moves it (percentiles of a bootstrap)."""

    value: float
    low: float  # 2.5 %
    quartiles: tuple[float, float]
    high: float  # 97.5 %


def bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Interval:
    """Resample the images with replacement, the same ones in every sample.

    Args:
        statistic: of samples with any leading axes, over the last one.
        samples: (images,) each.
        seed: of the resampling.
    """
    count = len(samples[0])
    chosen = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    drawn = statistic(*(sample[chosen] for sample in samples))
    low, first, third, high = np.percentile(drawn, [2.5, 25, 75, 97.5])
    return Interval(float(statistic(*samples)), float(low), (float(first), float(third)), float(high))


def mean(sample: np.ndarray) -> np.ndarray:
    """Mean over images."""
    return np.asarray(sample.mean(-1))


def ratio_of_means(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Ratio of two means over images."""
    return np.asarray(numerator.mean(-1) / denominator.mean(-1))


def energy_inside(maps: Tensor, inside: Tensor) -> np.ndarray:
    """Return the share of every map's positive part that lies inside; a map without one counts as a uniform one.

    Args:
        maps: (images, rows, columns).
        inside: (images, rows, columns), in 0..1.
    """
    positive = maps.double().clamp(min=0)
    total = positive.sum((1, 2))
    share = (positive * inside).sum((1, 2)) / torch.where(total > 0, total, 1)
    area: Tensor = inside.double().mean((1, 2))
    return torch.where(total > 0, share, area).numpy()


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
