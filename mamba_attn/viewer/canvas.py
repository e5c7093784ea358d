"""The scatterplot as the page draws it: axes, legend and gestures by plotly, the points on a canvas of our own.

Plotly takes 0.2 s to light up some of 3,000 points where no graphics card helps; a canvas takes a few milliseconds.
"""

import base64
from typing import Any

import dash
import numpy as np
import plotly.graph_objects as go

_ROOM = 0.05  # margin around the points, as a part of their extent


def on_canvas(figure: go.Figure) -> go.Figure:
    """Return an ``embedding`` figure whose points ``assets/points.js`` draws.

    The first trace has all points, invisible, for gestures, and in its ``meta`` how they look: "colours", and per point
    the number of its "colour" in them, its "size" and its "symbol". The others only make the legend or the colour bar.

    Args:
        figure: of ``figures.embedding``, with its points in any number of traces.
    """
    count = sum(len(trace.x) for trace in figure.data)
    x, y, size = np.empty(count), np.empty(count), np.empty(count)
    colour, symbol, texts = np.zeros(count, int), np.zeros(count, int), np.empty(count, object)
    colours: list[str] = []
    for kind, trace in enumerate(figure.data):
        own = np.asarray(trace.customdata, dtype=int)
        x[own], y[own], size[own], texts[own] = trace.x, trace.y, trace.marker.size, trace.text
        if trace.marker.showscale:
            colours = [each[1] for each in trace.marker.colorscale]
            values = np.asarray(trace.marker.color, dtype=np.float64)
            low, high = np.nanmin(values), np.nanmax(values)
            colour[own] = np.nan_to_num((values - low) / max(high - low, 1e-12) * 255).round()
        else:
            colours.append(trace.marker.color)
            colour[own], symbol[own] = kind, kind
    look = {
        "colours": colours, "colour": colour.tolist(), "size": size.round(1).tolist(), "symbol": symbol.tolist(),
        "symbols": [trace.marker.symbol for trace in figure.data], "smooth": bool(figure.data[0].marker.showscale),
    }  # fmt: skip
    label = figure.data[0].hoverlabel.to_plotly_json()
    points = go.Scatter(
        x=x.astype(np.float32), y=y.astype(np.float32), mode="none", hoverinfo="text", hovertext=texts.tolist(),
        customdata=list(range(count)), meta=look, showlegend=False, hoverlabel=label,
    )  # fmt: skip
    shown = go.Figure([points, *map(_legend, figure.data)], figure.layout)
    shown.update_xaxes(range=_range(x)).update_yaxes(range=_range(y))
    return shown.update_layout(legend={"itemclick": False, "itemdoubleclick": False})


def moved(xy: np.ndarray, revision: str) -> dash.Patch:
    """Return what changes of an ``on_canvas`` figure when its points, the same ones, lie elsewhere.

    Args:
        xy: (points, 2).
        revision: of the figure; a new one makes plotly forget the user's zoom.
    """
    change = dash.Patch()
    for name, values in zip("xy", xy.T.astype("<f4"), strict=True):
        packed = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
        change["data"][0][name] = {"dtype": "f4", "bdata": packed}  # plotly's own way to write an array
        change["layout"][f"{name}axis"]["range"] = _range(values)
    change["layout"]["uirevision"] = revision
    return change


def _legend(trace: Any) -> go.Scatter:
    """The trace without points, for its entry in the legend, or its colour bar."""
    look = trace.marker
    marker: dict[str, Any] = {"size": float(np.max(look.size)), "color": look.color, "symbol": look.symbol}
    if look.showscale:
        values = np.asarray(look.color, dtype=np.float64)
        bar = look.colorbar.to_plotly_json()
        marker |= {"cmin": float(np.nanmin(values)), "cmax": float(np.nanmax(values)), "color": [0.0]}
        marker |= {"showscale": True, "colorscale": look.colorscale, "colorbar": bar}
    return go.Scatter(
        x=[None], y=[None], mode="markers", name=trace.name, marker=marker, showlegend=not look.showscale,
        hoverinfo="skip",
    )  # fmt: skip


def _range(values: np.ndarray) -> list[float]:
    low, high = float(values.min()), float(values.max())
    room = (high - low) * _ROOM or 1.0
    return [low - room, high + room]
