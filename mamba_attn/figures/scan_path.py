"""The order in which a route visits the patches."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mamba_attn.figures.colours import EMPTY, INK, PATH, Scale, as_image, css, plotly_scale, to_rgb
from mamba_attn.figures.panels import panels
from mamba_attn.figures.path import as_marks, as_route, jumps, mark, shown_steps, stroke
from mamba_attn.figures.picture import data_uri, patch_size, photo

SEGMENTS = 32  # colours of a line; plotly draws a line in one colour, and thousands of lines slowly


def scan_path(
    order: Any,
    grid: tuple[int, int],
    *,
    titles: Sequence[str] | None = None,
    image: Any | None = None,
    step: int | None = None,
    marks: Iterable[int] = (),
    columns: int | None = None,
    colours: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 400,
) -> go.Figure:
    """Show the path of a route, or of several side by side, coloured by step from the circle to the square.

    Jumps, e.g. from the end of a row to the start of the next, are thin.

    Args:
        order: (length,) or (routes, length): the patch visited at each step, as raster index; need not visit all.
        grid: (height, width) of the patch grid.
        titles: one above each route. Default: none for one route, numbers for several.
        image: (rows, columns, 3), uint8 or in 0..1, drawn below; the patches tile it.
        step: draw the first steps only. Default: all.
        marks: patches in a frame, as raster indices.
        columns: routes in a row. Default: all in one, at most six.
        colours: from the first step to the last. Default: Plasma without its palest colour.
        title: above the figure.
        size: height of a panel in pixels.

    Raises:
        ValueError: patches outside the grid, an image that they do not tile, a step that does not exist, or another
            number of titles.

    Example:
        >>> from mamba_attn import orders
        >>> from mamba_attn.figures import scan_path
        >>> figure = scan_path(orders.cross("hilbert", 8, 8), (8, 8))
    """
    orders = np.asarray(order)
    orders = orders[None] if orders.ndim != 2 else orders
    routes = [as_route("scan_path", one, grid) for one in orders]
    framed = as_marks("scan_path", marks, grid)
    length = orders.shape[-1]
    count = shown_steps("scan_path", step, length)
    chosen = Scale(0, max(length - 1, 1), list(colours or PATH))
    picture = None if image is None else as_image("scan_path(image)", image)
    patch = (1, 1) if picture is None else patch_size("scan_path(image)", picture.shape[:2], grid)
    if titles is None:
        titles = [f"route {index + 1}" for index in range(len(routes))] if len(routes) > 1 else [""] * len(routes)
    shape = (size, size * grid[1] * patch[1] / (grid[0] * patch[0]))
    figure, places = panels("scan_path", len(routes), titles, columns=columns, shape=shape, bar=True, title=title)
    figure.update_xaxes(range=[-0.5, grid[1] - 0.5])  # marks at the edge shall not widen it
    figure.update_yaxes(range=[grid[0] - 0.5, -0.5], autorange=False, scaleratio=patch[0] / patch[1])
    figure.update_layout(showlegend=False, plot_bgcolor=css(EMPTY))
    cell = size / max(grid[0], grid[1] * shape[0] / shape[1])
    below = [] if picture is None else [photo(data_uri(picture), picture.shape[:2], grid)]
    for index, (place, points) in enumerate(zip(places, routes, strict=True)):
        traces = [
            *below,
            _cells(points[:count], grid, chosen, 0.0 if below else 0.25),
            *lines(points, count, chosen, stroke(cell), halo=bool(below)),
            *_frames(framed, cell),
            ends(points[:count], chosen, cell, bar=index == 0 and length > 1),
        ]
        figure.add_traces(traces, rows=[place["row"]] * len(traces), cols=[place["col"]] * len(traces))
    return figure


def _cells(points: np.ndarray, grid: tuple[int, int], chosen: Scale, opacity: float) -> go.Heatmap:
    """The step of every cell, under the pointer."""
    steps = np.full(grid, np.nan)
    steps[points[:, 0], points[:, 1]] = np.arange(len(points))
    return go.Heatmap(
        z=steps, zmin=chosen.low, zmax=chosen.high, colorscale=plotly_scale(chosen.colours), opacity=opacity,
        showscale=False, hoverongaps=False, hovertemplate="step %{z}, row %{y}, column %{x}<extra></extra>",
    )  # fmt: skip


def lines(points: np.ndarray, count: int, chosen: Scale, width: float, *, halo: bool) -> Iterator[go.Scatter]:
    """Yield the path in pieces of one colour each; over an image, a light line below them."""
    far = jumps(points)[: count - 1]
    if halo:
        yield _line(_runs(points[:count], far), "rgba(255, 255, 255, 0.7)", 2 * width + 1)
    edges = np.linspace(0, len(points) - 1, SEGMENTS + 1).round().astype(int)
    for start, stop in pairwise(edges):
        colour = css(to_rgb(np.array([(start + stop) / 2]), chosen)[0])
        piece, jumping = points[start : min(stop + 1, count)], far[start:stop]
        if jumping.any():
            yield _line(_runs(piece, ~jumping), colour, width / 3)
        if not jumping.all():
            yield _line(_runs(piece, jumping), colour, width)


def _runs(points: np.ndarray, lifted: np.ndarray) -> np.ndarray:
    """Points with NaN, which lifts the pen, in the moves that are not to be drawn."""
    return np.insert(points.astype(float), np.flatnonzero(lifted) + 1, np.nan, axis=0)


def _line(points: np.ndarray, colour: str, width: float) -> go.Scatter:
    line = {"color": colour, "width": width}
    return go.Scatter(x=points[:, 1], y=points[:, 0], mode="lines", hoverinfo="skip", line=line)


def _frames(points: np.ndarray, cell: float) -> Iterator[go.Scatter]:
    """Marked patches, dark on light to show on any image."""
    for colour, width in (("#ffffff", 4), (INK, 2)) if len(points) else ():
        marker = {"symbol": "square-open", "size": 0.8 * cell, "color": colour, "line": {"width": width}}
        yield _markers(points, marker)


def ends(points: np.ndarray, chosen: Scale, cell: float, *, bar: bool) -> go.Scatter:
    """Return the marks of the first step, a circle, and of the last one drawn, a square."""
    last = len(points) - 1
    marker = {
        "symbol": ["circle", "square"], "size": mark(cell), "color": [0, last],
        "cmin": chosen.low, "cmax": chosen.high, "colorscale": plotly_scale(chosen.colours), "showscale": bar,
        "colorbar": {"title": {"text": "step"}, "thickness": 12, "outlinewidth": 0},
        "line": {"color": "white", "width": 2},
    }  # fmt: skip
    return _markers(points[[0, last]], marker)


def _markers(points: np.ndarray, marker: dict[str, Any]) -> go.Scatter:
    return go.Scatter(
        x=points[:, 1], y=points[:, 0], mode="markers", hoverinfo="skip", cliponaxis=False, marker=marker
    )  # fmt: skip
