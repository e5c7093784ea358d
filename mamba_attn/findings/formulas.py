"""The findings' formulas: for rows of a mean matrix, each image's matrix, the blocks of a stage, and depth.

Mode 2 of arXiv 2502.20764 is about rows. A point is a patch: its row of the mean attention of a group of images,
divided by its norm, on the first 100 principal components. No embedding in the plane is involved.

Shares are |attention| between patches divided by its sum over a row, (images, n, n); the reader is the first of the two
axes. Rows that read nothing are ignored.

Mode 1 is about blocks: a point is the matrix of one image in one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mamba_attn.analytics.projection import components
from mamba_attn.core.ranks import ranks, spearman
from mamba_attn.findings.places import Places

FIRST = 100  # principal components
GROUPS = 10  # of images, at most
LOW = 0.1  # quantile over pairs of blocks
PERMUTATIONS = 20  # of the patches, for chance
NEIGHBOURS = 5  # used for purity
MOST_POINTS = 1024  # of Mode 1: blocks x images of a group; the first images are taken


class Rows:
    """The points of a mean matrix.

    Args:
        matrix: (points, n), what these patches read.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        self.points = components(unit(matrix), min(FIRST, *matrix.shape)).points

    @cached_property
    def squares(self) -> np.ndarray:
        """Squared distances (points, points): 2 - 2 cosine, up to what the principal components omit."""
        lengths = np.einsum("nf,nf->n", self.points, self.points)
        found = lengths[:, None] + lengths - 2 * self.points @ self.points.T
        np.fill_diagonal(found, 0)
        return np.asarray(np.maximum(found, 0))

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of every pair, once."""
        return np.triu_indices(len(self.points), 1)

    @cached_property
    def ranked(self) -> np.ndarray:
        """Ranks of the pairs' distances less their mean; distances are rounded, so that equal rows tie."""
        found = ranks(np.round(self.squares[self.pairs], 12))
        return np.asarray(found - found.mean())

    def follow(self, ranked: np.ndarray) -> float:
        """Return Spearman's correlation of the pairs' distances with others; NaN if either is constant.

        Args:
            ranked: the others' ranks less their mean.
        """
        scale = float(np.sqrt((self.ranked @ self.ranked) * (ranked @ ranked)))
        return float(self.ranked @ ranked) / scale if scale > 0 else float("nan")


