"""Where the hidden state of a scan goes: its path, its norm over the image, and how distance grows between states."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mamba_attn.figures.colours import CIVIDIS, INK, SEQUENTIAL, as_values, plotly_scale, scale
from mamba_attn.figures.roof import PALETTE
from mamba_attn.figures.theme import FONT, Figure, plain

_GRID = "#e4e4e4"
_DASHES = ("solid", "dash", "dot", "dashdot")
_TITLES = ("path of the state", "norm of the state", "distance between states")


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
    _path(figure, steps, explained)
    _norms(figure, norms)
    for index, (kind, its) in enumerate(lines.items()):
        _distance(figure, kind, its, index)
    figure.update_xaxes(title="distance of their tokens", rangemode="tozero", gridcolor=_GRID, row=1, col=3)
    figure.update_yaxes(title="mean and standard deviation", rangemode="tozero", gridcolor=_GRID, row=1, col=3)
    figure.update_annotations(font={**FONT, "size": 12})
    figure.update_xaxes(title={"font": {"size": 12}, "standoff": 6}).update_yaxes(title={"font": {"size": 12}})
    legend = {
        "x": 0.99,
        "xanchor": "right",
        "y": 0.03,
        "yanchor": "bottom",
        "font": {"size": 11},
        "bgcolor": "#ffffffb0",
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


def _path(figure: go.Figure, steps: np.ndarray, explained: tuple[float, float] | None) -> None:
    bar = {"title": {"text": "step", "side": "top"}, "thickness": 8, "outlinewidth": 0, "x": 0.265, "len": 0.9}
    marker = {
        "color": np.arange(len(steps)), "colorscale": plotly_scale(CIVIDIS), "size": 4, "showscale": True,
        "colorbar": bar,
    }  # fmt: skip
    line = go.Scatter(
        x=steps[:, 0], y=steps[:, 1], mode="lines+markers", marker=marker, line={"color": "#c8c8c8", "width": 1},
        text=[f"step {step}" for step in range(len(steps))], hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.add_trace(line, row=1, col=1)
    names = [f"component {number}" for number in (1, 2)]
    if explained is not None:
        names = [f"{name} ({share:.0%})" for name, share in zip(names, explained, strict=True)]
    for place, (x, y) in (("first", steps[0]), ("last", steps[-1])):
        note = {"arrowsize": 1, "arrowwidth": 1, "ax": 18, "ay": -18, "font": {"color": INK, "size": 11}}
        figure.add_annotation(x=x, y=y, text=place, row=1, col=1, **note)
    figure.update_xaxes(title=names[0], zeroline=False, gridcolor=_GRID, row=1, col=1)
    figure.update_yaxes(title=names[1], zeroline=False, gridcolor=_GRID, row=1, col=1)


def _norms(figure: go.Figure, norms: np.ndarray) -> None:
    its = scale(norms, colours=SEQUENTIAL, signed=False)
    heat = go.Heatmap(
        z=norms, zmin=its.low, zmax=its.high, colorscale=plotly_scale(its.colours), hoverongaps=False,
        colorbar={"thickness": 8, "outlinewidth": 0, "x": 0.635, "len": 0.9},
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(heat, row=1, col=2)
    figure.update_xaxes(visible=False, constrain="domain", row=1, col=2)
    figure.update_yaxes(visible=False, constrain="domain", autorange="reversed", row=1, col=2)
    axis = next(figure.select_yaxes(row=1, col=2))
    axis.scaleanchor = axis.anchor


def _distance(figure: go.Figure, kind: str, its: tuple[np.ndarray, np.ndarray, np.ndarray], index: int) -> None:
    distance, mean, deviation = its
    colour = PALETTE[index % len(PALETTE)]
    band = go.Scatter(
        x=np.concatenate([distance, distance[::-1]]),
        y=np.concatenate([mean + deviation, (mean - deviation)[::-1]]), fill="toself", fillcolor=colour, opacity=0.15,
        line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=kind,
    )  # fmt: skip
    line = go.Scatter(
        x=distance, y=mean, mode="lines", name=kind, legendgroup=kind,
        line={"color": colour, "width": 2, "dash": _DASHES[index % len(_DASHES)]},
        hovertemplate=f"{kind} %{{x}}: %{{y:.3g}}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(band, row=1, col=3).add_trace(line, row=1, col=3)
