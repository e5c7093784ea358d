"""Several panels in one figure, in reading order."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mamba_attn.figures.colours import plotly_scale, scales
from mamba_attn.figures.theme import FONT, Figure, plain, square_cells

GAP = 12  # pixels between panels
CAPTION = 24  # pixels above each row of panels
EDGE = 16  # pixels around them
BAR = 80  # pixels right of them, for a colour bar
Place = dict[str, int]


def panels(
    call: str,
    count: int,
    titles: Sequence[str],
    *,
    columns: int | None,
    shape: tuple[float, float],
    bar: bool,
    title: str | None,
) -> tuple[go.Figure, list[Place]]:
    """Return an empty figure and the place of every panel in it, as plotly's ``row`` and ``col``.

    Args:
        call: who asks, for the error.
        count: number of panels.
        titles: one above each panel.
        columns: panels in a row. Default: all in one, at most six.
        shape: (height, width) of a panel in pixels.
        bar: leave room for a colour bar.
        title: above the figure.

    Raises:
        ValueError: no panels, another number of titles, or no columns.
    """
    if not count or count != len(titles):
        raise ValueError(f"{call}: expected one title per panel, got {count} panels, {len(titles)} titles.")
    if columns is not None and columns < 1:
        raise ValueError(f"{call}(columns={columns}): expected at least one column.")
    across = min(columns or 6, count)
    down = -(-count // across)
    caption = CAPTION if any(titles) else 0
    width, height = shape[1] * across + GAP * (across - 1), shape[0] * down + (GAP + caption) * (down - 1)
    figure = make_subplots(
        rows=down, cols=across, subplot_titles=list(titles), horizontal_spacing=GAP / width,
        vertical_spacing=(GAP + caption) / height, figure=Figure(),
    )  # fmt: skip
    margin = {"l": EDGE, "r": BAR if bar else EDGE, "t": EDGE + caption + (40 if title else 0), "b": EDGE}
    width, height = round(width + margin["l"] + margin["r"]), round(height + margin["t"] + margin["b"])
    plain(figure, title=title, width=width, height=height).update_layout(margin=margin)
    square_cells(figure)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    for axis in figure.select_yaxes():
        axis.scaleanchor = axis.anchor
    figure.update_annotations(font={**FONT, "size": 12})
    return figure, [{"row": index // across + 1, "col": index % across + 1} for index in range(count)]


def add_heat(
    figure: go.Figure,
    places: Sequence[Place],
    arrays: Sequence[np.ndarray],
    *,
    shared: bool,
    opacity: float = 1.0,
    limits: tuple[float, float] | None,
    signed: bool | None,
    colours: Sequence[str] | None,
) -> go.Figure:
    """Return the figure with a heat map in every panel; the arguments are those of ``depth_grid``."""
    chosen = scales(arrays, shared=shared, limits=limits, signed=signed, colours=colours)
    for index, (place, array, its) in enumerate(zip(places, arrays, chosen, strict=True)):
        heat = go.Heatmap(
            z=array.astype(np.float32),  # half the file; colours and three digits need no more
            zmin=its.low, zmax=its.high, colorscale=plotly_scale(its.colours), opacity=opacity,
            showscale=shared and index == 0, hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(heat, **place)
    return figure
