"""Callbacks that draw: the two views of a pane, what they light up, the card, the gallery, the address."""

from dataclasses import asdict
from typing import Any

import dash
from dash import ALL, MATCH, ClientsideFunction, Input, Output, Patch, ctx, html, no_update

from mamba_attn.explorer.card import card, thumbnail
from mamba_attn.explorer.context import Context
from mamba_attn.explorer.gestures import clicked, numbers
from mamba_attn.explorer.source import UnavailableError
from mamba_attn.explorer.state import Pane, State
from mamba_attn.explorer.views import caption, unit
from mamba_attn.figures.embedding import highlighted
from mamba_attn.figures.patch_view import CHOSEN, HEAT

_STRIP = 60  # thumbnails of chosen images
_CONTROLS = {"pane": MATCH, "set": ALL}


def register(app: dash.Dash, context: Context) -> None:
    """Add these callbacks."""
    _scatter(app, context)
    _patches(app, context)
    _card(app, context)
    _strip(app, context)
    _gallery(app, context)
    _address(app, context)


def _of(name: str, part: str = "view") -> dict[str, Any]:
    return {"pane": MATCH, part: name}


def _scatter(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output(_of("scatter"), "figure"),
        Output(_of("scatter", "title"), "children"),
        Output(_of("scatter", "notice"), "children"),
        Output(_of("scatter", "drawn"), "data"),
        Input(_CONTROLS, "value"),
        Input("selection", "data"),
        dash.State(_of("scatter", "drawn"), "data"),
    )
    def _draw(_: Any, selection: Any, drawn: Any) -> Any:
        pane = context.pane(ctx.inputs_list[0])
        views, state = context.views(pane), context.state([pane], selection)
        layer = views.source.layer(pane)
        # what the points depend on; a change of anything else leaves them where they are
        key = [pane.store, pane.mode, layer.stage if pane.mode == "blocks" else layer.name, pane.method, pane.colour]
        key += [] if pane.mode == "blocks" else [views.source.route(pane), pane.direction]
        try:
            if key == drawn:
                chosen = views.selected(pane, state)
                one = pane.mode == "patches"  # all patches are points of one trace, in their order
                marked = [chosen or None] if one else highlighted(views.scatter(pane, State()), chosen)
                patch = Patch()
                for index, points in enumerate(marked):
                    patch["data"][index]["selectedpoints"] = points
                patch["layout"]["selections"] = []
                return patch, no_update, no_update, no_update
            figure = views.scatter(pane, state)
        except (ImportError, ValueError) as error:
            return {}, "Points", str(error), None
        about = views.points(pane).about
        figure.update_layout(height=None, uirevision=str(key))
        return figure, about, "", key


def _patches(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output(_of("patches"), "figure"),
        Output(_of("patches", "title"), "children"),
        Output(_of("patches", "notice"), "children"),
        Output(_of("patches", "drawn"), "data"),
        Input(_CONTROLS, "value"),
        Input("selection", "data"),
        dash.State(_of("patches", "drawn"), "data"),
    )
    def _draw(_: Any, selection: Any, drawn: Any) -> Any:
        pane = context.pane(ctx.inputs_list[0])
        views, state = context.views(pane), context.state([pane], selection)
        key = list(asdict(pane).values())  # while it stays, the image and the path stay
        try:
            figure = views.patches(pane, state, photo=key != drawn)
        except UnavailableError as error:
            return no_update, no_update, str(error), no_update
        words = caption(views.source, pane, state)
        return (_changes(figure) if key == drawn else figure.update_layout(height=None)), words, "", key


def _changes(figure: Any) -> Patch:
    """What another selection changes of a patch view that is drawn already."""
    patch = Patch()
    heat, *frames = (trace for trace in figure.data if trace.name in (HEAT, CHOSEN))
    for name in ("z", "zmin", "zmax", "colorscale"):
        patch["data"][1][name] = getattr(heat, name)  # behind the image
    for index, frame in enumerate(frames, 2):
        patch["data"][index]["x"], patch["data"][index]["y"] = frame.x, frame.y
    patch["layout"]["selections"] = []
    return patch


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
        try:
            return _words(card(views, pane, cells[0]), pane) if cells else []
        except UnavailableError as error:
            return str(error)


def _words(found: Any, pane: Pane) -> list[Any]:
    ranks = ", ".join("-" if rank is None else str(rank) for rank in found.ranks)
    strongest = ", ".join(f"({row}, {column}) {value:.2g}" for row, column, value in found.strongest)
    verb = "reads most" if pane.direction == "row" else "most read by"
    items = [
        ("patch", f"row {found.row}, column {found.column}"),
        *([("step in each route", f"{ranks} of {found.steps}")] if ranks else []),
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


def _strip(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output(_of("images", "strip"), "children"), Input("selection", "data"), dash.State(_CONTROLS, "value")
    )  # fmt: skip
    def _show(selection: Any, _: Any) -> list[Any]:
        pane = context.pane(ctx.states_list[0])
        source = context.views(pane).source
        counts: dict[int, int] = {}
        for _layer, image in context.state([pane], selection).points:
            if 0 <= image < len(source.images):
                counts[image] = counts.get(image, 0) + 1
        return [
            html.Button(
                [html.Img(src=_small(context, pane, image), alt=source.images[image].key), f"{count} of its points"],
                id={"pane": ctx.states_list[0][0]["id"]["pane"], "pick": image}, n_clicks=0,
                title=f"{source.images[image].key}, {source.images[image].label}",
            )
            for image, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_STRIP]
        ]  # fmt: skip


def _gallery(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output("gallery", "children"),
        Output("gallery", "className"),
        Input("open-gallery", "n_clicks"),
        Input("selection", "data"),
        Input({"pane": 0, "set": ALL}, "value"),
    )
    def _show(clicks: int | None, selection: Any, _: Any) -> Any:
        if not (clicks or 0) % 2:
            return no_update, "gallery hidden"
        pane = context.pane(ctx.inputs_list[2])
        views, state = context.views(pane), context.state([pane], selection)
        try:
            maps = views.gallery(pane, state)
        except UnavailableError as error:
            return str(error), "gallery"
        current = min(pane.layer, len(maps) - 1)
        return [
            html.Button(
                [html.Img(src=thumbnail(values, pane), alt=""), f"stage {layer.stage} · block {layer.block}"],
                id={"block": index}, n_clicks=0, className="current" if index == current else "",
            )
            for index, (values, layer) in enumerate(zip(maps, views.source.layers, strict=True))
        ], "gallery"  # fmt: skip


def _address(app: dash.Dash, context: Context) -> None:
    @app.callback(
        Output("link", "data"), Input({"pane": ALL, "set": ALL}, "value"), Input("selection", "data")
    )  # fmt: skip
    def _link(_: Any, selection: Any) -> Any:
        if not ctx.inputs_list[0]:
            return no_update
        return context.state(context.panes(ctx.inputs_list[0]), selection).to_url()

    app.clientside_callback(
        ClientsideFunction("explorer", "address"), Output("written", "data"), Input("link", "data"),
        prevent_initial_call=True,
    )  # fmt: skip
