"""The card of one patch: its place, when each route visits it, its strongest sources or readers."""

from typing import Any, NamedTuple

import numpy as np

from mamba_attn.figures import colours
from mamba_attn.figures.picture import data_uri
from mamba_attn.viewer.source import scans, tokens_of
from mamba_attn.viewer.state import Pane
from mamba_attn.viewer.views import STRONGEST, Views
from mamba_attn.viewer.words import palette, signed


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
