"""The patch grid over its image: a map, framed patches, the paths of routes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mamba_attn.figures import colours as _colours
from mamba_attn.figures.colours import (
    DIVERGING,
    EMPTY,
    INK,
    PATH,
    VIRIDIS,
    Scale,
    as_image,
    as_values,
    css,
    plotly_scale,
    to_rgb,
)
from mamba_attn.figures.picture import data_uri, patch_size
from mamba_attn.figures.route_geometry import as_marks, as_route, jumps, mark, shown_steps, stroke
from mamba_attn.figures.theme import Figure, panels, photo, plain, square_cells

HEAT = "heat"
CHOSEN = "chosen"
_STEPS = 33  # colours of a scale that lets an image through
THIN = 0.35  # of the opacity, what is left at zero
_TICKS = 5  # of the colour bar: zero is the middle one of signed values
_GAPS = 300  # cells, up to which lines between them help
SEGMENTS = 32  # colours of a line; plotly draws a line in one colour, and thousands of lines slowly


def patch_view(
    values: Any,
    *,
    image: Any | None = None,
    marks: Iterable[int] = (),
    order: Any | None = None,
    step: int | None = None,
    opacity: float | None = None,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: list[str] | None = None,
    bar_title: str = "",
    title: str | None = None,
    size: int = 460,
) -> go.Figure:
    """Show a map on the patch grid; cells can be clicked and selected by dragging.

    Args:
        values: (height, width) on the grid.
        image: (rows, columns, 3), uint8 or in 0..1, drawn below and stretched to the grid.
        marks: patches to frame, as raster indices; adjacent ones share a frame.
        order: the patch visited at each step; its path is drawn.
        step: draw only its first steps. Default: all.
        opacity: of the largest values, 0 to 1; below 1, smaller ones are fainter. Default: 0.9 over an image, else 1.
        limits: values of the first and the last colour. Default: the map's range without the largest half percent.
        signed: centre on zero. Default: whether a value is negative.
        colours: from low to high. Default: Viridis, for signed values blue below zero and orange above.
        bar_title: what the colours mean, above the map.
        title: above the figure.
        size: height of the figure in pixels; the width is that of its container.

    Raises:
        ValueError: values that are not a grid, patches outside it, a step that does not exist, limits that do not fit.

    Example:
        >>> figure = patch_view(torch.rand(4, 6), marks=[0], title="what patch 0 reads")
        >>> figure.layout.title.text
        'what patch 0 reads'
    """
    array = as_values("patch_view(values)", values)
    height, width = array.shape
    figure = Figure()
    if image is not None:
        picture = as_image("patch_view(image)", image)
        figure.add_trace(photo(data_uri(picture), picture.shape[:2], (height, width)))
    figure.add_trace(
        _heat(array, (1.0 if image is None else 0.9) if opacity is None else opacity, limits, signed, colours)
    )
    cell = (size - 30) / max(height, width)
    figure.add_traces(_frame(as_marks("patch_view", marks, (height, width)), (height, width), cell))
    if order is not None:
        route = as_route("patch_view", order, (height, width))
        count = shown_steps("patch_view", step, len(route))
        scale = Scale(0, max(len(route) - 1, 1), PATH)
        figure.add_traces(
            [*_lines(route, count, scale, stroke(cell), halo=True), _ends(route[:count], scale, cell, bar=False)]
        )
    plain(figure, title=title, width=size, height=size)
    square_cells(figure)
    figure.update_xaxes(visible=False, range=[-0.5, width - 0.5]).update_yaxes(
        visible=False, scaleanchor="x", range=[height - 0.5, -0.5], autorange=False
    )
    margin = {"l": 8, "r": 8, "t": 34 if title else 28, "b": 8}
    line = {"color": INK, "width": 1.5, "dash": "dot"}
    # above the map: the bar's own title would narrow the map
    figure.add_annotation(
        text=bar_title, x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom", showarrow=False
    )
    return figure.update_layout(
        width=None,
        autosize=True,
        margin=margin,
        dragmode="select",
        showlegend=False,
        hovermode="closest",
        newselection={"line": line},
        activeselection={"fillcolor": "white", "opacity": 0.12},
    )


def _heat(
    array: np.ndarray,
    opacity: float,
    limits: tuple[float, float] | None,
    signed: bool | None,
    colours: list[str] | None,
) -> go.Heatmap:
    chosen = _chosen(array, limits, signed, colours)
    gap = 1 if array.size <= _GAPS else 0
    bar = {"thickness": 10, "outlinewidth": 0, "x": 1.0, "xpad": 6, **_ticks(array, chosen)}
    return go.Heatmap(
        z=array.astype(np.float32),
        zmin=chosen.low,
        zmax=chosen.high,
        colorscale=_clear(chosen, opacity),
        colorbar=bar,
        name=HEAT,
        xgap=gap,
        ygap=gap,
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
    )


def _chosen(
    array: np.ndarray, limits: tuple[float, float] | None, signed: bool | None, colours: list[str] | None
) -> Scale:
    own = {} if limits is not None or signed is False else _colours.limits(np.nan_to_num(array), signed)
    signed = own.get("signed", signed)
    return _colours.scale(
        array,
        limits=limits or own.get("limits"),
        signed=signed,
        colours=colours or (DIVERGING if signed or (signed is None and (array < 0).any()) else VIRIDIS),
    )


def _ticks(array: np.ndarray, chosen: Scale) -> dict[str, Any]:
    """Return evenly spaced ticks of a colour bar, including both ends; ≤ and ≥ mark values beyond them."""
    values = np.linspace(chosen.low, chosen.high, _TICKS).tolist()
    texts = [f"{value:.3g}".replace("-", "\N{MINUS SIGN}") for value in values]
    texts[0] = f"\N{LESS-THAN OR EQUAL TO} {texts[0]}" if np.nanmin(array) < chosen.low else texts[0]
    texts[-1] = f"\N{GREATER-THAN OR EQUAL TO} {texts[-1]}" if np.nanmax(array) > chosen.high else texts[-1]
    return {"tickmode": "array", "tickvals": values, "ticktext": texts}


def _clear(chosen: Scale, opacity: float) -> list[list[float | str]]:
    """Return a colorscale that is transparent near zero or, for unsigned values, near the lowest."""
    if opacity >= 1:
        return plotly_scale(chosen.colours)
    position = np.linspace(0, 1, _STEPS)
    rgb = to_rgb(position, Scale(0.0, 1.0, chosen.colours))
    strength = np.abs(2 * position - 1) if chosen.low < 0 < chosen.high else position
    alpha = opacity * (THIN + (1 - THIN) * np.sqrt(strength))
    colours = ["rgba({}, {}, {}, {:.3f})".format(*channels, one) for channels, one in zip(rgb, alpha, strict=True)]
    return plotly_scale(colours)


def _frame(marks: np.ndarray, grid: tuple[int, int], cell: float) -> list[go.Scatter]:
    """Return one outline, dark on light to be visible on any image; without marks, an empty trace to select by."""
    x, y = outline(marks, grid)
    wide = min(max(0.08 * cell, 1.5), 3.0)
    return [
        go.Scatter(x=x, y=y, mode="lines", hoverinfo="skip", name=CHOSEN, line={"color": colour, "width": line})
        for colour, line in (("white", wide + 2.5), (INK, wide))
    ]


def outline(marks: np.ndarray, grid: tuple[int, int]) -> tuple[list[float | None], list[float | None]]:
    """Return x and y of the edges around some cells, None between edges.

    Args:
        marks: (row, column) of each cell.
        grid: (height, width).
    """
    inside = np.zeros((grid[0] + 2, grid[1] + 2), dtype=bool)
    inside[marks[:, 0] + 1, marks[:, 1] + 1] = True
    x: list[float | None] = []
    y: list[float | None] = []
    for row, column in np.argwhere(inside[1:] != inside[:-1]):  # an edge below row - 1
        x += [column - 1.5, column - 0.5, None]
        y += [row - 0.5, row - 0.5, None]
    for row, column in np.argwhere(inside[:, 1:] != inside[:, :-1]):
        x += [column - 0.5, column - 0.5, None]
        y += [row - 1.5, row - 0.5, None]
    return x, y


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
    figure.update_xaxes(range=[-0.5, grid[1] - 0.5])  # keep marks at the edge from widening the range
    figure.update_yaxes(range=[grid[0] - 0.5, -0.5], autorange=False, scaleratio=patch[0] / patch[1])
    figure.update_layout(showlegend=False, plot_bgcolor=css(EMPTY))
    cell = size / max(grid[0], grid[1] * shape[0] / shape[1])
    below = [] if picture is None else [photo(data_uri(picture), picture.shape[:2], grid)]
    for index, (place, points) in enumerate(zip(places, routes, strict=True)):
        traces = [
            *below,
            _cells(points[:count], grid, chosen, 0.0 if below else 0.25),
            *_lines(points, count, chosen, stroke(cell), halo=bool(below)),
            *_frames(framed, cell),
            _ends(points[:count], chosen, cell, bar=index == 0 and length > 1),
        ]
        figure.add_traces(traces, rows=[place["row"]] * len(traces), cols=[place["col"]] * len(traces))
    return figure


def _cells(points: np.ndarray, grid: tuple[int, int], chosen: Scale, opacity: float) -> go.Heatmap:
    """Return an invisible trace that shows the step of every cell on hover."""
    steps = np.full(grid, np.nan)
    steps[points[:, 0], points[:, 1]] = np.arange(len(points))
    return go.Heatmap(
        z=steps,
        zmin=chosen.low,
        zmax=chosen.high,
        colorscale=plotly_scale(chosen.colours),
        opacity=opacity,
        showscale=False,
        hoverongaps=False,
        hovertemplate="step %{z}, row %{y}, column %{x}<extra></extra>",
    )


def _lines(points: np.ndarray, count: int, chosen: Scale, width: float, *, halo: bool) -> Iterator[go.Scatter]:
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
    """Insert NaN, which lifts the pen, into moves that are not drawn."""
    return np.insert(points.astype(float), np.flatnonzero(lifted) + 1, np.nan, axis=0)


def _line(points: np.ndarray, colour: str, width: float) -> go.Scatter:
    line = {"color": colour, "width": width}
    return go.Scatter(x=points[:, 1], y=points[:, 0], mode="lines", hoverinfo="skip", line=line)


def _frames(points: np.ndarray, cell: float) -> Iterator[go.Scatter]:
    """Add marked patches, dark on light to be visible on any image."""
    for colour, width in (("#ffffff", 4), (INK, 2)) if len(points) else ():
        marker = {"symbol": "square-open", "size": 0.8 * cell, "color": colour, "line": {"width": width}}
        yield _markers(points, marker)


def _ends(points: np.ndarray, chosen: Scale, cell: float, *, bar: bool) -> go.Scatter:
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
    return go.Scatter(x=points[:, 1], y=points[:, 0], mode="markers", hoverinfo="skip", cliponaxis=False, marker=marker)
