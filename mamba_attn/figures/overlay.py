"""A map laid over its image."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from mamba_attn.figures.colours import as_image, as_values, plotly_scale, scale
from mamba_attn.figures.picture import data_uri, photo
from mamba_attn.figures.theme import Figure, plain, square_cells


def overlay(
    image: Any,
    values: Any,
    *,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 400,
) -> go.Figure:
    """Show a map over the image that it explains.

    Args:
        image: (rows, columns, 3), uint8 or in 0..1: what the model saw, before normalisation.
        values: (rows, columns), the image's size.
        opacity: of the map, 0 to 1.
        limits: values of the first and the last colour. Default: the values' range; signed data is centred on zero.
        signed: centre on zero. Default: whether a value is negative.
        colours: from low to high. Default: Inferno, for signed data RdBu with blue below zero.
        title: above the figure.
        size: height of the figure in pixels.

    Raises:
        ValueError: shapes that disagree, or limits that do not fit.
    """
    picture, array = as_image("overlay(image)", image), as_values("overlay(values)", values)
    if picture.shape[:2] != array.shape:
        raise ValueError(f"overlay: the map is {array.shape} pixels, the image {picture.shape[:2]}; they must agree.")
    chosen = scale(array, limits=limits, signed=signed, colours=colours)
    heat = go.Heatmap(
        z=array, zmin=chosen.low, zmax=chosen.high, colorscale=plotly_scale(chosen.colours), opacity=opacity,
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
    )  # fmt: skip
    width = round(size * array.shape[1] / array.shape[0]) + 60
    figure = Figure([photo(data_uri(picture), array.shape, array.shape), heat])
    plain(figure, title=title, width=width, height=size)
    square_cells(figure)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return figure
