"""What every figure shares: its look, panels in reading order, images below. Plotly's template is left alone."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mamba_attn.figures.colours import INK, plotly_scale, scales

FONT = {"family": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": INK}
GAP = 12  # pixels between panels
CAPTION = 24  # pixels above each row of panels
EDGE = 16  # pixels around them
BAR = 80  # pixels right of them, for a colour bar
LINE = 13  # pixels from one name along an axis to the next
LONGEST = 14  # letters of one
Place = dict[str, int]


class Figure(go.Figure):  # type: ignore[misc]
    """A plotly figure that shows itself without a network.

    In a notebook plotly's renderers show figures and bring their script along, if nbformat is installed. Plotly's
    ``_repr_html_`` names an address to load it from instead; here the script is inside, 4.5 MB.
    """

    def _repr_html_(self) -> str:
        return str(self.to_html(full_html=False, include_plotlyjs=True))

    def _ipython_display_(self) -> None:
        if find_spec("nbformat"):
            super()._ipython_display_()
        else:  # plotly's renderers raise
            import_module("IPython.display").display_html(self._repr_html_(), raw=True)


def plain(figure: go.Figure, *, title: str | None, width: int, height: int) -> go.Figure:
    """Return the figure without template: white, small margins."""
    figure.layout.template = go.layout.Template()  # whatever plotly.io.templates.default says
    return figure.update_layout(
        title={"text": title, "x": 0.5, "xanchor": "center"} if title else None,
        font=FONT,
        paper_bgcolor="white",
        plot_bgcolor="white",
        width=width,
        height=height,
        margin={"l": 50, "r": 20, "t": 50 if title else 20, "b": 45},
    )


def square_cells(figure: go.Figure, **where: Any) -> None:
    """Row 0 on top, cells square, no lines."""
    figure.update_xaxes(showgrid=False, zeroline=False, constrain="domain", **where)
    figure.update_yaxes(showgrid=False, zeroline=False, constrain="domain", autorange="reversed", **where)


def readable(words: Sequence[str]) -> list[str]:
    """Return tokens as labels: white space visible, long ones cut."""
    seen = [word.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7") for word in words]
    return [word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}\u2026" for word in seen]


def name_ticks(update_axis: Any, names: Sequence[str], room: int) -> None:
    """Write a name at every cell of an axis, or at every so many where they would not fit.

    Args:
        update_axis: the figure's ``update_xaxes`` or ``update_yaxes``.
        names: of the cells.
        room: length of the axis in pixels.
    """
    step = -(-len(names) * LINE // room)
    update_axis(tickvals=list(range(0, len(names), step)), ticktext=list(names)[::step], tickfont={"size": 11})


def photo(source: str, size: tuple[int, int], cells: tuple[int, int]) -> go.Image:
    """Return an image laid under a grid of cells, whose centres are at whole numbers.

    Args:
        source: the image, from ``picture.data_uri``.
        size: its (rows, columns) in pixels.
        cells: (rows, columns) of the grid that it fills.
    """
    dy, dx = cells[0] / size[0], cells[1] / size[1]
    return go.Image(source=source, x0=(dx - 1) / 2, dx=dx, y0=(dy - 1) / 2, dy=dy, hoverinfo="skip", zsmooth="fast")


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
        rows=down,
        cols=across,
        subplot_titles=list(titles),
        horizontal_spacing=GAP / width,
        vertical_spacing=(GAP + caption) / height,
        figure=Figure(),
    )
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
            zmin=its.low,
            zmax=its.high,
            colorscale=plotly_scale(its.colours),
            opacity=opacity,
            showscale=shared and index == 0,
            hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
        )
        figure.add_trace(heat, **place)
    return figure
