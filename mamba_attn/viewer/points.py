"""Points of the scatterplots: a stage's (block, image) pairs, or a block's patches, in the plane."""

import math
from contextlib import suppress
from typing import Any

import numpy as np

from mamba_attn.analytics.embed import embed
from mamba_attn.analytics.projection import SIZE, feature_size, project
from mamba_attn.viewer.source import Source, patches_of
from mamba_attn.viewer.state import Pane

METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
FIRST = 100  # principal components for t-SNE and UMAP, as in arXiv 2502.20764
_POINTS = 1  # raise it when points are computed differently: cached ones are then computed again
_WHOLE = 2**27  # numbers in all features, half a gigabyte; above it each row is projected to 4,096
_AT_ONCE = 16  # rows of features that are read together
_NEAREST = 6  # points most alike


class Scatter:
    """The points of one store; cached there, and here.

    Args:
        source: where the numbers come from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._points: dict[str, np.ndarray] = {}

    def points(self, pane: Pane) -> np.ndarray:
        """Return the points of a pane's scatterplot, (points, 2); computed and cached on first use.

        Raises:
            ImportError: the method's package is not installed.
            ValueError: too few points.
        """
        known = self.known(pane)
        if known is None:
            known, how = embed(self.features(pane), pane.method, first=FIRST if pane.first else None)
            self.save(pane, known, how)
        return known

    def neighbours(self, pane: Pane, point: int) -> list[int]:
        """Return the points most alike to one, nearest first, by the numbers that the plane is made of.

        Raises:
            ValueError: no such point.
        """
        if not 0 <= point < self.count(pane):
            raise ValueError(f"point={point}: there are {self.count(pane)}.")
        features = self.features(pane)
        away = np.square(features - features[point]).sum(axis=1, dtype=np.float64)
        away[point] = -1.0
        return [int(number) for number in np.argsort(away, kind="stable")[1 : _NEAREST + 1]]

    def known(self, pane: Pane) -> np.ndarray | None:
        """Return points that need no computing, and no look at the features; else None."""
        name = self.name(pane)
        if name not in self._points:
            found = self.source.store.embedding(name)
            if found is None or found[0].shape != (self.count(pane), 2):
                return None
            self._points[name] = found[0]
        return self._points[name]

    def save(self, pane: Pane, xy: np.ndarray, how: dict[str, Any]) -> None:
        """Keep points that were computed, in the store too."""
        with suppress(OSError):  # in a read-only store, points are computed every time
            self.source.store.save_embedding(self.name(pane), xy, how)
        self._points[self.name(pane)] = xy

    def name(self, pane: Pane) -> str:
        """Return the key of the points in the store's cache."""
        source, layer = self.source, self.source.layer(pane)
        if pane.mode == "blocks":
            key: tuple[Any, ...] = ("blocks", layer.stage, pane.method)
        else:
            key = ("patches", layer.name, source.route(pane), pane.direction, pane.method)
        key += () if pane.first or pane.method == "pca" else ("all features",)
        return f"explorer {_POINTS}: {' '.join(map(str, key))}"

    def count(self, pane: Pane) -> int:
        """Return how many points there are."""
        pairs = self.pairs(pane)
        return len(self.source.layer(pane).layout.patches) if pairs is None else len(pairs)

    def pairs(self, pane: Pane) -> np.ndarray | None:
        """Return (points, 2) numbers of layer and image of the points in mode "blocks"; None for patches."""
        if pane.mode == "patches":
            return None
        images = range(self.source.featured)
        return np.array([(index, image) for index in self.source.stage(pane) for image in images])

    def features(self, pane: Pane) -> np.ndarray:
        """Return one row of numbers per point."""
        source, layer = self.source, self.source.layer(pane)
        if pane.mode == "patches":
            return np.ascontiguousarray(source.mean(pane)[patches_of(layer.layout)])
        layers, images = [source.layers[index] for index in source.stage(pane)], source.featured
        size = feature_size(layer.layout.tokens)
        projected = size > SIZE and len(layers) * images * size > _WHOLE
        found = np.empty((len(layers) * images, SIZE if projected else size), np.float32)
        for number, its in enumerate(layers):
            for start, rows in source.store.feature_rows(its, _AT_ONCE):
                first = number * images + start
                found[first : first + len(rows)] = [project(_square(row)) for row in rows] if projected else rows
        return found


def _square(row: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(row))
    return row.reshape(side, side)
