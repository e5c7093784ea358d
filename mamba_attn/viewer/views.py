"""Figures and arrays of the two views of a state, without a browser or a server."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch

from mamba_attn import figures
from mamba_attn.analytics.embed import embed
from mamba_attn.analytics.projection import SIZE, feature_size, project
from mamba_attn.figures import colours
from mamba_attn.figures.patch_grid import patch_view_changes
from mamba_attn.figures.picture import data_uri
from mamba_attn.viewer.captions import drawn_route, fitting, legend, palette, signed
from mamba_attn.viewer.scatter import of_blocks, of_patches
from mamba_attn.viewer.source import Source, scans, tokens_of
from mamba_attn.viewer.state import Pane, State

STRONGEST = 5  # sources or readers listed on the card
_POINTS = 1  # raise it when points are computed differently: cached ones are then computed again
_WHOLE = 2**27  # numbers in all features, half a gigabyte; above it each row is projected to 4,096
_FIRST = 100  # principal components for t-SNE and UMAP, as in arXiv 2502.20764
_AT_ONCE = 16  # rows of features that are read together


@dataclass(frozen=True, eq=False)
class Points:
    """The points of a scatterplot.

    Args:
        xy: (points, 2).
        pairs: (points, 2) numbers of layer and image, in mode "blocks".
        about: what they show.
    """

    xy: np.ndarray
    pairs: np.ndarray | None
    about: str


class Views:
    """The views of one store; embeddings are cached.

    Args:
        source: where the numbers come from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._points: dict[tuple[Any, ...], Points] = {}

    def points(self, pane: Pane) -> Points:
        """Return the points of a pane's scatterplot: a stage's (block, image) pairs, or a block's patches.

        Raises:
            ImportError: the method's package is not installed.
            ValueError: too few points.
        """
        source, layer = self.source, self.source.layer(pane)
        if pane.mode == "blocks":
            key: tuple[Any, ...] = ("blocks", layer.stage, pane.method)
        else:
            key = ("patches", layer.name, source.route(pane), pane.direction, pane.method)
        key += () if pane.first or pane.method == "pca" else ("all features",)
        if key not in self._points:
            self._points[key] = self._made(pane, key)
        return self._points[key]

    def _made(self, pane: Pane, key: tuple[Any, ...]) -> Points:
        """Points from the store's cache; computed and cached on first use, which alone reads the features."""
        source, layer = self.source, self.source.layer(pane)
        pairs = self.pairs(pane)
        count = len(layer.layout.patches) if pairs is None else len(pairs)
        about = f"Stage {layer.stage}, block {layer.block}: {count} patches"
        if pairs is not None:
            about = f"Stage {layer.stage}: blocks, {len(source.images)} images"
        name = f"explorer {_POINTS}: {' '.join(map(str, key))}"
        known = source.store.embedding(name)
        if known is not None and known[0].shape == (count, 2):
            return Points(known[0], pairs, about)
        xy, how = embed(self._features(pane), pane.method, first=_FIRST if pane.first else None)
        with suppress(OSError):  # in a read-only store, points are computed every time
            source.store.save_embedding(name, xy, how)
        return Points(xy, pairs, about)

    def _features(self, pane: Pane) -> np.ndarray:
        """One row of numbers per point."""
        source, layer = self.source, self.source.layer(pane)
        if pane.mode == "patches":
            patches = layer.layout.patches.numpy()
            return np.ascontiguousarray(source.mean(pane)[patches])
        layers, images = [source.layers[index] for index in source.stage(pane)], len(source.images)
        size = feature_size(layer.layout.tokens)
        projected = size > SIZE and len(layers) * images * size > _WHOLE
        found = np.empty((len(layers) * images, SIZE if projected else size), np.float32)
        for number, its in enumerate(layers):
            for start, rows in source.store.feature_rows(its, _AT_ONCE):
                first = number * images + start
                found[first : first + len(rows)] = [project(_square(row)) for row in rows] if projected else rows
        return found

    def pairs(self, pane: Pane) -> np.ndarray | None:
        """Return (points, 2) numbers of layer and image of the points in mode "blocks"; None for patches."""
        if pane.mode == "patches":
            return None
        images = range(len(self.source.images))
        return np.array([(index, image) for index in self.source.stage(pane) for image in images])

    def selected(self, pane: Pane, state: State) -> list[int]:
        """Return the numbers of the selected points; for blocks without a selection, of the points on display."""
        if pane.mode == "patches":
            return state.on_grid(tuple(self.source.layer(pane).layout.grid))
        pairs = self.pairs(pane)
        wanted = set(state.points) or set(self.open_points(pane))
        if pairs is None:
            return []
        return [index for index, pair in enumerate(pairs.tolist()) if tuple(pair) in wanted]

    def open_points(self, pane: Pane) -> list[tuple[int, int]]:
        """Return the (layer, image) pairs that the patch view shows; for a mean, all of its images."""
        source = self.source
        images = range(len(source.images)) if pane.what == "mean" else [min(pane.image, len(source.images) - 1)]
        return [(min(pane.layer, len(source.layers) - 1), image) for image in images]

    def scatter(self, pane: Pane, state: State, size: int = 460) -> go.Figure:
        """Return the scatterplot view.

        Args:
            pane: which attention.
            state: whose selection is lit up.
            size: height in pixels.
        """
        points = self.points(pane)
        colour = fitting(self.source, pane).colour
        method = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}[pane.method]
        shared = {
            "selected": self.selected(pane, state), "axes": (f"{method} 1", f"{method} 2"), "size": size,
        }  # fmt: skip
        if points.pairs is not None:
            return of_blocks(self.source, points.xy, points.pairs, colour, shared)
        return of_patches(self.source.layer(pane), points.xy, self.ranks(pane), max(pane.route, 0), colour, shared)

    def ranks(self, pane: Pane) -> np.ndarray:
        """Return the step at which each route visits each patch: (routes, patches), NaN where it does not."""
        layer = self.source.layer(pane)
        ranks = np.full((len(layer.orders), layer.layout.tokens), np.nan)
        for route, order in enumerate(np.asarray(layer.orders)):
            ranks[route, order[order >= 0]] = np.flatnonzero(order >= 0)
        return np.asarray(ranks[:, layer.layout.patches.numpy()])

    def path(self, pane: Pane) -> np.ndarray:
        """Return the raster indices of the patches on the pane's route, in order; for a sum, on the first route."""
        layer = self.source.layer(pane)
        number = np.full(layer.layout.tokens, -1)
        number[layer.layout.patches.numpy()] = np.arange(len(layer.layout.patches))
        order = np.asarray(layer.orders)[drawn_route(self.source, pane)]
        visited = number[order[order >= 0]]
        return np.asarray(visited[visited >= 0])

    def heat(self, pane: Pane, state: State) -> np.ndarray:
        """Return the map of the selection, (height, width), as it is shown.

        Raises:
            UnavailableError: gate or D are asked for and the layer lacks them.
        """
        layer = self.source.layer(pane)
        cells = [*state.on_grid(tuple(layer.layout.grid)), *(cell for cell in state.cells if cell < 0)]
        return self.shown(pane, self.source.read(pane, tokens_of(layer.layout, cells)))

    def shown(self, pane: Pane, values: np.ndarray) -> np.ndarray:
        """Return one number per token on the grid, as it is shown."""
        grid = self.source.layer(pane).layout.to_grid(torch.from_numpy(np.ascontiguousarray(values))).numpy()
        return figures.shown(grid, sign=pane.sign, normalise=pane.normalise, log=pane.log)

    def patches(self, pane: Pane, state: State, size: int = 460) -> go.Figure:
        """Return the patch view.

        Args:
            pane: which attention.
            state: whose selection is shown.
            size: height in pixels.

        Raises:
            UnavailableError: as in ``heat``.
        """
        layer = self.source.layer(pane)
        order = self.path(pane) if pane.path and scans(layer) else None
        values = self.heat(pane, state)
        return figures.patch_view(
            values,
            image=self.source.pixels(pane),
            order=order,
            marks=state.on_grid(tuple(layer.layout.grid)),
            step=None if order is None or not 0 < pane.step <= len(order) else pane.step,
            opacity=pane.opacity,
            signed=signed(pane),
            colours=None if signed(pane) else palette(pane),
            bar_title=legend(self.source, pane),
            size=size,
        )

    def changes(self, pane: Pane, state: State) -> dict[str, Any]:
        """Return the changes to a drawn patch view for another selection, route or scale; arguments as ``patches``."""
        values = self.heat(pane, state)
        marks = state.on_grid(tuple(self.source.layer(pane).layout.grid))
        shades = None if signed(pane) else palette(pane)
        return patch_view_changes(values, marks=marks, opacity=pane.opacity, signed=signed(pane), colours=shades)

    def gallery(self, pane: Pane, state: State) -> list[np.ndarray]:
        """Return the map of the selection in every layer, each on its own grid."""
        found = []
        for index in range(len(self.source.layers)):
            its = Pane(**{**pane.__dict__, "layer": index})
            found.append(self.heat(its, state))
        return found


