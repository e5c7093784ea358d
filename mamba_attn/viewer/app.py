"""Builds the Dash app and registers its callbacks."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import dash
from dash import Input, Output

from mamba_attn.viewer import acting, drawing, export, interaction, surroundings
from mamba_attn.viewer.context import Context
from mamba_attn.viewer.errors import on_error, sentence
from mamba_attn.viewer.guard import guard
from mamba_attn.viewer.page import page, shell
from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import State


def build(stores: Sequence[Any], *, host: str = "127.0.0.1") -> dash.Dash:
    """Return the app that shows some stores.

    Args:
        stores: ``AttentionStore`` objects, at least one.
        host: address it will be bound to. On a loopback address, requests for any other name are refused: otherwise a
            web page could reach it through a name of its own (DNS rebinding).

    Raises:
        ValueError: no store, or one without images.
    """
    sources = [Source(store) for store in stores]
    if not sources or not all(source.images and source.layers for source in sources):
        raise ValueError("explore: the store has no images to show; collect some with mamba-attn collect.")
    app = dash.Dash(
        __name__,
        title="Attention between patches",
        update_title="",
        serve_locally=True,
        assets_folder="assets",
        suppress_callback_exceptions=True,
        compress=False,
        on_error=on_error,
    )
    app.layout = shell()
    context = Context(sources)
    drawing.register(app, context)
    acting.register(app, context)
    surroundings.register(app, context)
    interaction.register(app, context)
    export.register(app, context)

    @app.callback(
        Output("page", "children"),
        Output("selection", "data"),
        Output("message", "children"),
        Input("address", "search"),
    )
    def _open(search: str | None) -> tuple[list[Any], dict[str, Any], str]:
        state, message = State(), ""
        try:
            given = parse_qs((search or "")[1:], max_num_fields=4).get("state", [""])[0]
            state = State.from_url(given) if given else state
        except ValueError as error:
            message = f"{sentence(error)} Showing the default view."
        return page(sources, state), context.selection(state), message

    guard(app, host)
    return app
