"""Draws a pane: its points when they change, and only the changed parts of its map.

Axes, legend and gestures of the scatterplot are plotly's, its points are on a canvas of our own: plotly takes 0.2 s to
highlight some of 3,000 points without a graphics card; a canvas takes a few milliseconds.
"""

import base64
import hashlib
import json
from dataclasses import asdict
from typing import Any, NamedTuple

import dash
import numpy as np
import plotly.graph_objects as go
from dash import ALL, MATCH, ClientsideFunction, Input, Output, ctx, no_update

from mamba_attn.viewer.captions import heading, legend, point_colours
from mamba_attn.viewer.context import Context
from mamba_attn.viewer.errors import BLANK, FAILURES, sentence
from mamba_attn.viewer.state import Pane, State

# a change of one of these needs a new figure; any other field changes only the map's values, or the points
_PICTURE = ("store", "layer", "image", "palette", "opacity", "path", "step")
_KEPT = 16  # figures of points
_NOTHING = "nothing"  # the key of a view that could not be drawn: the next change tries again
_ROOM = 0.05  # margin around the points, as a part of their extent


class Drawn(NamedTuple):
    """A patch view for the page; ``no_update`` for parts that stay.

    Args:
        figure: all of it.
        map: or only its changes, for ``assets/points.js``.
        title: text above it.
        notice: text below it.
        key: hash of what it shows; the page sends it back with the next request.
    """

    figure: Any
    map: Any
    title: Any
    notice: Any
    key: Any


def register(app: dash.Dash, context: Context) -> None:
    """Register the callbacks that draw points; those of ``acting`` draw the maps."""
    kept: dict[str, Any] = {}  # figures of points: making one takes longer than sending it

    @app.callback(
        Output(_of("scatter"), "figure"),
        Output(_of("scatter", "title"), "children"),
        Output(_of("scatter", "notice"), "children"),
        Output(_of("scatter", "drawn"), "data"),
        Input({"pane": MATCH, "set": ALL}, "value"),
        dash.State(_of("scatter", "drawn"), "data"),
    )
    def _points(_: Any, drawn: Any) -> Any:
        pane = context.pane(ctx.inputs_list[0])
        views = context.views(pane)
        layer = views.source.layer(pane)
        # all that the points depend on; any other change leaves them in place
        key = [pane.store, pane.mode, layer.stage if pane.mode == "blocks" else layer.name, pane.method, pane.colour]
        key += [] if pane.method == "pca" else [pane.first]
        places = [] if pane.mode == "blocks" else [views.source.route(pane), pane.direction]
        if drawn == [key, places]:
            return no_update, no_update, no_update, no_update
        try:
            name = str([key, places])
            if isinstance(drawn, list) and drawn[:1] == [key] and pane.colour != "rank":
                return moved(views.points(pane).xy, name), no_update, "", [key, places]
            figure = kept.get(name)
            if figure is None:
                figure = on_canvas(views.scatter(pane, State())).update_layout(height=None, uirevision=name)
                kept[name] = figure
                for oldest in list(kept)[:-_KEPT]:
                    kept.pop(oldest, None)
        except (*FAILURES, ValueError) as error:  # ValueError: too few points
            return BLANK, "Points", sentence(error), None
        return figure, views.points(pane).about, "", [key, places]

    @app.callback(
        Output({"pane": MATCH, "set": "colour"}, "options"),
        Input({"pane": MATCH, "set": "mode"}, "value"),
        dash.State({"pane": MATCH, "built": "store"}, "data"),
        prevent_initial_call=True,
    )
    def _colours(mode: str, store: int) -> Any:
        pane = Pane.parsed({"mode": mode, "store": store})
        return [{"label": each, "value": each} for each in point_colours(context.views(pane).source, pane.mode)]

    app.clientside_callback(
        ClientsideFunction("explorer", "light"),
        Output(_of("points", "shone"), "data"),
        Input(_of("points", "lit"), "data"),
        Input(_of("scatter"), "figure"),
        dash.State(_of("points", "lit"), "id"),
    )
    app.clientside_callback(
        ClientsideFunction("explorer", "map"),
        Output(_of("patches", "shone"), "data"),
        Input(_of("patches", "map"), "data"),
        dash.State(_of("patches", "map"), "id"),
        prevent_initial_call=True,
    )


def drawn_map(context: Context, pane: Pane, state: State, before: Any) -> Drawn:
    """Return the parts of a pane's patch view that differ from what the page shows.

    Args:
        context: the open stores.
        pane: which attention.
        state: the selection.
        before: key of what the page shows; None if it shows nothing.
    """
    picture, values = _key(pane, state)
    if before == [picture, values]:
        return Drawn(no_update, no_update, no_update, no_update, no_update)
    views = context.views(pane)
    same = isinstance(before, list) and before[0] == picture
    figure = changes = no_update
    try:
        if same:
            changes = {**_packed(views.changes(pane, state)), "unit": legend(views.source, pane)}
        else:
            figure = views.patches(pane, state).update_layout(height=None)
    except FAILURES as error:
        return Drawn(BLANK, no_update, "Patches", sentence(error), _NOTHING)
    return Drawn(figure, changes, heading(views.source, pane, state), "", [picture, values])


def _of(name: str, part: str = "view") -> dict[str, Any]:
    return {"pane": MATCH, part: name}


def _key(pane: Pane, state: State) -> list[str]:
    """Return hashes of what the picture and the map depend on; short, because they travel to the page and back."""
    fields = asdict(pane)
    picture = [fields.pop(name) for name in _PICTURE] + [pane.route if pane.path else None]
    for name in ("mode", "method", "first", "colour"):
        fields.pop(name)
    rest = [*fields.values(), state.grid, state.cells]
    return [hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for each in (picture, rest)]


def _packed(changes: dict[str, Any]) -> dict[str, Any]:
    """Pack the map's numbers as base64, which is shorter than JSON."""
    values = np.ascontiguousarray(changes["z"], dtype="<f4")
    return {**changes, "z": base64.b64encode(values.tobytes()).decode("ascii"), "width": values.shape[1]}


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
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        mode="none",
        hoverinfo="text",
        hovertext=texts.tolist(),
        customdata=list(range(count)),
        meta=look,
        showlegend=False,
        hoverlabel=label,
    )
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
        x=[None],
        y=[None],
        mode="markers",
        name=trace.name,
        marker=marker,
        showlegend=not look.showscale,
        hoverinfo="skip",
    )


def _range(values: np.ndarray) -> list[float]:
    low, high = float(values.min()), float(values.max())
    room = (high - low) * _ROOM or 1.0
    return [low - room, high + room]
