"""Matrices or maps of several layers side by side, from the first to the last."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mamba_attn.figures.colours import as_values, plotly_scale, scale
from mamba_attn.figures.theme import FONT, plain, square_cells


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
    if not values or len(values) != len(titles):
        raise ValueError(f"depth_grid: expected one title per panel, got {len(values)} panels, {len(titles)} titles.")
    arrays = [as_values(f"depth_grid(values[{index}])", value) for index, value in enumerate(values)]
    every = np.concatenate([array.ravel() for array in arrays])
    signed = bool((every[np.isfinite(every)] < 0).any()) if signed is None else signed
    width = min(columns or 6, len(arrays))
    height = -(-len(arrays) // width)
    figure = make_subplots(rows=height, cols=width, subplot_titles=list(titles), horizontal_spacing=0.03)
    plain(figure, title=title, width=size * width + 90, height=(size + 30) * height + 50)
    for index, array in enumerate(arrays):
        chosen = scale(every if shared else array, limits=limits, signed=signed, colours=colours)
        heat = go.Heatmap(
            z=array, zmin=chosen.low, zmax=chosen.high, colorscale=plotly_scale(chosen.colours),
            showscale=shared and index == 0, hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
        )  # fmt: skip
        row, column = divmod(index, width)
        figure.add_trace(heat, row=row + 1, col=column + 1)
        square_cells(figure, row=row + 1, col=column + 1)
        anchor = "x" if index == 0 else f"x{index + 1}"
        figure.update_yaxes(visible=False, scaleanchor=anchor, row=row + 1, col=column + 1)
        figure.update_xaxes(visible=False, row=row + 1, col=column + 1)
    return figure.update_annotations(font={**FONT, "size": 12})
