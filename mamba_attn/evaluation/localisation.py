"""Localisation: does a map highlight the object? Segmentation metrics, the pointing game, energy inside.

Pixel accuracy, mAP and mIoU follow the ImageNet-Segmentation protocol of Chefer et al., CVPR 2021: the map, scaled to
0..1 per image, is foreground above its own mean; a pixel's scores for (background, foreground) are (1 - map, map), and
both channels form one ranking per image, which is why the scaling matters.

Objects stand in the middle of photos, and a map that is always bright there scores well on all of these. The shuffled
area under the ROC curve (Tatler et al., Vision Research 2005; Zhang et al., 2008, for eye fixations) is free of that:
the area of the image's own object, less the mean area that the same map has for the objects of other images.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.evaluation.ranking import check_finite, constant

HALF = 0.5  # fraction of a pixel from which it counts as the object's


@dataclass(frozen=True)
class Located:
    """The scores of one map on one image; sums and counts, to form ratios over a set of images.

    Args:
        area: share of the image that the object covers.
        correct: pixels on the right side of the threshold.
        pixels: number of pixels of the image.
        intersections: pixels that (background, foreground) share with the truth.
        unions: pixels that either of them has.
        precision: average precision of the pooled channels.
        hit: share of the map's highest pixels that lie on the object; None without an object.
        energy: share of the map's positive part on the object; None without an object.
        distractor_area: share of the image that the distractor covers; None without a distractor.
        distractor_energy: share of the map's positive part on the distractor.
        above_distractor: area under the ROC curve of the object against the distractor alone; None without either.
        one_class: the truth is all object or all background.
        constant: all values of the map are equal.
        area_under: of the ROC curve of the map as a detector of the object's pixels; None where all or none are.
        elsewhere: the mean of the same over the objects of other images; None without one.

    Example:
        >>> inside = torch.zeros(8, 8)
        >>> inside[:4] = 1
        >>> found = locate(inside.clone(), inside)
        >>> found.area, found.hit, found.energy
        (0.5, 1.0, 1.0)
    """

    area: float
    correct: int
    pixels: int
    intersections: tuple[int, int]
    unions: tuple[int, int]
    precision: float
    hit: float | None
    energy: float | None
    distractor_area: float | None
    distractor_energy: float | None
    above_distractor: float | None
    one_class: bool
    constant: bool
    area_under: float | None
    elsewhere: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a JSON file."""
        return asdict(self)


def locate(
    values: Float[Tensor, "rows columns"],
    inside: Float[Tensor, "height width"],
    distractor: Float[Tensor, "height width"] | None = None,
    others: Sequence[Float[Tensor, "height width"]] = (),
) -> Located:
    """Score one map by where the object is.

    Args:
        values: the map, in pixels.
        inside: the fraction of every pixel that is the object's, in 0..1.
        distractor: the same for a distractor that resembles the object.
        others: the same for the objects of other images of the collection.

    Raises:
        ValueError: sizes that differ.
        NonFiniteError: NaN or Inf in the map.

    Example:
        >>> inside = torch.zeros(8, 8)
        >>> inside[:4] = 1
        >>> locate(1 - inside, inside).hit  # the maximum is outside
        0.0
    """
    if values.shape != inside.shape:
        raise ValueError(f"locate: the map has {tuple(values.shape)} pixels, the truth {tuple(inside.shape)}.")
    check_finite(values.unsqueeze(0))
    array, part = values.detach().double().cpu().numpy(), inside.double().cpu().numpy()
    truth, scaled = part >= HALF, unit_range(array)
    found = scaled > scaled.mean()
    both = [((~truth, ~found), (truth, found))[channel] for channel in (0, 1)]
    known = bool(truth.any())
    other = None if distractor is None else distractor.double().cpu().numpy()
    own, *theirs = areas_under(array, [truth, *(each.cpu().numpy() >= HALF for each in others)])
    apart = [area for area in theirs if area is not None]
    return Located(
        area=float(part.mean()),
        correct=int((truth == found).sum()),
        pixels=truth.size,
        intersections=(int((both[0][0] & both[0][1]).sum()), int((both[1][0] & both[1][1]).sum())),
        unions=(int((both[0][0] | both[0][1]).sum()), int((both[1][0] | both[1][1]).sum())),
        precision=average_precision(
            np.concatenate([~truth.ravel(), truth.ravel()]), np.concatenate([1 - scaled.ravel(), scaled.ravel()])
        ),
        hit=float(part[array == array.max()].mean()) if known else None,
        energy=float(energy_share(array, part)) if known else None,
        distractor_area=None if other is None else float(other.mean()),
        distractor_energy=None if other is None else float(energy_share(array, other)),
        above_distractor=None if other is None else area_between(array, truth, other >= HALF),
        one_class=bool(truth.all() or not known),
        constant=bool(constant(values.unsqueeze(0))[0]),
        area_under=own,
        elsewhere=sum(apart) / len(apart) if apart else None,
    )


