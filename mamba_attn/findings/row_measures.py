"""Findings about the rows of a mean matrix, Mode 2 of arXiv 2502.20764: which patches read alike.

A point is a patch: its row of the mean attention of a group of images, divided by its norm, on the first 100 principal
components. No layout in the plane takes part.
"""

from functools import cached_property

import numpy as np

from mamba_attn.analytics.pca import components
from mamba_attn.core.ranks import ranks
from mamba_attn.findings.places import Places

FIRST = 100  # principal components
NEIGHBOURS = 5  # that purity looks at


class Rows:
    """The points of a mean matrix.

    Args:
        matrix: (points, n), what these patches read.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        self.points = components(unit(matrix), min(FIRST, *matrix.shape)).points

    @cached_property
    def squares(self) -> np.ndarray:
        """(points, points) squared distances, 2 - 2 cosine but for what the principal components leave out."""
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
        """Spearman's correlation of the pairs' distances with others; NaN where one of the two is constant.

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
    """Return how far nearest points share a label: 0 as by chance, 1 if all do; NaN where no two points share one.

    Points whose label no other has are left out. Of a label with fewer than six points, so many neighbours are looked
    at as could share it.

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
