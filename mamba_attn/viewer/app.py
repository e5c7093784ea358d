"""The Dash application: assembled here, with what it may serve and what it parses."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import dash
from dash import Input, Output

from mamba_attn.viewer import acting, beside, drawing, export, interaction
from mamba_attn.viewer.context import Context
from mamba_attn.viewer.guard import guard
from mamba_attn.viewer.page import page, shell
from mamba_attn.viewer.saying import on_error, said
from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import State


def build(stores: Sequence[Any], *, host: str = "127.0.0.1") -> dash.Dash:
    """Return the application of some stores.

    Args:
        stores: ``AttentionStore`` objects, at least one.
        host: that it will be bound to; on a loopback address, requests for other names are refused, so that no web page
            can reach it through a name of its own.

    Raises:
        ValueError: no store, or one without images.
    """
    sources = [Source(store) for store in stores]
    if not sources or not all(source.images and source.layers for source in sources):
        raise ValueError("explore: a store without images has nothing to show; collect one with mamba-attn collect.")
    app = dash.Dash(
        __name__, title="Attention between patches", update_title="", serve_locally=True, assets_folder="assets",
        suppress_callback_exceptions=True, compress=False, on_error=on_error,
    )  # fmt: skip
    app.layout = shell()
    context = Context(sources)
    drawing.register(app, context)
    acting.register(app, context)
    beside.register(app, context)
    interaction.register(app, context)
    export.register(app, context)

    @app.callback(
        Output("page", "children"), Output("selection", "data"), Output("message", "children"),
        Input("address", "search"),
    )  # fmt: skip
    def _open(search: str | None) -> tuple[list[Any], dict[str, Any], str]:
        state, message = State(), ""
        try:
            given = parse_qs((search or "")[1:], max_num_fields=4).get("state", [""])[0]
            state = State.from_url(given) if given else state
        except ValueError as error:
            message = f"{said(error)} The default view is shown."
        return page(sources, state), context.selection(state), message

    guard(app, host)
    return app
