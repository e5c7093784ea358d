"""Charts: how far a token reads and how far states move, next to their maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mamba_attn.figures.colours import CATEGORIES, CIVIDIS, GRID, INK, SEQUENTIAL, as_values, plotly_scale, scale
from mamba_attn.figures.theme import FONT, Figure, plain

_CHART, _BETWEEN, _AXIS, _LINE = 230, 50, 48, 20  # heights in pixels: chart, above it, below it, a legend's line
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star")
_DASHES = ("dash", "dot", "dashdot", "longdash")
_STATE_DASHES = ("solid", "dash", "dot", "dashdot")
_TITLES = ("path of the state", "norm of the state", "distance between states")


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

    Example:
        >>> figure = reach([torch.rand(14, 14)], ["vim"], layers=["1", "2"], series={"vim": [20.0, 35.0]})
        >>> len(figure.data) >= 2
        True
    """
    arrays = check_reach("reach", maps, titles, marks, layers, series)
    chart = bool(layers)
    shown = chart_series(series, levels)
    widths = [array.shape[1] / array.shape[0] for array in arrays]
    specs = [[{} for _ in arrays], [{"colspan": len(arrays)}, *[None] * (len(arrays) - 1)]]
    area = size + _BETWEEN + _CHART if chart else size
    figure = make_subplots(
        rows=2 if chart else 1,
        cols=len(arrays),
        subplot_titles=list(titles),
        specs=specs if chart else specs[:1],
        column_widths=[width / sum(widths) for width in widths],
        row_heights=[size, _CHART] if chart else None,
        vertical_spacing=_BETWEEN / area,
        horizontal_spacing=0.02,
        figure=Figure(),
    )
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


def check_reach(
    call: str,
    maps: Sequence[Any],
    titles: Sequence[str],
    marks: Sequence[Any] | None,
    layers: Sequence[str],
    series: Mapping[str, Sequence[float]] | None,
) -> list[np.ndarray]:
    """Return the maps as arrays.

    Raises:
        ValueError: no maps, or lists of different lengths.
    """
    arrays = [as_values(f"{call}(maps[{index}])", values) for index, values in enumerate(maps)]
    if not arrays or len(titles) != len(arrays) or (marks is not None and len(marks) != len(arrays)):
        raise ValueError(
            f"{call}: expected one title per map, and one mark per map if any; got {len(arrays)} maps, "
            f"{len(titles)} titles, {'no' if marks is None else len(marks)} marks."
        )
    wrong = [name for name, values in (series or {}).items() if len(values) != len(layers)]
    if wrong:
        raise ValueError(f"{call}(series): expected one distance per layer, {len(layers)}; {wrong[0]!r} differs.")
    return arrays


def chart_series(
    series: Mapping[str, Sequence[float]] | None, levels: Mapping[str, float] | None
) -> list[tuple[str, str, np.ndarray | float]]:
    """Return (name, colour, distances or one level) of everything on the chart, without what is NaN throughout."""
    every: list[tuple[str, np.ndarray | float]] = [
        (name, np.asarray(values, dtype=np.float64)) for name, values in (series or {}).items()
    ]
    every += [(name, float(value)) for name, value in (levels or {}).items()]
    there = [(name, values) for name, values in every if np.isfinite(values).any()]
    return [(name, CATEGORIES[index % len(CATEGORIES)], values) for index, (name, values) in enumerate(there)]


