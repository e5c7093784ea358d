"""Callbacks of what surrounds the two views: the card of what is under the pointer, the strip and the gallery."""

from typing import Any

import dash
from dash import ALL, MATCH, ClientsideFunction, Input, Output, ctx, html, no_update

from mamba_attn.viewer.captions import heading, unit, visits
from mamba_attn.viewer.context import Context
from mamba_attn.viewer.errors import FAILURES, sentence
from mamba_attn.viewer.gestures import clicked, numbers
from mamba_attn.viewer.state import Pane, State
from mamba_attn.viewer.views import card, thumbnail

_STRIP = 60  # thumbnails of selected images
_CONTROLS = {"pane": MATCH, "set": ALL}


def register(app: dash.Dash, context: Context) -> None:
    """Register the callbacks of the cards and of the gallery."""
    _card(app, context)
    _gallery(app, context)


def _of(name: str, part: str = "view") -> dict[str, Any]:
    return {"pane": MATCH, part: name}


def _card(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output(_of("patch", "card"), "children"),
        Input(_of("patches"), "hoverData"),
        Input(_of("scatter"), "hoverData"),
        dash.State(_CONTROLS, "value"),
        prevent_initial_call=True,
    )
    def _show(over_patches: Any, over_points: Any, _: Any) -> Any:
        pane = context.pane(ctx.states_list[0])
        views = context.views(pane)
        source = views.source
        grid = source.layer(pane).layout.grid
        if ctx.triggered_id["view"] == "patches":
            cells = clicked(over_patches, grid)
        elif pane.mode == "patches":
            cells = numbers(over_points, grid[0] * grid[1])
        else:
            pairs = views.points(pane).pairs
            found = numbers(over_points, 0 if pairs is None else len(pairs))
            return [] if pairs is None or not found else _image(context, pane, *pairs[found[0]].tolist())
        return _words(card(views, pane, cells[0]), pane) if cells else []


def _words(found: Any, pane: Pane) -> list[Any]:
    strongest = ", ".join(f"({row}, {column}) {value:.2g}" for row, column, value in found.strongest)
    verb = "strongest sources" if pane.direction == "row" else "strongest readers"
    items = [
        ("patch", f"row {found.row}, column {found.column}"),
        *([("visited", visits(found.ranks, found.steps))] if found.ranks else []),
        (verb, strongest),
        ("values", unit(pane)),
    ]
    what = f"map of patch ({found.row}, {found.column})"
    listed = [part for name, text in items for part in (html.Dt(name), html.Dd(text))]
    return [html.Img(src=found.picture, alt=what), html.Dl(listed)]


def _image(context: Context, pane: Pane, layer: int, image: int) -> list[Any]:
    source = context.views(pane).source
    its, shown = source.layers[layer], source.images[image]
    label = "not known" if shown.label is None else str(shown.label)
    items = [("block", f"stage {its.stage}, block {its.block}"), ("image", shown.key), ("class", label),
             ("predicted", str(shown.predicted))]  # fmt: skip
    listed = [part for name, text in items for part in (html.Dt(name), html.Dd(text))]
    return [html.Img(src=_small(context, pane, image), alt=shown.key), html.Dl(listed)]


def _small(context: Context, pane: Pane, image: int) -> str:
    from mamba_attn.figures.picture import data_uri

    pixels = context.views(pane).source.pixels(Pane(image=image))
    every = max(1, max(pixels.shape[:2]) // 112)
    return data_uri(pixels[::every, ::every].copy())


def strip(context: Context, pane: Pane, number: int, state: State) -> list[Any]:
    """Return the images of the selected points, as buttons.

    Args:
        context: the open stores.
        pane: the pane whose store is meant.
        number: of the pane.
        state: with the selected points.
    """
    source = context.views(pane).source
    counts: dict[int, int] = {}
    for _layer, image in state.points:
        if 0 <= image < len(source.images):
            counts[image] = counts.get(image, 0) + 1
    return [
        html.Button(
            [
                html.Img(src=_small(context, pane, image), alt=source.images[image].key),
                f"{count} point{'s' if count > 1 else ''}",
            ],
            id={"pane": number, "pick": image},
            n_clicks=0,
            title=f"{source.images[image].key}, {source.images[image].label}",
        )
        for image, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_STRIP]
    ]


def _gallery(app: dash.Dash, context: Context) -> None:
    app.clientside_callback(
        ClientsideFunction("explorer", "gallery"),
        Output("gallery-of", "data"),
        Output("gallery", "className"),
        Input("open-gallery", "n_clicks"),
        Input("link", "data"),
    )

    @app.callback(
        Output("gallery", "children"),
        Input("gallery-of", "data"),
        dash.State("selection", "data"),
        dash.State({"pane": 0, "set": ALL}, "value"),
        prevent_initial_call=True,
    )
    def _show(_: Any, selection: Any, __: Any) -> Any:
        if not ctx.states_list[1]:
            return no_update
        pane = context.pane(ctx.states_list[1])
        views, state = context.views(pane), context.state([pane], selection)
        try:
            maps = views.gallery(pane, state)
        except FAILURES as error:
            return sentence(error)
        current = min(pane.layer, len(maps) - 1)
        saving = [
            html.Button(
                kind,
                id={"pane": 0, "export": f"gallery-{kind}"},
                n_clicks=0,
                className="quiet",
                title=f"save the gallery as {kind}",
            )
            for kind in ("HTML", "PNG", "NPZ")
        ]
        blocks = [
            html.Button(
                [html.Img(src=thumbnail(values, pane), alt=""), f"stage {layer.stage} · block {layer.block}"],
                id={"block": index},
                n_clicks=0,
                className="current" if index == current else "",
            )
            for index, (values, layer) in enumerate(zip(maps, views.source.layers, strict=True))
        ]
        title = html.H2(f"All blocks: {heading(views.source, pane, state)}")
        return [html.Div([title, html.Span(className="space"), *saving], className="bar"), *blocks]