def _square(row: np.ndarray) -> np.ndarray:
    side = math.isqrt(len(row))
    return row.reshape(side, side)


class Card(NamedTuple):
    """Facts about one patch.

    Args:
        row: on the grid.
        column: on the grid.
        ranks: its step in each route, from 1; None where the route does not visit it.
        steps: length of every route.
        strongest: (row, column, value) of the values with the largest magnitude in its map.
        picture: its map, as a data URI of a PNG.
    """

    row: int
    column: int
    ranks: list[int | None]
    steps: int
    strongest: list[tuple[int, int, float]]
    picture: str


def card(views: Views, pane: Pane, cell: int) -> Card:
    """Return the card of a patch.

    Args:
        views: of the store.
        pane: which attention.
        cell: raster index of the patch.

    Raises:
        ValueError: no such patch.
        UnavailableError: as in ``Views.heat``.
    """
    layer = views.source.layer(pane)
    height, width = layer.layout.grid
    if not 0 <= cell < height * width:
        raise ValueError(f"card(cell={cell}): the grid is {height}x{width}.")
    values = views.shown(pane, views.source.read(pane, tokens_of(layer.layout, [cell])))
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:STRONGEST]
    strongest = [(int(at) // width, int(at) % width, float(values.flat[at])) for at in order]
    ranks: list[int | None] = [
        None if np.isnan(rank) else int(rank) + 1 for rank in (views.ranks(pane)[:, cell] if scans(layer) else [])
    ]
    steps = np.asarray(layer.orders).shape[-1] if scans(layer) else 0
    return Card(cell // width, cell % width, ranks, steps, strongest, thumbnail(values, pane))


def thumbnail(values: np.ndarray, pane: Pane, pixels: int = 112) -> str:
    """Return a map as the data URI of a small PNG.

    Args:
        values: (height, width).
        pane: the pane whose colours are used.
        pixels: least length of its longer side.
    """
    limits: dict[str, Any] = colours.limits(values, signed(pane))
    chosen = colours.scale(values, colours=colours.BLUE_ORANGE if limits["signed"] else palette(pane), **limits)
    rgb = colours.to_rgb(values, chosen)
    factor = max(1, pixels // max(values.shape))
    return data_uri(np.ascontiguousarray(rgb.repeat(factor, 0).repeat(factor, 1)))
