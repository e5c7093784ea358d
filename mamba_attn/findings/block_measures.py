"""Findings about the blocks of a stage, Mode 1 of arXiv 2502.20764, and about what changes with depth."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mamba_attn.analytics.pca import components
from mamba_attn.core.ranks import spearman
from mamba_attn.findings.row_measures import FIRST, unit

MOST_POINTS = 1024  # of Mode 1: blocks x images; the first images are taken


@dataclass(eq=False)
class Stage:
    """What was measured of the blocks of one stage.

    Args:
        features: per block (images, features), the images' matrices or projections of them.
        means: per block (groups, points, n), mean matrices of groups of images.
        diagonal: (points, n), whether an entry lies on the matrix's diagonal.
        distances: per block (images,), mean attention distances; empty where they are not known.
    """

    features: Sequence[np.ndarray]
    means: Sequence[np.ndarray]
    diagonal: np.ndarray
    distances: Sequence[np.ndarray] = field(default_factory=list)

    @cached_property
    def apart(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances of all (block, image) points on unit norm and 100 principal components; the blocks' numbers."""
        blocks = len(self.features)
        images = max(1, min(len(self.features[0]), MOST_POINTS // blocks))
        points = np.concatenate([unit(each[:images]) for each in self.features])
        points = components(points, min(FIRST, len(points))).points
        lengths = np.einsum("nf,nf->n", points, points)
        squares = lengths[:, None] + lengths - 2 * points @ points.T
        return np.sqrt(np.maximum(squares, 0)), np.repeat(np.arange(blocks), images)


def block_silhouette(stage: Stage) -> np.ndarray:
    """(b - a) / max(a, b), mean over the blocks of an image: a to points of its block, b to those of the nearest other.

    Rousseeuw (1987), of the points (block, image) of a stage; near 1 where blocks form clusters of their own.

    Args:
        stage: of at least two blocks; else there is nothing to tell apart.
    """
    blocks = len(stage.features)
    if blocks < 2 or len(stage.features[0]) < 2:
        return np.full(1, np.nan)
    away, label = stage.apart
    images = len(label) // blocks
    sums = np.stack([away[:, label == block].sum(1) for block in range(blocks)], 1)
    own = np.arange(len(label)), label
    inside = sums[own] / (images - 1)
    sums[own] = np.inf
    outside = sums.min(1) / images
    largest = np.maximum(inside, outside)
    found = np.where(largest > 0, (outside - inside) / np.where(largest > 0, largest, 1), 0.0)
    return np.asarray(found.reshape(blocks, images).mean(0))


def block_neighbours(stage: Stage) -> np.ndarray:
    """Part of an image's points whose nearest other point is of the same block; by chance 1 / blocks.

    Args:
        stage: of at least two blocks.
    """
    blocks = len(stage.features)
    if blocks < 2 or len(stage.features[0]) < 2:
        return np.full(1, np.nan)
    away, label = stage.apart
    other = away + np.diag(np.full(len(away), np.inf))
    found = label[other.argmin(1)] == label
    return np.asarray(found.reshape(blocks, -1).mean(0))


def block_correlation(stage: Stage) -> np.ndarray:
    """Least Pearson correlation of |mean attention| over pairs of blocks, off the diagonal; below 0 two complement.

    A minimum: n blocks have n (n - 1) / 2 pairs, and the more there are, the lower it is by itself.

    Args:
        stage: of at least two blocks.
    """
    if len(stage.means) < 2:
        return np.full(1, np.nan)
    found = []
    for group in zip(*stage.means, strict=True):
        values = np.stack([np.abs(mean)[~stage.diagonal] for mean in group]).astype(np.float64)
        values -= values.mean(1, keepdims=True)
        norms = np.linalg.norm(values, axis=1)
        if not norms.all():
            found.append(np.nan)
            continue
        values /= norms[:, None]
        found.append(float((values @ values.T)[np.triu_indices(len(values), 1)].min()))
    return np.array(found)


def distance_range(stage: Stage) -> np.ndarray:
    """Largest less least mean attention distance of the stage's blocks, in pixels, per image.

    Args:
        stage: of at least two blocks.
    """
    if len(stage.distances) < 2:
        return np.full(1, np.nan)
    return np.asarray(np.ptp(np.stack(stage.distances), axis=0))


def image_share(features: np.ndarray) -> np.ndarray:
    """Variance of a block's matrices over images, as a part of their mean square, at unit norm; one number per image.

    |f_k - mean f|^2 n / (n - 1) for the unit vector f_k of image k: their mean is 0 where all images have one pattern,
    1 where nothing is common to them.

    Args:
        features: (images, features) of one block.
    """
    count = len(features)
    if count < 2:
        return np.full(count, np.nan)
    rows = unit(features)
    return np.asarray(((rows - rows.mean(0)) ** 2).sum(1) * count / (count - 1))


def by_depth(values: np.ndarray) -> np.ndarray:
    """Spearman's correlation of a block's number with its depth, one per image or group.

    Args:
        values: (blocks, images or groups); undefined blocks are left out, fewer than three give NaN.
    """
    found = []
    for column in values.T:
        known = np.isfinite(column)
        found.append(spearman(np.flatnonzero(known), column[known]) if known.sum() > 2 else np.nan)
    return np.array(found)