def unit(values: np.ndarray) -> np.ndarray:
    """Return rows of norm one, float64; zeros stay zeros.

    Args:
        values: (n, features).
    """
    rows = np.asarray(values, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    found: np.ndarray = rows / np.where(norms > 0, norms, 1)
    return found


def column_similarity(rows: Rows, places: Places) -> float:
    """Mean cosine of rows of one column less that of rows of different columns (arXiv 2502.20764, figure 4).

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    return _similarity(rows, places.column)


def row_similarity(rows: Rows, places: Places) -> float:
    """Mean cosine of rows of one row of the grid less that of rows of different ones, the counterpart of columns.

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    return _similarity(rows, places.row)


def column_purity(rows: Rows, places: Places) -> float:
    """(p - c) / (1 - c): p the part of the 5 nearest patches in the same column, c that of all patches.

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    return purity(rows, places.column)


def row_purity(rows: Rows, places: Places) -> float:
    """As the purity of columns, against the rows of the grid.

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    return purity(rows, places.row)


def block_purity(rows: Rows, places: Places) -> float:
    """As the purity of columns, against z-blocks, which Morton's order should make (arXiv 2502.20764, figure 7).

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    return purity(rows, places.block)


def purity(rows: Rows, labels: np.ndarray) -> float:
    """Return how often nearest points share a label: 0 as by chance, 1 if always; NaN if no two points share one.

    Points with a unique label are ignored. For a label with fewer than six points, only as many neighbours count as
    could share it.

    Args:
        rows: the points.
        labels: one each.
    """
    same = labels[:, None] == labels
    fellows = same.sum(1) - 1
    if not fellows.any():
        return float("nan")
    near = rows.squares.copy()
    np.fill_diagonal(near, np.inf)
    order = np.argsort(near, axis=1, kind="stable")[:, :NEIGHBOURS]
    alike = np.take_along_axis(same, order, axis=1)
    looked = np.minimum(fellows, NEIGHBOURS)[:, None]
    seen = np.arange(alike.shape[1]) < looked
    pure = (alike & seen).sum(1)[fellows > 0] / looked[fellows > 0, 0]
    chance = float((fellows[fellows > 0] / (len(labels) - 1)).mean())
    return float((pure.mean() - chance) / (1 - chance)) if chance < 1 else float("nan")


def grid_locality(rows: Rows, places: Places) -> float:
    """Spearman's correlation of the distance between rows and between their patches in the image (arXiv 2502.20764).

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    return rows.follow(places.ranked["away"])


def sequence_locality(rows: Rows, places: Places) -> float:
    """Spearman's correlation of the distance between rows and the steps between their patches in the layer's routes.

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    return rows.follow(places.ranked["steps"])


def order_over_raster(rows: Rows, places: Places) -> float:
    """Correlation with steps in the layer's own order less that in raster order; NaN where these are the same.

    Args:
        rows: of a mean matrix.
        places: of its patches.
    """
    if places.in_raster_order:
        return float("nan")
    return rows.follow(places.ranked["steps"]) - rows.follow(places.ranked["raster"])


def _similarity(rows: Rows, labels: np.ndarray) -> float:
    first, second = rows.pairs
    squares, same = rows.squares[rows.pairs], labels[first] == labels[second]
    if same.all() or not same.any():
        return float("nan")
    return float(squares[~same].mean() - squares[same].mean()) / 2


def shares_of(matrices: np.ndarray) -> np.ndarray:
    """Return |attention| as shares of its rows; rows of zeros stay zeros.

    Args:
        matrices: (images, n, n), signed or not.
    """
    size = np.abs(matrices)
    total = size.sum(2, keepdims=True)
    shares: np.ndarray = size / np.where(total > 0, total, 1)
    return shares


def entropy(shares: np.ndarray, places: Places) -> np.ndarray:
    """-sum_j s_ij log s_ij / log n, mean over rows i: 0 if one patch is read, 1 if all are read equally.

    Args:
        shares: of images.
        places: of the patches.
    """
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return _mean(-np.einsum("bij,bij->bi", shares, logs) / np.log(len(places)), shares)


def distance(shares: np.ndarray, places: Places) -> np.ndarray:
    """sum_j s_ij |x_i - x_j|, mean over rows, in pixels: the mean attention distance of arXiv 2010.11929, figure 7.

    Args:
        shares: of images.
        places: of the patches.
    """
    return _mean(np.einsum("bij,ij->bi", shares, places.away), shares)


def neighbour_share(shares: np.ndarray, places: Places) -> np.ndarray:
    """Sum of s_ij over the patch itself and its eight neighbours, mean over rows (arXiv 2502.20764, complementary).

    Args:
        shares: of images.
        places: of the patches.
    """
    return _mean(np.einsum("bij,ij->bi", shares, places.near.astype(np.float32)), shares)


def preceding_lift(shares: np.ndarray, places: Places) -> np.ndarray:
    """Share read 1 to 3 steps back in a route, over that of uniform attention; the diagonal apart (arXiv 2502.20764).

    What is just before a patch in a route that runs backwards is just after it in the forward one.

    Args:
        shares: of images.
        places: of the patches.
    """
    others = 1 - np.einsum("bii->bi", shares)
    counted = shares.any(2) & (others > 1e-6)
    found = np.einsum("bij,ij->bi", shares, places.before.astype(np.float32)) / np.where(counted, others, 1)
    expected = np.where(counted, places.before.sum(1) / (len(places) - 1), 0).sum(1)
    lift: np.ndarray = np.where(expected > 0, (found * counted).sum(1) / np.where(expected > 0, expected, 1), np.nan)
    return lift


def _mean(rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the mean over rows that read something, (images,); NaN if no row does."""
    reads = shares.any(2)
    count = reads.sum(1)
    mean: np.ndarray = np.where(count > 0, (rows * reads).sum(1) / np.maximum(count, 1), np.nan)
    return mean


@dataclass(eq=False)
class Stage:
    """Measurements of the blocks of one stage.

    Args:
        features: per block (images, features), the images' matrices or projections of them.
        means: per block (groups, points, n), mean matrices of groups of images.
        diagonal: (points, n), whether an entry lies on the matrix's diagonal.
        distances: per block (images,), mean attention distances; empty if unknown.
    """

    features: Sequence[np.ndarray]
    means: Sequence[np.ndarray]
    diagonal: np.ndarray
    distances: Sequence[np.ndarray] = field(default_factory=list)

    @cached_property
    def apart(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per group of images: distances of all (block, image) points, and the blocks' numbers.

        Points have unit norm and 100 principal components.
        """
        blocks, most = len(self.features), max(1, MOST_POINTS // len(self.features))
        found = []
        for group in groups_of(len(self.features[0])):
            points = np.concatenate([unit(each[group[:most]]) for each in self.features])
            points = components(points, min(FIRST, len(points))).points
            lengths = np.einsum("nf,nf->n", points, points)
            squares = lengths[:, None] + lengths - 2 * points @ points.T
            labels = np.repeat(np.arange(blocks), len(points) // blocks)
            found.append((np.sqrt(np.maximum(squares, 0)), labels))
        return found


def groups_of(images: int) -> list[np.ndarray]:
    """Return groups of images that share none, of at least two each: what is compared inside a group is independent.

    Args:
        images: how many there are; one or none make one group.
    """
    count = max(1, min(GROUPS, images // 2))
    return [np.arange(images)[first::count] for first in range(count)]


def block_silhouette(stage: Stage) -> np.ndarray:
    """(b - a) / max(a, b), mean over the points of a group of images: a to points of its block, b to the nearest other.

    Rousseeuw (1987), of the points (block, image) of a stage; near 1 where blocks form clusters of their own. Points
    are compared inside a group of images alone, so that the groups' numbers do not depend on each other.

    Args:
        stage: of at least two blocks; with one there is nothing to separate.
    """
    blocks = len(stage.features)
    if blocks < 2 or len(stage.features[0]) < 2:
        return np.full(1, np.nan)
    found = []
    for away, label in stage.apart:
        images = len(label) // blocks
        sums = np.stack([away[:, label == block].sum(1) for block in range(blocks)], 1)
        own = np.arange(len(label)), label
        inside = sums[own] / (images - 1)
        sums[own] = np.inf
        outside = sums.min(1) / images
        largest = np.maximum(inside, outside)
        found.append(np.where(largest > 0, (outside - inside) / np.where(largest > 0, largest, 1), 0.0).mean())
    return np.array(found)


def block_neighbours(stage: Stage) -> np.ndarray:
    """Part of the points of a group of images whose nearest other point is of the same block; by chance 1 / blocks.

    Args:
        stage: of at least two blocks.
    """
    blocks = len(stage.features)
    if blocks < 2 or len(stage.features[0]) < 2:
        return np.full(1, np.nan)
    found = []
    for away, label in stage.apart:
        other = away + np.diag(np.full(len(away), np.inf))
        found.append((label[other.argmin(1)] == label).mean())
    return np.array(found)


def block_correlation(stage: Stage) -> np.ndarray:
    """10 % quantile over pairs of blocks of their correlation, less the same of permuted patches.

    Pearson's, of |mean attention| off the diagonal, per group of images; below 0 two blocks complement each other more
    than if the patches of each stood in an order of their own (a mean over 20 permutations, the same for its rows and
    columns). Unlike a minimum it does not fall with the number of pairs.

    Args:
        stage: of at least two blocks.
    """
    if len(stage.means) < 2:
        return np.full(1, np.nan)
    points = stage.diagonal.argmax(1)
    off = ~np.eye(len(points), dtype=bool)
    random = np.random.default_rng(0)
    found = []
    for group in zip(*stage.means, strict=True):
        square = [np.abs(mean[:, points]).astype(np.float64) for mean in group]
        by_chance = []
        for _ in range(PERMUTATIONS):
            orders = [random.permutation(len(points)) for _ in square]
            by_chance.append(_low(np.stack([its[np.ix_(o, o)][off] for its, o in zip(square, orders, strict=True)])))
        found.append(_low(np.stack([its[off] for its in square])) - np.mean(by_chance))
    return np.array(found)


def _low(values: np.ndarray) -> float:
    """Return a low quantile of the correlations of all pairs of rows; NaN if a row is constant, or empty."""
    if not values.shape[1]:
        return float("nan")
    values = values - values.mean(1, keepdims=True)
    norms = np.linalg.norm(values, axis=1)
    if not norms.all():
        return float("nan")
    values = values / norms[:, None]
    return float(np.quantile((values @ values.T)[np.triu_indices(len(values), 1)], LOW))


def distance_range(stage: Stage) -> np.ndarray:
    """Range of the mean attention distances of the stage's blocks, in pixels, per image.

    Args:
        stage: of at least two blocks.
    """
    if len(stage.distances) < 2:
        return np.full(1, np.nan)
    return np.asarray(np.ptp(np.stack(stage.distances), axis=0))


class Spread:
    """How much the matrices of one block differ between images, per group of images; of any number in little memory.

    Args:
        images: how many there will be, which the groups depend on; see ``groups_of``.
    """

    def __init__(self, images: int) -> None:
        self.counts = np.zeros(len(groups_of(images)))
        self.sums: np.ndarray | None = None  # (groups, features), of vectors of norm one
        self.squares = np.zeros(len(self.counts))

    def add(self, start: int, features: np.ndarray) -> None:
        """Add images.

        Args:
            start: the first one's number.
            features: (images, features).
        """
        rows = unit(features)
        if self.sums is None:
            self.sums = np.zeros((len(self.counts), rows.shape[1]))
        for number, row in enumerate(rows, start):
            group = number % len(self.counts)
            self.counts[group] += 1
            self.sums[group] += row
            self.squares[group] += row @ row

    def merge(self, counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> None:
        """Add what another one has counted of other images of the same block."""
        self.counts, self.squares = self.counts + counts, self.squares + squares
        self.sums = sums if self.sums is None else self.sums + sums


def image_share(spread: Spread) -> np.ndarray:
    """Variance of a block's matrices over images, as a part of their mean square, at unit norm; per group of images.

    The mean of |f_k - mean f|^2 n / (n - 1) for the unit vectors f_k of a group's n images: 0 if all images have one
    pattern, 1 if they have nothing in common.

    Args:
        spread: of the images of one block.
    """
    counts = spread.counts
    if spread.sums is None or counts.sum() < 2:
        return np.full(int(counts.sum()), np.nan)
    apart = spread.squares - (spread.sums**2).sum(1) / counts
    return np.asarray(np.maximum(apart, 0) / (counts - 1))


def by_depth(values: np.ndarray) -> np.ndarray:
    """Spearman's correlation of a block's number with its depth, one per image or group.

    Args:
        values: (blocks, images or groups); undefined blocks are ignored, fewer than three give NaN.
    """
    found = []
    for column in values.T:
        known = np.isfinite(column)
        found.append(spearman(np.flatnonzero(known), column[known]) if known.sum() > 2 else np.nan)
    return np.array(found)
