"""How close to the hardware: operations per byte against operations per second, under the machine's ceilings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mamba_attn.figures.colours import INK
from mamba_attn.figures.roof import Ceiling, roof, short
from mamba_attn.figures.theme import Figure, plain

_GRID = "#e4e4e4"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star")


def roofline(
    intensity: Any,
    rate: Any,
    labels: Sequence[str],
    *,
    groups: Sequence[str],
    bandwidth: float,
    rates: Mapping[str, float],
    floors: Any | None = None,
    estimated: Sequence[bool] | None = None,
    title: str | None = None,
    size: int = 620,
) -> go.Figure:
    """Draw a roofline with both axes logarithmic.

    Args:
        intensity: (points,), operations per byte that has to be moved.
        rate: (points,), operations per second that were reached.
        labels: (points,), shown beside the pointer.
        groups: (points,), the legend; points of a group share a colour.
        bandwidth: bytes per second that the machine copies: the slope.
        rates: operations per second that the machine reaches, by name: horizontal lines.
        floors: (points,), operations per second that the cheapest way would reach, or None.
        estimated: (points,), which ones were extrapolated; they are open. Default: none.
        title: above the figure.
        size: height in pixels.

    Raises:
        ValueError: numbers that are not positive, lists of different lengths, no ceiling.
    """
    best = None if floors is None else np.asarray(floors, dtype=np.float64)
    if len(labels) != len(groups) or (best is not None and best.shape != (len(groups),)):
        raise ValueError(f"roofline: expected a label and a floor per point, got {len(labels)} labels and "
                         f"{len(groups)} groups.")  # fmt: skip
    its = roof("roofline", intensity, rate, groups, estimated, bandwidth, rates, () if best is None else best)
    figure = Figure()
    for ceiling in its.ceilings:
        slope = ceiling is its.ceilings[0]
        figure.add_trace(_line(ceiling, slope))
        if not slope:
            x, y = np.log10(ceiling.stop)
            note = {"text": ceiling.name, "xanchor": "right", "yanchor": "bottom", "font": {"size": 11}}
            figure.add_annotation(x=x, y=y, showarrow=False, **note)
    if best is not None and len(best):
        figure.add_trace(_floors(its.intensity, best, labels))
    names = list(dict.fromkeys(groups))
    for group in its.groups:
        symbol = _SYMBOLS[names.index(group.name) % len(_SYMBOLS)]
        shown = f"{group.name} (extrapolated)" if group.estimated else group.name
        figure.add_trace(go.Scatter(
            x=its.intensity[group.members], y=its.rate[group.members], mode="markers", name=shown,
            marker={"color": group.colour, "size": 10, "symbol": symbol + ("-open" if group.estimated else ""),
                    "line": {"color": group.colour if group.estimated else "white", "width": 1.5}},
            text=[labels[index] for index in group.members],
            customdata=[short(value, "op/s") for value in its.rate[group.members]],
            hovertemplate=f"%{{text}}<br>{shown}<br>%{{x:.3g}} operations per byte, %{{customdata}}<extra></extra>",
        ))  # fmt: skip
    plain(figure, title=title, width=round(1.55 * size), height=size)
    axis = {"type": "log", "gridcolor": _GRID, "linecolor": INK, "ticks": "outside", "exponentformat": "power"}
    figure.update_xaxes(title="operations per byte moved", range=np.log10(its.x).tolist(), dtick=1, **axis)
    figure.update_yaxes(title="operations per second", range=np.log10(its.y).tolist(), dtick=1, **axis)
    figure.update_layout(hovermode="closest", legend={"x": 1.01, "y": 1, "font": {"size": 12}})
    return figure.update_layout(margin={"l": 80, "r": 20, "b": 60})


def _line(ceiling: Ceiling, slope: bool) -> go.Scatter:
    (x0, y0), (x1, y1) = ceiling.start, ceiling.stop
    return go.Scatter(
        x=[x0, x1], y=[y0, y1], mode="lines", name=ceiling.name, showlegend=slope,
        line={"color": INK, "width": 2, "dash": "solid" if slope else "dash"},
        hovertemplate=f"{ceiling.name}<extra></extra>",
    )  # fmt: skip


def _floors(intensity: np.ndarray, rates: np.ndarray, labels: Sequence[str]) -> go.Scatter:
    """A short bar per point, at what the cheapest way would reach."""
    return go.Scatter(
        x=intensity, y=rates, mode="markers", name="cheapest known way",
        marker={"symbol": "line-ew", "size": 16, "line": {"color": INK, "width": 2}},
        text=list(labels), customdata=[short(value, "op/s") for value in rates],
        hovertemplate="%{text}<br>cheapest known way: %{customdata}<extra></extra>",
    )  # fmt: skip
