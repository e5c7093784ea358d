"""Saving a view: a self-contained page, a picture (drawn by the browser), the numbers."""

import io
from typing import Any

import dash
import numpy as np
from dash import ALL, ClientsideFunction, Input, Output, ctx, dcc
from dash.exceptions import PreventUpdate

from mamba_attn.explorer.context import Context
from mamba_attn.explorer.source import UnavailableError
from mamba_attn.explorer.state import Pane, State
from mamba_attn.explorer.views import Views, caption

_CONFIG = {"displaylogo": False, "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]]}
_BUTTONS = {"pane": ALL, "export": ALL}


def register(app: dash.Dash, context: Context) -> None:
    """Add these callbacks."""

    @app.callback(
        Output("file", "data"),
        Input(_BUTTONS, "n_clicks"),
        dash.State({"pane": ALL, "set": ALL}, "value"),
        dash.State("selection", "data"),
        prevent_initial_call=True,
    )
    def _save(_: Any, __: Any, selection: Any) -> Any:
        if not ctx.triggered or not ctx.triggered[0]["value"]:
            raise PreventUpdate
        view, _, kind = ctx.triggered_id["export"].partition("-")
        panes = context.panes(ctx.states_list[0])
        pane = panes[min(ctx.triggered_id["pane"], len(panes) - 1)]
        state, views = context.state([pane], selection), context.views(pane)
        try:
            if kind == "HTML":
                return {"content": as_html(views, pane, state, view), "filename": f"mamba_attn_{view}.html"}
            if kind == "NPZ":
                return dcc.send_bytes(as_npz(views, pane, state, view), f"mamba_attn_{view}.npz")
        except UnavailableError:
            pass  # the view says why; there is nothing to save
        raise PreventUpdate

    app.clientside_callback(
        ClientsideFunction("explorer", "picture"), Output("written", "data", allow_duplicate=True),
        Input(_BUTTONS, "n_clicks"), prevent_initial_call=True,
    )  # fmt: skip


def as_html(views: Views, pane: Pane, state: State, view: str) -> str:
    """Return a view as one page that needs no network.

    Args:
        views: of the store.
        pane: which attention.
        state: the selection.
        view: "scatter" or "patches".
    """
    figure = getattr(views, view)(pane, state, 640)
    figure.update_layout(title={"text": _title(views, pane, state, view), "font": {"size": 14}}, margin={"t": 44})
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config=_CONFIG))


def as_npz(views: Views, pane: Pane, state: State, view: str) -> bytes:
    """Return a view's numbers as the bytes of an NPZ file; arguments as in ``as_html``."""
    layer = views.source.layer(pane)
    arrays: dict[str, Any] = {
        "title": np.array(_title(views, pane, state, view)), "state": np.array(state.to_url()),
        "grid": np.array(layer.layout.grid), "selected": np.array(views.selected(pane, state), dtype=np.int64),
    }  # fmt: skip
    if view == "scatter":
        points = views.points(pane)
        arrays["points"] = points.xy
        if points.pairs is not None:
            arrays["layer_and_image"] = points.pairs
    else:
        arrays |= {"map": views.heat(pane, state), "image": views.source.pixels(pane)}
        arrays["patches"] = np.array(state.on_grid(tuple(layer.layout.grid)), dtype=np.int64)
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _title(views: Views, pane: Pane, state: State, view: str) -> str:
    source, layer = views.source, views.source.layer(pane)
    of = source.image(pane).key if pane.what == "image" else f"{pane.what} of {len(source.images)} images"
    what = caption(source, pane, state) if view == "patches" else views.points(pane).about
    route = source.route(pane)
    named = "all routes" if route == "sum" else f"route {int(route) + 1}"
    return f"{source.store.model_name}, stage {layer.stage}, block {layer.block}, {named}: {what} ({of})"
