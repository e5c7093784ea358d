"""Where a token's information comes from: maps of receptive fields, and distances by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mamba_attn.figures.colours import INK, SEQUENTIAL, as_values, plotly_scale, scale
from mamba_attn.figures.roof import PALETTE
from mamba_attn.figures.theme import FONT, Figure, plain

_GRID = "#e4e4e4"
_CHART, _BETWEEN, _AXIS, _LINE = 230, 50, 48, 20  # heights in pixels: chart, above it, below it, a legend's line
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star")
_DASHES = ("dash", "dot", "dashdot", "longdash")


def reach(
    maps: Sequence[Any],
    titles: Sequence[str],
    *,
    marks: Sequence[tuple[float, float] | None] | None = None,
    layers: Sequence[str] = (),
    series: Mapping[str, Sequence[float]] | None = None,
    levels: Mapping[str, float] | None = None,
    title: str | None = None,
    size: int = 260,
) -> go.Figure:
    """Show maps side by side, and below them distances by layer.

    Args:
        maps: (rows, columns) each; sizes may differ.
        titles: one above each.
        marks: per map the (row, column) of its token, in cells of the map, or None. Default: none.
        layers: names, first to last: the axis of the chart. Without them there is no chart.
        series: per name a distance for each layer, in pixels; NaN is left out.
        levels: per name one distance, drawn as a line across.
        title: above the figure.
        size: height of a map in pixels.

    Raises:
        ValueError: no maps, or lists of different lengths.
    """
    arrays = check_reach("reach", maps, titles, marks, layers, series)
    chart = bool(layers)
    shown = chart_series(series, levels)
    widths = [array.shape[1] / array.shape[0] for array in arrays]
    specs = [[{} for _ in arrays], [{"colspan": len(arrays)}, *[None] * (len(arrays) - 1)]]
    area = size + _BETWEEN + _CHART if chart else size
    figure = make_subplots(
        rows=2 if chart else 1, cols=len(arrays), subplot_titles=list(titles), specs=specs if chart else specs[:1],
        column_widths=[width / sum(widths) for width in widths], row_heights=[size, _CHART] if chart else None,
        vertical_spacing=_BETWEEN / area, horizontal_spacing=0.02, figure=Figure(),
    )  # fmt: skip
    width = round(size * sum(widths)) + 40 * len(arrays) + 60
    plain(figure, title=title, width=max(width, 560 if chart else 0), height=area)
    if not chart:
        figure.update_layout(margin={"l": 20, "r": 20, "b": 10})
    figure.update_layout(height=area + figure.layout.margin.b + (70 if title else 30), margin_t=70 if title else 30)
    for column, (array, mark) in enumerate(zip(arrays, marks or [None] * len(arrays), strict=True), start=1):
        _map(figure, array, mark, column)
    if chart:
        _chart(figure, list(layers), shown, {"row": 2, "col": 1})
        _legend_below(figure, len(shown), area)
    figure.update_annotations(font={**FONT, "size": 12})
    return figure


def distances(
    layers: Sequence[str], series: Mapping[str, Sequence[float]], levels: Mapping[str, float] | None = None
) -> go.Figure:
    """Show distances by layer alone, as wide as the page.

    Args:
        layers: names, first to last.
        series: per name a distance for each layer, in pixels; NaN is left out.
        levels: per name one distance, drawn as a line across.

    Raises:
        ValueError: a series of another length.
    """
    check_reach("distances", [np.zeros((1, 1))], [""], None, layers, series)
    shown = chart_series(series, levels)
    figure = plain(Figure(), title=None, width=_CHART, height=_CHART)
    figure.update_layout(width=None, margin_t=12)
    _chart(figure, list(layers), shown, {})
    _legend_below(figure, len(shown), _CHART)
    return figure


def check_reach(
    call: str, maps: Sequence[Any], titles: Sequence[str], marks: Sequence[Any] | None, layers: Sequence[str],
    series: Mapping[str, Sequence[float]] | None,
) -> list[np.ndarray]:  # fmt: skip
    """Return the maps as arrays.

    Raises:
        ValueError: no maps, or lists of different lengths.
    """
    arrays = [as_values(f"{call}(maps[{index}])", values) for index, values in enumerate(maps)]
    if not arrays or len(titles) != len(arrays) or (marks is not None and len(marks) != len(arrays)):
        raise ValueError(f"{call}: expected a title, and if any a mark, per map; got {len(arrays)} maps, {len(titles)} "
                         f"titles, {'no' if marks is None else len(marks)} marks.")  # fmt: skip
    wrong = [name for name, values in (series or {}).items() if len(values) != len(layers)]
    if wrong:
        raise ValueError(f"{call}(series): expected a distance per layer, {len(layers)}, which {wrong[0]!r} has not.")
    return arrays


def chart_series(
    series: Mapping[str, Sequence[float]] | None, levels: Mapping[str, float] | None
) -> list[tuple[str, str, np.ndarray | float]]:
    """Return (name, colour, distances or one level) of what the chart shows; what is NaN throughout is left out."""
    every: list[tuple[str, np.ndarray | float]] = [
        (name, np.asarray(values, dtype=np.float64)) for name, values in (series or {}).items()
    ]
    every += [(name, float(value)) for name, value in (levels or {}).items()]
    there = [(name, values) for name, values in every if np.isfinite(values).any()]
    return [(name, PALETTE[index % len(PALETTE)], values) for index, (name, values) in enumerate(there)]


def _map(figure: go.Figure, array: np.ndarray, mark: tuple[float, float] | None, column: int) -> None:
    its = scale(array, colours=SEQUENTIAL, signed=False)
    place = {"row": 1, "col": column}
    heat = go.Heatmap(
        z=array.astype(np.float32), zmin=its.low, zmax=its.high, colorscale=plotly_scale(its.colours), showscale=False,
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(heat, **place)
    if mark is not None:
        cross = {"symbol": "cross-thin", "size": 11, "line": {"color": "#00ffff", "width": 2}}
        figure.add_trace(
            go.Scatter(x=[mark[1]], y=[mark[0]], mode="markers", marker=cross, hoverinfo="skip", showlegend=False),
            **place,
        )
    figure.update_xaxes(visible=False, constrain="domain", range=[-0.5, array.shape[1] - 0.5], **place)
    figure.update_yaxes(visible=False, constrain="domain", range=[array.shape[0] - 0.5, -0.5], **place)
    axis = next(figure.select_yaxes(**place))
    axis.scaleanchor = axis.anchor


def _chart(
    figure: go.Figure, layers: list[str], shown: list[tuple[str, str, np.ndarray | float]], where: dict[str, int]
) -> None:
    numbers = list(range(1, len(layers) + 1))
    for index, (name, colour, values) in enumerate(shown):
        whole = isinstance(values, float)
        y = [values] * len(layers) if whole else np.asarray(values)
        line = {"color": colour, "width": 2, "dash": _DASHES[index % len(_DASHES)] if whole else "solid"}
        marker = {"symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 7}
        figure.add_trace(
            go.Scatter(
                x=numbers, y=y, name=name, mode="lines" if whole else "lines+markers", line=line, marker=marker,
                text=layers, hovertemplate=f"{name}<br>%{{text}}: %{{y:.3g}} pixels<extra></extra>",
            ),
            **where,
        )  # fmt: skip
    axis = {"gridcolor": _GRID, "linecolor": INK, "ticks": "outside"}
    figure.update_xaxes(title={"text": "layer", "standoff": 6}, dtick=-(-len(layers) // 16), tick0=1, **where, **axis)
    figure.update_yaxes(title="mean distance in pixels", rangemode="tozero", **where, **axis)


def _legend_below(figure: go.Figure, entries: int, area: int) -> None:
    """The legend right below the axis, in two columns, and the height that all of it needs."""
    below = _AXIS + _LINE * -(-entries // 2) + 8
    legend = {
        "orientation": "h", "x": 0, "y": -_AXIS / area, "yanchor": "top", "font": {"size": 12},
        "entrywidthmode": "fraction", "entrywidth": 0.5 if entries > 1 else 1,
    }  # fmt: skip
    figure.update_layout(showlegend=True, legend=legend, margin={"l": 60, "r": 20, "b": below})
    figure.update_layout(height=area + below + figure.layout.margin.t)