def _map(figure: go.Figure, array: np.ndarray, mark: tuple[float, float] | None, column: int) -> None:
    its = scale(array, colours=SEQUENTIAL, signed=False)
    place = {"row": 1, "col": column}
    heat = go.Heatmap(
        z=array.astype(np.float32),
        zmin=its.low,
        zmax=its.high,
        colorscale=plotly_scale(its.colours),
        showscale=False,
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
    )
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
                x=numbers,
                y=y,
                name=name,
                mode="lines" if whole else "lines+markers",
                line=line,
                marker=marker,
                text=layers,
                hovertemplate=f"{name}<br>%{{text}}: %{{y:.3g}} pixels<extra></extra>",
            ),
            **where,
        )
    axis = {"gridcolor": GRID, "linecolor": INK, "ticks": "outside"}
    figure.update_xaxes(title={"text": "layer", "standoff": 6}, dtick=-(-len(layers) // 16), tick0=1, **where, **axis)
    figure.update_yaxes(title="mean distance in pixels", rangemode="tozero", **where, **axis)


def _legend_below(figure: go.Figure, entries: int, area: int) -> None:
    """The legend right below the axis, in two columns, and the height that all of it needs."""
    below = _AXIS + _LINE * -(-entries // 2) + 8
    legend = {
        "orientation": "h",
        "x": 0,
        "y": -_AXIS / area,
        "yanchor": "top",
        "font": {"size": 12},
        "entrywidthmode": "fraction",
        "entrywidth": 0.5 if entries > 1 else 1,
    }
    figure.update_layout(showlegend=True, legend=legend, margin={"l": 60, "r": 20, "b": below})
    figure.update_layout(height=area + below + figure.layout.margin.t)


def state_trajectory(
    path: Any,
    norm_map: Any,
    distances: Mapping[str, tuple[Any, Any, Any]],
    *,
    explained: tuple[float, float] | None = None,
    title: str | None = None,
    size: int = 300,
) -> go.Figure:
    """Show a state's path on two principal components, its norm over the grid, and its distances, side by side.

    Args:
        path: (length, 2), the state after every step, first to last.
        norm_map: (height, width) of the grid; NaN where the route does not go.
        distances: per kind of distance between tokens, (bins,) each: that distance, the mean distance between states,
            its standard deviation, which is drawn as a band.
        explained: share of the variance of both components, 0..1, for the axes' names.
        title: above the figure.
        size: height of a panel in pixels.

    Raises:
        ValueError: other shapes, NaN in the path, no distances.

    Example:
        >>> from mamba_attn import trace
        >>> from mamba_attn.analytics.states import state_trajectory as states_of
        >>> with torch.no_grad(), trace(model) as record:
        ...     logits = model(images)
        >>> route = states_of(record["layers.6.mixer"])
        >>> by_step = route.distances("sequence")
        >>> lines = {"sequence": (by_step.distance, by_step.mean, by_step.deviation)}
        >>> figure = state_trajectory(route.path().points, route.norm_map(), lines)
    """
    steps = np.asarray(path, dtype=np.float64)
    if steps.ndim != 2 or steps.shape[1] != 2 or not len(steps) or not np.isfinite(steps).all():
        raise ValueError(f"state_trajectory(path{steps.shape}): expected (length, 2) finite numbers.")
    norms = as_values("state_trajectory(norm_map)", norm_map)
    lines = {kind: _checked(kind, given) for kind, given in distances.items()}
    if not lines:
        raise ValueError("state_trajectory(distances={}): expected at least one kind of distance, e.g. 'sequence'.")
    figure = make_subplots(rows=1, cols=3, subplot_titles=_TITLES, horizontal_spacing=0.1, figure=Figure())
    plain(figure, title=title, width=round(3.6 * size) + 90, height=size + (110 if title else 80))
    _state_path(figure, steps, explained)
    _norms(figure, norms)
    for index, (kind, its) in enumerate(lines.items()):
        _distance(figure, kind, its, index)
    figure.update_xaxes(title="distance of their tokens", rangemode="tozero", gridcolor=GRID, row=1, col=3)
    figure.update_yaxes(title="mean and standard deviation", rangemode="tozero", gridcolor=GRID, row=1, col=3)
    figure.update_annotations(font={**FONT, "size": 12})
    figure.update_xaxes(title={"font": {"size": 12}, "standoff": 6}).update_yaxes(title={"font": {"size": 12}})
    legend = {
        "x": 0.99,
        "xanchor": "right",
        "y": 0.03,
        "yanchor": "bottom",
        "font": {"size": 11},
        "bgcolor": "rgba(255, 255, 255, 0.7)",
    }
    return figure.update_layout(legend=legend, margin={"l": 50, "r": 15, "b": 60, "t": 70 if title else 40})


def _checked(kind: str, given: tuple[Any, Any, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    distance, mean, deviation = (np.asarray(each, dtype=np.float64) for each in given)
    if distance.ndim != 1 or not distance.shape == mean.shape == deviation.shape or not distance.size:
        raise ValueError(
            f"state_trajectory(distances[{kind!r}]): expected distance, mean and deviation of (bins,) each, got "
            f"{distance.shape}, {mean.shape}, {deviation.shape}."
        )
    return distance, mean, deviation


def _state_path(figure: go.Figure, steps: np.ndarray, explained: tuple[float, float] | None) -> None:
    bar = {"title": {"text": "step", "side": "top"}, "thickness": 8, "outlinewidth": 0, "x": 0.265, "len": 0.9}
    marker = {
        "color": np.arange(len(steps)),
        "colorscale": plotly_scale(CIVIDIS),
        "size": 4,
        "showscale": True,
        "colorbar": bar,
    }
    line = go.Scatter(
        x=steps[:, 0],
        y=steps[:, 1],
        mode="lines+markers",
        marker=marker,
        line={"color": "#c8c8c8", "width": 1},
        text=[f"step {step}" for step in range(len(steps))],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
    figure.add_trace(line, row=1, col=1)
    names = [f"component {number}" for number in (1, 2)]
    if explained is not None:
        names = [f"{name} ({share:.0%})" for name, share in zip(names, explained, strict=True)]
    for place, (x, y) in (("first", steps[0]), ("last", steps[-1])):
        note = {"arrowsize": 1, "arrowwidth": 1, "ax": 18, "ay": -18, "font": {"color": INK, "size": 11}}
        figure.add_annotation(x=x, y=y, text=place, row=1, col=1, **note)
    figure.update_xaxes(title=names[0], zeroline=False, gridcolor=GRID, row=1, col=1)
    figure.update_yaxes(title=names[1], zeroline=False, gridcolor=GRID, row=1, col=1)


def _norms(figure: go.Figure, norms: np.ndarray) -> None:
    its = scale(norms, colours=SEQUENTIAL, signed=False)
    heat = go.Heatmap(
        z=norms,
        zmin=its.low,
        zmax=its.high,
        colorscale=plotly_scale(its.colours),
        hoverongaps=False,
        colorbar={"thickness": 8, "outlinewidth": 0, "x": 0.635, "len": 0.9},
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
    )
    figure.add_trace(heat, row=1, col=2)
    figure.update_xaxes(visible=False, constrain="domain", row=1, col=2)
    figure.update_yaxes(visible=False, constrain="domain", autorange="reversed", row=1, col=2)
    axis = next(figure.select_yaxes(row=1, col=2))
    axis.scaleanchor = axis.anchor


def _distance(figure: go.Figure, kind: str, its: tuple[np.ndarray, np.ndarray, np.ndarray], index: int) -> None:
    distance, mean, deviation = its
    colour = CATEGORIES[index % len(CATEGORIES)]
    band = go.Scatter(
        x=np.concatenate([distance, distance[::-1]]),
        y=np.concatenate([mean + deviation, (mean - deviation)[::-1]]),
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=kind,
    )
    line = go.Scatter(
        x=distance,
        y=mean,
        mode="lines",
        name=kind,
        legendgroup=kind,
        line={"color": colour, "width": 2, "dash": _STATE_DASHES[index % len(_STATE_DASHES)]},
        hovertemplate=f"{kind} %{{x}}: %{{y:.3g}}<extra></extra>",
    )
    figure.add_trace(band, row=1, col=3).add_trace(line, row=1, col=3)
