"""Callbacks that change what is chosen or shown: clicks, boxes, lassos, keys, the gallery, a second pane."""

from dataclasses import replace
from typing import Any

import dash
from dash import ALL, ClientsideFunction, Input, Output, ctx, no_update
from dash.exceptions import PreventUpdate

from mamba_attn.explorer.context import Context
from mamba_attn.explorer.gestures import clicked, dragged, moved, numbers
from mamba_attn.explorer.page import page
from mamba_attn.explorer.state import CHOICES, State

_CONTROLS = {"pane": ALL, "set": ALL}
_KEYS = 32  # of one message


def register(app: dash.Dash, context: Context) -> None:
    """Add these callbacks."""
    _choose(app, context)
    _panes(app, context)
    _keys(app)


def _view(name: str) -> dict[str, Any]:
    return {"pane": ALL, "view": name}


def _choose(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output("selection", "data", allow_duplicate=True),
        Output(_CONTROLS, "value"),
        Output("acted", "data"),
        Input(_view("patches"), "clickData"),
        Input(_view("patches"), "selectedData"),
        Input(_view("scatter"), "clickData"),
        Input(_view("scatter"), "selectedData"),
        Input({"pane": ALL, "do": ALL}, "n_clicks"),
        Input({"pane": ALL, "pick": ALL}, "n_clicks"),
        Input({"block": ALL}, "n_clicks"),
        Input("key", "data"),
        dash.State("selection", "data"),
        dash.State(_CONTROLS, "value"),
        prevent_initial_call=True,
    )
    def _act(*given: Any) -> Any:
        if not ctx.triggered or not ctx.triggered[0]["value"]:
            raise PreventUpdate  # a button that just appeared, or a selection that plotly dropped
        controls = ctx.states_list[1]
        state = context.state(context.panes(controls), given[-2])
        changed = _after(context, state, ctx.triggered_id, ctx.triggered[0])
        same = changed.cells == state.cells and changed.points == state.points
        values = [_value(state, changed, item["id"]) for item in controls]
        at = ctx.triggered[0]["value"].get("at") if ctx.triggered_id == "key" else no_update
        return no_update if same else context.selection(changed), values, at

    app.clientside_callback(
        ClientsideFunction("explorer", "acted"), Output("written", "data", allow_duplicate=True),
        Input("acted", "data"),
        prevent_initial_call=True,
    )  # fmt: skip


def _after(context: Context, state: State, source: Any, event: dict[str, Any]) -> State:
    """The state after a gesture, the same where it means nothing."""
    value = event["value"]
    if source == "key":
        for key in _keys_of(value):
            state = _pressed(context, state, key)
        return state
    if "block" in source:
        return state.with_pane(0, layer=source["block"])
    index = min(int(source["pane"]), len(state.panes) - 1)
    pane = state.panes[index]
    views = context.views(pane)
    grid = tuple(views.source.layer(pane).layout.grid)
    if "pick" in source:
        return state.with_pane(index, image=source["pick"], what="image")
    if "do" in source:
        return replace(state, grid=grid, cells=(-1,) if source["do"] == "class" else (), points=())
    drag = event["prop_id"].endswith("selectedData")
    if source["view"] == "patches":
        cells = dragged(value, grid) if drag else clicked(value, grid)
        return replace(state, grid=grid, cells=tuple(cells)) if cells else state
    points = views.points(pane)
    found = numbers(value, len(points.xy))
    if points.pairs is None:
        return replace(state, grid=grid, cells=tuple(found)) if found else state
    pairs = tuple((int(layer), int(image)) for layer, image in points.pairs[found])
    if drag or not pairs:
        return replace(state, points=pairs) if pairs else state
    return replace(state, points=pairs).with_pane(index, layer=pairs[0][0], image=pairs[0][1], what="image")


def _keys_of(value: Any) -> list[str]:
    keys = value.get("keys") if isinstance(value, dict) else None
    return [key for key in keys[:_KEYS] if isinstance(key, str)] if isinstance(keys, list) else []


def _pressed(context: Context, state: State, key: str) -> State:
    pane = state.panes[0]
    source = context.views(pane).source
    grid = tuple(source.layer(pane).layout.grid)
    if key.startswith("Arrow") and key[5:] in ("Up", "Down", "Left", "Right"):
        return replace(state, cells=tuple(moved(state, key, grid)), grid=grid)
    if key == "Escape":
        return replace(state, cells=(), points=())
    if key in ("[", "]"):
        layer = min(pane.layer, len(source.layers) - 1) + (1 if key == "]" else -1)
        return state.with_pane(0, layer=min(max(layer, 0), len(source.layers) - 1))
    if key.isdecimal() and len(key) == 1:
        route = int(key) - 1
        return state.with_pane(0, route=route) if route < source.layer(pane).routes else state
    cycled = {"r": "direction", "m": "what", "v": "mode"}.get(key)
    if cycled:
        values = CHOICES[cycled]
        return state.with_pane(0, **{cycled: values[(values.index(getattr(pane, cycled)) + 1) % len(values)]})
    return state.with_pane(0, path=not pane.path) if key == "p" else state


def _value(before: State, after: State, its: dict[str, Any]) -> Any:
    """The new value of a control, if it has one."""
    index = min(its["pane"], len(after.panes) - 1)
    old, new = getattr(before.panes[index], its["set"]), getattr(after.panes[index], its["set"])
    if old == new:
        return no_update
    return (["on"] if new else []) if isinstance(new, bool) else new


def _panes(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output("page", "children", allow_duplicate=True),
        Input("compare", "n_clicks"),
        Input({"pane": ALL, "set": "store"}, "value"),
        dash.State(_CONTROLS, "value"),
        dash.State("selection", "data"),
        dash.State({"pane": ALL, "built": "store"}, "data"),
        prevent_initial_call=True,
    )
    def _change(clicks: int | None, _: Any, __: Any, selection: Any, built: list[Any]) -> Any:
        controls = ctx.states_list[0]
        if not controls:
            raise PreventUpdate
        state = context.state(context.panes(controls), selection)
        if ctx.triggered_id == "compare":
            if not clicks:
                raise PreventUpdate
            first = state.panes[0]
            state = replace(state, panes=(first,) if len(state.panes) == 2 else (first, first))
        elif built == [pane.store for pane in state.panes]:
            raise PreventUpdate  # the controls of a new page report themselves too
        return page(context.sources, state)


def _keys(app: dash.Dash) -> None:
    @app.callback(
        Output("keys", "className"), Input("open-keys", "n_clicks"), Input("key", "data"),
        dash.State("keys", "className"), prevent_initial_call=True,
    )  # fmt: skip
    def _toggle(_: Any, key: Any, now: str) -> str:
        pressed = ctx.triggered_id == "open-keys" or "?" in _keys_of(key)
        if not pressed or not ctx.triggered[0]["value"]:
            raise PreventUpdate
        return "keys" if "hidden" in now else "keys hidden"
