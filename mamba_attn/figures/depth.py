"""Matrices or maps of several layers side by side, from the first to the last."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from mamba_attn.figures.colours import as_values
from mamba_attn.figures.panels import add_heat, panels


def depth_grid(
    values: Sequence[Any],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    shared: bool = False,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 260,
) -> go.Figure:
    """Show several matrices, or maps on the token grid, in reading order.

    Args:
        values: (rows, columns) each; sizes may differ.
        titles: one above each.
        columns: panels in a row. Default: all in one, at most six.
        shared: one colour range for all panels, with a bar, instead of each panel's own.
        limits: values of the first and the last colour of every panel.
        signed: centre on zero. Default: whether any value of any panel is negative.
        colours: from low to high. Default: Inferno, for signed data RdBu with blue below zero.
        title: above the figure.
        size: side of a panel in pixels.

    Raises:
        ValueError: no panels, another number of titles, or a panel that is not (rows, columns).
    """
    arrays = [as_values(f"depth_grid(values[{index}])", value) for index, value in enumerate(values)]
    figure, places = panels(
        "depth_grid", len(arrays), titles, columns=columns, shape=(size, size), bar=shared, title=title
    )  # fmt: skip
    return add_heat(figure, places, arrays, shared=shared, limits=limits, signed=signed, colours=colours)
