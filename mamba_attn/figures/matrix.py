"""One attention matrix as a heat map."""

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from mamba_attn.figures.colours import as_values, plotly_scale, scale
from mamba_attn.figures.theme import Figure, plain, square_cells


def matrix(
    values: Any,
    *,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    marks: Iterable[int] = (),
    title: str | None = None,
    size: int = 480,
) -> go.Figure:
    """Show a matrix: row i is what token i reads, column j where token j is read.

    Args:
        values: (rows, columns).
        limits: values of the first and the last colour. Default: the values' range; signed data is centred on zero.
        signed: centre on zero. Default: whether a value is negative.
        colours: from low to high. Default: Inferno, for signed data RdBu with blue below zero.
        marks: tokens marked by a thin line on both axes, e.g. the class token.
        title: above the figure.
        size: width and height of the figure in pixels.

    Raises:
        ValueError: not a matrix, or limits that do not fit.
    """
    array = as_values("matrix(values)", values)
    chosen = scale(array, limits=limits, signed=signed, colours=colours)
    heat = go.Heatmap(
        z=array, zmin=chosen.low, zmax=chosen.high, colorscale=plotly_scale(chosen.colours),
        hovertemplate="token %{y} reads token %{x}: %{z:.3g}<extra></extra>",
    )  # fmt: skip
    figure = plain(Figure(heat), title=title, width=size + 60, height=size)
    square_cells(figure)
    figure.update_xaxes(title="token read")
    figure.update_yaxes(title="reading token", scaleanchor="x")
    for token in marks:
        figure.add_vline(token, line={"color": "#888888", "width": 1, "dash": "dot"})
        figure.add_hline(token, line={"color": "#888888", "width": 1, "dash": "dot"})
    return figure
