"""What is known of one patch: where it is, when each route visits it, what it reads most."""

from typing import Any, NamedTuple

import numpy as np

from mamba_attn.figures import colours
from mamba_attn.figures.picture import data_uri
from mamba_attn.viewer.source import scans, tokens_of
from mamba_attn.viewer.state import Pane
from mamba_attn.viewer.views import STRONGEST, Views
from mamba_attn.viewer.words import palette, signed


class Card(NamedTuple):
    """One patch.

    Args:
        row: of the grid.
        column: of the grid.
        ranks: step in each route, from 1; None where the route does not visit it.
        steps: of every route.
        strongest: (row, column, value) of the largest values of its map.
        picture: its map, as the address of a PNG.
    """

    row: int
    column: int
    ranks: list[int | None]
    steps: int
    strongest: list[tuple[int, int, float]]
    picture: str


def card(views: Views, pane: Pane, cell: int) -> Card:
    """Return what is known of a patch.

    Args:
        views: of the store.
        pane: which attention.
        cell: raster index.

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
    """Return a map as the address of a small PNG.

    Args:
        values: (height, width).
        pane: whose colours.
        pixels: of its longer side, at least.
    """
    limits: dict[str, Any] = colours.limits(values, signed(pane))
    chosen = colours.scale(values, colours=colours.BLUE_ORANGE if limits["signed"] else palette(pane), **limits)
    rgb = colours.to_rgb(values, chosen)
    factor = max(1, pixels // max(values.shape))
    return data_uri(np.ascontiguousarray(rgb.repeat(factor, 0).repeat(factor, 1)))