def unit_range(values: np.ndarray) -> np.ndarray:
    """Return a map scaled to 0..1; a constant one becomes 1/2 everywhere: no ranking, no foreground."""
    low, high = values.min(), values.max()
    return np.full_like(values, HALF) if high == low else (values - low) / (high - low)


def energy_share(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the share of a map's positive part that lies inside; a map without one counts as a uniform one.

    Args:
        values: (..., rows, columns).
        inside: (..., rows, columns), in 0..1.

    Example:
        >>> float(energy_share(np.array([[3.0, 1.0]]), np.array([[1.0, 0.0]])))
        0.75
    """
    positive = np.maximum(np.asarray(values, dtype=np.float64), 0)
    total, area = positive.sum((-2, -1)), np.asarray(inside, dtype=np.float64).mean((-2, -1))
    share = (positive * inside).sum((-2, -1)) / np.where(total > 0, total, 1)
    return np.asarray(np.where(total > 0, share, area))


def areas_under(values: np.ndarray, truths: Sequence[np.ndarray]) -> list[float | None]:
    """Return the area under the ROC curve of a map for each truth: the chance that a pixel inside is above one outside.

    Equal values count one half, as in scikit-learn. None where a truth is all or nothing.

    Args:
        values: of any shape.
        truths: of the same shape, of bool each.
    """
    flat = values.ravel()
    _, place, counts = np.unique(flat, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place.ravel()]  # from 1 on, equal values at their mean
    found: list[float | None] = []
    for truth in truths:
        inside, outside = int(truth.sum()), int(truth.size - truth.sum())
        above = ranks[truth.ravel()].sum() - inside * (inside + 1) / 2
        found.append(float(above / (inside * outside)) if inside and outside else None)
    return found


def area_between(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the chance that a pixel of one place is above one of another, equal values one half; None without either.

    It knows nothing of the rest of the image: 1/2 for a map that cannot tell the two apart, wherever they are.

    Args:
        values: (rows, columns).
        first: (rows, columns) of bool.
        second: (rows, columns) of bool; what is in both counts for neither.
    """
    either = first ^ second
    return areas_under(values[either], [first[either]])[0]


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean precision over the positives, in the order of the scores; equal scores form one step.

    The sum of (recall_n - recall_(n-1)) x precision_n over distinct scores, without interpolation, as in scikit-learn.

    Args:
        truth: (items,) bool.
        scores: (items,).

    Example:
        >>> average_precision(np.array([True, False, True]), np.array([0.9, 0.1, 0.5]))
        1.0
    """
    order = np.argsort(-scores, kind="stable")
    hits, ranked = np.cumsum(truth[order], dtype=np.int64), scores[order]
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # of every group of equal scores
    if hits[-1] == 0:
        return 0.0
    precision = hits[last] / (last + 1)
    return float((np.diff(hits[last], prepend=0) * precision).sum() / hits[-1])
