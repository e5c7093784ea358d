"""Computes the state after a click, box, lasso or key, and opens or closes the second pane."""

from dataclasses import replace
from typing import Any

import dash
from dash import ALL, Input, Output, ctx
from dash.exceptions import PreventUpdate

from mamba_attn.viewer.context import Context
from mamba_attn.viewer.gestures import clicked, dragged, enclosed, moved, numbers
from mamba_attn.viewer.page import page
from mamba_attn.viewer.state import CHOICES, State
from mamba_attn.viewer.views import Views

_CONTROLS = {"pane": ALL, "set": ALL}
_KEYS = 32  # of one message


def register(app: dash.Dash, context: Context) -> None:
    """Register the callbacks of the whole page: number of panes, list of keys."""
    _panes(app, context)
    _keys(app)


def after(context: Context, state: State, source: Any, event: dict[str, Any], *, add: bool = False) -> State:
    """Return the state after a gesture; unchanged if the gesture means nothing.

    Args:
        context: of the stores.
        state: before the gesture.
        source: id of the element it happened to.
        event: dash's, with "value" and "prop_id".
        add: add to the selection instead of replacing it; a click on something selected removes it.
    """
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
        return _cells(state, grid, dragged(value, grid) if drag else clicked(value, grid), add, drag)
    points = views.points(pane)
    found = enclosed(value, points.xy) if drag else numbers(value, len(points.xy))
    if points.pairs is None:
        return _cells(state, grid, found, add, drag)
    if not found:
        return state
    pairs = [(int(layer), int(image)) for layer, image in points.pairs[found]]
    chosen = _joined(list(state.points), pairs, drag) if add else pairs
    return _opened(replace(state, points=tuple(chosen)), views, index, clicked=not add and not drag)


def _cells(state: State, grid: tuple[int, int], cells: list[int], add: bool, drag: bool) -> State:
    if not cells:
        return state
    if add:
        cells = _joined([*state.on_grid(grid), *(cell for cell in state.cells if cell < 0)], cells, drag)
    return replace(state, grid=grid, cells=tuple(cells))


def _opened(state: State, views: Views, index: int, clicked: bool) -> State:
    """Open the clicked point in the patch view, else the first selected one, unless it already shows one of them."""
    pane = state.panes[index]
    if not state.points or (not clicked and pane.what != "mean" and views.open_points(pane)[0] in state.points):
        return state
    layer, image = state.points[0]
    return state.with_pane(index, layer=layer, image=image, what="image")


def _joined(before: list[Any], new: list[Any], drag: bool) -> list[Any]:
    """Join both in the order of selection; a click on something selected removes it."""
    if not drag and new[0] in before:
        return [each for each in before if each != new[0]]
    return list(dict.fromkeys([*before, *new]))


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
            raise PreventUpdate  # the controls of a newly built page trigger this too
        return page(context.sources, state)


def _keys(app: dash.Dash) -> None:
    @app.callback(
        Output("keys", "className"),
        Input("open-keys", "n_clicks"),
        Input("key", "data"),
        dash.State("keys", "className"),
        prevent_initial_call=True,
    )
    def _toggle(_: Any, key: Any, now: str) -> str:
        pressed = ctx.triggered_id == "open-keys" or "?" in _keys_of(key)
        if not pressed or not ctx.triggered[0]["value"]:
            raise PreventUpdate
        return "keys" if "hidden" in now else "keys hidden"
