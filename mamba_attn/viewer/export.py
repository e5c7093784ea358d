"""Saves a view as a self-contained page, as a picture (drawn by the browser), or as numbers."""

import io
import textwrap
from typing import Any

import dash
import numpy as np
import plotly.graph_objects as go
from dash import ALL, ClientsideFunction, Input, Output, ctx, dcc, no_update
from dash.exceptions import PreventUpdate

from mamba_attn import figures
from mamba_attn.figures.colours import BLUE_ORANGE
from mamba_attn.viewer.captions import caption, of, palette, signed
from mamba_attn.viewer.context import Context
from mamba_attn.viewer.state import Pane, State
from mamba_attn.viewer.views import Views

_CONFIG = {"displaylogo": False, "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]]}
_BUTTONS = {"pane": ALL, "export": ALL}


def register(app: dash.Dash, context: Context) -> None:
    """Register the callbacks of the HTML, PNG and NPZ buttons."""

    @app.callback(
        Output("file", "data"),
        Output("picture", "data"),
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
        name = f"mamba_attn_{view}"
        # UnavailableError, if there is nothing to save, ends up on the page: see saying
        if kind == "HTML":
            return {"content": as_html(views, pane, state, view), "filename": f"{name}.html"}, no_update
        if kind == "NPZ":
            return dcc.send_bytes(as_npz(views, pane, state, view), f"{name}.npz"), no_update
        figure = as_figure(views, pane, state, view)
        size = {"width": figure.layout.width or 720, "height": figure.layout.height}
        return no_update, {"figure": figure, "filename": name, "format": "png", "scale": 2, **size}

    app.clientside_callback(
        ClientsideFunction("explorer", "picture"),
        Output("written", "data", allow_duplicate=True),
        Input("picture", "data"),
        prevent_initial_call=True,
    )


def as_figure(views: Views, pane: Pane, state: State, view: str) -> go.Figure:
    """Return a view as a figure with a title.

    Args:
        views: of the store.
        pane: which attention.
        state: the selection.
        view: "scatter", "patches" or "gallery".

    Raises:
        UnavailableError: gate or D are asked for and the layer lacks them.
    """
    if view == "gallery":
        names = [f"stage {layer.stage} · block {layer.block}" for layer in views.source.layers]
        maps = views.gallery(pane, state)
        colours = BLUE_ORANGE if signed(pane) else palette(pane)
        figure = figures.layer_grid(
            views.source.pixels(pane), maps, names, opacity=pane.opacity, signed=bool(signed(pane)), colours=colours
        )
    else:
        figure = getattr(views, view)(pane, state, 640)
    title = {"text": "<br>".join(textwrap.wrap(_title(views, pane, state, view), 92)), "font": {"size": 14}}
    return figure.update_layout(title=title, margin={"t": 84})


def as_html(views: Views, pane: Pane, state: State, view: str) -> str:
    """Return a view as one offline page; arguments as in ``as_figure``."""
    figure = as_figure(views, pane, state, view)
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config=_CONFIG))


def as_npz(views: Views, pane: Pane, state: State, view: str) -> bytes:
    """Return a view's numbers as the bytes of an NPZ file; arguments as in ``as_figure``."""
    layer = views.source.layer(pane)
    arrays: dict[str, Any] = {
        "title": np.array(_title(views, pane, state, view)), "state": np.array(state.to_url()),
        "grid": np.array(layer.layout.grid), "selected": np.array(views.selected(pane, state), dtype=np.int64),
    }  # fmt: skip
    if view == "gallery":
        arrays |= dict(zip([each.name for each in views.source.layers], views.gallery(pane, state), strict=True))
    elif view == "scatter":
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
    what = views.points(pane).about if view == "scatter" else caption(source, pane, state)
    route = source.route(pane)
    named = "all routes" if route == "sum" else f"route {int(route) + 1}"
    if view == "gallery":
        return f"{source.store.model_name}, all blocks, {named}: {what} ({of(source, pane)})"
    return f"{source.store.model_name}, stage {layer.stage}, block {layer.block}, {named}: {what} ({of(source, pane)})"
