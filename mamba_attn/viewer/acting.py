"""The callback of all gestures, keys and controls: one request returns the selection, the maps and the lit points."""

from collections.abc import Sequence
from typing import Any

import dash
from dash import ALL, ClientsideFunction, Input, Output, ctx, no_update
from dash.exceptions import PreventUpdate

from mamba_attn.viewer.context import Context
from mamba_attn.viewer.drawing import drawn_map
from mamba_attn.viewer.errors import FAILURES, sentence
from mamba_attn.viewer.interaction import after
from mamba_attn.viewer.state import Pane, State
from mamba_attn.viewer.surroundings import strip

_CONTROLS = {"pane": ALL, "set": ALL}


def register(app: dash.Dash, context: Context) -> None:
    """Register the callback, and those that write the address and forward waiting keys."""

    @app.callback(
        Output("selection", "data", allow_duplicate=True),
        Output(_CONTROLS, "value"),
        Output(_every("patches", "view"), "figure"),
        Output(_every("patches", "map"), "data"),
        Output(_every("patches", "title"), "children"),
        Output(_every("patches", "notice"), "children"),
        Output(_every("patches", "drawn"), "data"),
        Output(_every("points", "lit"), "data"),
        Output(_every("images", "strip"), "children"),
        Output("link", "data"),
        Output("acted", "data"),
        Output("message", "children", allow_duplicate=True),
        Input(_CONTROLS, "value"),
        *(Input(_every(view, "view"), event) for view in ("patches", "scatter") for event in _GESTURES),
        Input({"pane": ALL, "do": ALL}, "n_clicks"),
        Input({"pane": ALL, "pick": ALL}, "n_clicks"),
        Input({"block": ALL}, "n_clicks"),
        Input("key", "data"),
        dash.State("selection", "data"),
        dash.State(_every("patches", "drawn"), "data"),
        dash.State("shift", "data"),
        prevent_initial_call="initial_duplicate",
    )
    def _act(*given: Any) -> Any:
        controls, (selection, drawn, shift) = ctx.inputs_list[0], given[-3:]
        if not controls:
            raise PreventUpdate
        before = context.state(context.panes(controls), selection)
        source, event = ctx.triggered_id, (ctx.triggered or [{"value": None}])[0]
        gesture = source is not None and not (isinstance(source, dict) and "set" in source)
        if gesture and not event["value"] and None not in drawn:
            raise PreventUpdate  # a button that just appeared, or a selection that plotly dropped
        state = after(context, before, source, event, add=bool(shift)) if gesture and event["value"] else before
        found = _draw(context, before, state, drawn)
        same = state.cells == before.cells and state.points == before.points and state.grid == before.grid
        values = [_value(state, item) for item in controls]
        at = event["value"].get("at") if source == "key" and isinstance(event["value"], dict) else no_update
        chosen = no_update if same else context.selection(state)
        return chosen, values, *found, state.to_url(), at, no_update if source is None or None in drawn else ""

    for function, trigger in (("acted", "acted"), ("address", "link")):
        app.clientside_callback(
            ClientsideFunction("explorer", function),
            Output("written", "data", allow_duplicate=True),
            Input(trigger, "data"),
            prevent_initial_call=True,
        )


_GESTURES = ("clickData", "selectedData")


def _every(name: str, part: str) -> dict[str, Any]:
    return {"pane": ALL, part: name}


def _draw(context: Context, before: State, state: State, drawn: Sequence[Any]) -> list[list[Any]]:
    """Return the outputs for all panes, one list per kind of output."""
    maps = [drawn_map(context, pane, state, known) for pane, known in zip(state.panes, drawn, strict=False)]
    points = [context.views(pane).selected(pane, state) for pane in state.panes]
    fresh = any(known is None for known in drawn) or [pane.mode for pane in state.panes] != [
        pane.mode for pane in before.panes
    ]
    source = ctx.triggered_id
    fresh = fresh or (isinstance(source, dict) and source.get("set") == "mode")
    strips = [
        _strip(context, pane, number, state) if fresh or before.points != state.points else no_update
        for number, pane in enumerate(state.panes)
    ]
    return [*map(list, zip(*maps, strict=True)), points, strips]


def _strip(context: Context, pane: Pane, number: int, state: State) -> list[Any]:
    """Return the strip, or why it cannot be drawn; a failure here must not stop the two views."""
    try:
        return strip(context, pane, number, state) if pane.mode == "blocks" else []
    except FAILURES as error:
        return [sentence(error)]


def _value(state: State, control: dict[str, Any]) -> Any:
    """Return a control's new value if it shows another one, after a gesture or where its own is not available."""
    its = control["id"]
    value = getattr(state.panes[min(its["pane"], len(state.panes) - 1)], its["set"])
    shown = (["on"] if value else []) if isinstance(value, bool) else value
    return no_update if shown == control.get("value") else shown
