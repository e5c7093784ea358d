"""Draws a pane: its points when they change, and only the changed parts of its map."""

import base64
import hashlib
import json
from dataclasses import asdict
from typing import Any, NamedTuple

import dash
import numpy as np
from dash import ALL, MATCH, ClientsideFunction, Input, Output, ctx, no_update

from mamba_attn.viewer.canvas import moved, on_canvas
from mamba_attn.viewer.context import Context
from mamba_attn.viewer.offer import colours
from mamba_attn.viewer.saying import BLANK, FAILURES, sentence
from mamba_attn.viewer.state import Pane, State
from mamba_attn.viewer.words import heading, legend

# a change of one of these needs a new figure; any other field changes only the map's values, or the points
_PICTURE = ("store", "layer", "image", "palette", "opacity", "path", "step")
_KEPT = 16  # figures of points
_NOTHING = "nothing"  # the key of a view that could not be drawn: the next change tries again


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
        Output({"pane": MATCH, "set": "colour"}, "options"), Input({"pane": MATCH, "set": "mode"}, "value"),
        dash.State({"pane": MATCH, "built": "store"}, "data"), prevent_initial_call=True,
    )  # fmt: skip
    def _colours(mode: str, store: int) -> Any:
        pane = Pane.parsed({"mode": mode, "store": store})
        return [{"label": each, "value": each} for each in colours(context.views(pane).source, pane.mode)]

    app.clientside_callback(
        ClientsideFunction("explorer", "light"), Output(_of("points", "shone"), "data"),
        Input(_of("points", "lit"), "data"), Input(_of("scatter"), "figure"), dash.State(_of("points", "lit"), "id"),
    )  # fmt: skip
    app.clientside_callback(
        ClientsideFunction("explorer", "map"), Output(_of("patches", "shone"), "data"),
        Input(_of("patches", "map"), "data"), dash.State(_of("patches", "map"), "id"), prevent_initial_call=True,
    )  # fmt: skip


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
