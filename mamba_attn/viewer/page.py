"""The page: controls, the two linked views of every pane, the card of the patch under the pointer, the gallery."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dash import dcc, html

from mamba_attn.viewer.captions import fitting, point_colours
from mamba_attn.viewer.source import Source, others
from mamba_attn.viewer.state import CHOICES, Pane, State

MANY = 2000  # images in the list; a click on its point opens any other
LABELS = {
    "blocks": "blocks of this stage",
    "patches": "patches of this block",
    "row": "takes from",
    "column": "gives to",
    "mean": "average of all images",
    "image": "this image",
    "difference": "this image minus average",
    "range": "0 to 1",
    "largest": "divide by maximum",
    "sum": "divide by sum",
    "pca": "PCA",
    "tsne": "t-SNE",
    "umap": "UMAP",
}
KEYS = (
    ("← ↑ → ↓", "move the chosen patch"), ("Esc", "clear selection"), ("r", "takes from / gives to"),
    ("[ ]", "previous, next block"), ("0 1 2 …", "sum, or a route"), ("m", "average, image, difference"),
    ("v", "blocks / patches"), ("p", "path of the route"), ("?", "these keys"),
)  # fmt: skip
# not counted as changes under "Display": seen without it, or set by the mode
_ABOVE = ("store", "layer", "route", "mode", "direction", "what", "image", "colour")


def shell() -> html.Div:
    """Return the empty page that the browser gets first; the callback of the address fills it."""
    return html.Div(
        [
            dcc.Location(id="address", refresh=False), dcc.Store(id="selection", data={}), dcc.Store(id="link"),
            dcc.Store(id="key"), dcc.Store(id="written"), dcc.Store(id="acted"), dcc.Store(id="shift"),
            dcc.Store(id="gallery-of"), dcc.Store(id="picture"), dcc.Download(id="file"),
            html.Main([html.P(id="message", role="status", className="message"), html.Div(id="page")]),
        ]
    )  # fmt: skip


def page(sources: Sequence[Source], state: State) -> list[Any]:
    """Return the whole page for a state.

    Args:
        sources: of the open stores.
        state: what to show.
    """
    two = len(state.panes) == 2
    panes = [fitting(_source(sources, pane), pane) for pane in state.panes]
    named = [f"{its.store.model_name} · {len(its.images)} images" for its in (_source(sources, pane) for pane in panes)]
    return [
        html.Header(
            [
                html.H1("Attention between patches"),
                html.Span(" | ".join(dict.fromkeys(named)), className="model"),
                html.Span(className="space"),
                html.Button("one pane" if two else "side by side", id="compare", n_clicks=0),
                html.Button("all blocks", id="open-gallery", n_clicks=0),
                html.Button("keys", id="open-keys", n_clicks=0, title="?"),
            ]
        ),
        html.Dl(
            [item for key, what in KEYS for item in (html.Dt(key), html.Dd(what))], id="keys", className="keys hidden"
        ),
        html.Section(id="gallery", className="gallery hidden"),
        html.Div(
            [_pane(sources, index, pane) for index, pane in enumerate(panes)],
            className="panes two" if two else "panes one",
        ),
    ]


def _source(sources: Sequence[Source], pane: Pane) -> Source:
    return sources[min(max(pane.store, 0), len(sources) - 1)]


def _pane(sources: Sequence[Source], index: int, pane: Pane) -> html.Article:
    source = _source(sources, pane)
    views = html.Div(
        [
            _view(index, "scatter", "Points", "click, or drag a lasso"),
            _view(index, "patches", "Patches", "click, or drag a region"),
        ],
        className="views",
    )
    extra = others(source.layer(pane).layout)
    buttons = [html.Button("clear selection", id={"pane": index, "do": "clear"}, n_clicks=0)]
    if extra:
        buttons.append(html.Button("class token", id={"pane": index, "do": "class"}, n_clicks=0))
    below = html.Div(
        [html.Div(buttons, className="buttons"), html.Div(id={"pane": index, "card": "patch"}, className="card"),
         html.Div(id={"pane": index, "strip": "images"}, className="strip")],
        className="below",
    )  # fmt: skip
    drawn = [dcc.Store(id={"pane": index, "drawn": view}) for view in ("scatter", "patches")]
    drawn += [dcc.Store(id={"pane": index, part: "points"}) for part in ("lit", "shone")]
    drawn += [dcc.Store(id={"pane": index, part: "patches"}) for part in ("map", "shone")]
    built = dcc.Store(id={"pane": index, "built": "store"}, data=pane.store)
    label = f"pane {index + 1}"
    return html.Article([_controls(sources, source, index, pane), views, below, *drawn, built], **{"aria-label": label})


def _view(index: int, view: str, title: str, hint: str) -> html.Section:
    bar = html.Div(
        [
            html.H2(title, id={"pane": index, "title": view}), html.Span(hint, className="hint"),
            *(_export(index, view, kind) for kind in ("HTML", "PNG", "NPZ")),
        ],
        className="bar",
    )  # fmt: skip
    config = {
        "displaylogo": False,
        "responsive": True,
        "scrollZoom": False,
        "doubleClick": False,
        "doubleClickDelay": 1,
        # listed one by one, because some of plotly's default buttons send figures to a cloud
        "modeBarButtons": [["select2d", "lasso2d", "zoom2d", "pan2d", "resetScale2d"]],
    }
    graph = dcc.Graph(id={"pane": index, "view": view}, config=config, className=f"graph {view}", responsive=True)
    notice = html.P(id={"pane": index, "notice": view}, className="notice", role="status")
    return html.Section(
        [bar, dcc.Loading(graph, delay_show=400, type="dot", color="#0072b2"), notice], className="view"
    )


def _export(index: int, view: str, kind: str) -> html.Button:
    return html.Button(
        kind,
        id={"pane": index, "export": f"{view}-{kind}"},
        n_clicks=0,
        className="quiet",
        title=f"save the {view} view as {kind}",
    )


def _controls(sources: Sequence[Source], source: Source, index: int, pane: Pane) -> html.Div:
    layers = {
        number: f"stage {layer.stage} · block {layer.block} · {layer.layout.grid[0]} x {layer.layout.grid[1]}"
        for number, layer in enumerate(source.layers)
    }
    routes = max(layer.routes for layer in source.layers)
    images = {
        number: image.key if image.label is None else f"{image.key} · {image.label}"
        for number, image in enumerate(source.images[:MANY])
    }
    stores = _store_names(sources)
    offered = dict(enumerate((str(route + 1) for route in range(routes)), 0)) if routes > 1 else {}
    main = [
        *([_list(index, "store", "model", stores, pane.store)] if len(sources) > 1 else []),
        _list(index, "layer", "block", layers, min(pane.layer, len(layers) - 1)),
        _choice(index, "route", "route", {-1: "sum", **offered}, pane.route),
        _choice(index, "mode", "compare", _named("mode"), pane.mode),
        _choice(index, "direction", "a patch", _named("direction"), pane.direction),
        _choice(index, "what", "show", _named("what"), pane.what),
        _list(index, "image", "image", images, min(pane.image, len(source.images) - 1)),
    ]
    return html.Div([html.Div(main, className="controls"), _display(source, index, pane)])


def _store_names(sources: Sequence[Source]) -> dict[int, str]:
    """The models' names; of stores of one model, numbered or with their folders."""
    names = [source.store.model_name for source in sources]
    folders = [Path(getattr(source.store, "folder", f"{number}")).name for number, source in enumerate(sources, 1)]
    return {
        number: name if names.count(name) == 1 else f"{name} ({folder})"
        for number, (name, folder) in enumerate(zip(names, folders, strict=True))
    }


def _display(source: Source, index: int, pane: Pane) -> html.Details:
    steps = max((len(layer.orders[0]) for layer in source.layers if len(layer.orders)), default=1)
    slider = {"updatemode": "drag", "marks": None, "tooltip": {"placement": "bottom"}, "allow_direct_input": False}
    path = [
        _switches(index, {"path": "scan path"}, pane),
        _labelled(
            "show first N steps (0: all)",
            dcc.Slider(0, steps, 1, value=pane.step, id=_id(index, "step"), **slider),
            "slider",
        ),
    ]
    controls = [
        _choice(index, "sign", "values", _named("sign"), pane.sign),
        _choice(index, "normalise", "scale", _named("normalise"), pane.normalise),
        _switches(index, {"log": "log", **({"gate": "gate", "skip": "D"} if source.scans else {})}, pane),
        _choice(index, "method", "reduction", _named("method"), pane.method),
        _switches(index, {"first": "reduce to 100 dimensions first (PCA)"}, pane),
        _list(
            index, "colour", "colour of points", {each: each for each in point_colours(source, pane.mode)}, pane.colour
        ),
        _choice(index, "palette", "map", _named("palette"), pane.palette),
        _labelled("opacity", dcc.Slider(0, 1, 0.05, value=pane.opacity, id=_id(index, "opacity"), **slider), "slider"),
        *(path if source.scans else []),
    ]
    above = {name: getattr(pane, name) for name in _ABOVE}
    changed = pane != replace(Pane(), **above)
    return html.Details([html.Summary("Display"), html.Div(controls, className="controls")], open=changed)


def _id(index: int, name: str) -> dict[str, Any]:
    return {"pane": index, "set": name}


def _named(name: str) -> dict[str, str]:
    return {value: LABELS.get(value, value) for value in CHOICES[name]}


def _labelled(label: str, control: Any, kind: str = "") -> html.Div:
    return html.Div([html.Span(label, className="label"), control], className=f"control {kind}", role="group")


def _list(index: int, name: str, label: str, options: Mapping[Any, str], value: Any) -> html.Div:
    items = [{"label": text, "value": key} for key, text in options.items()]
    return _labelled(label, dcc.Dropdown(items, value, id=_id(index, name), clearable=False, maxHeight=320), "list")


def _choice(index: int, name: str, label: str, options: Mapping[Any, str], value: Any) -> html.Div:
    items = [{"label": text, "value": key} for key, text in options.items()]
    value = value if value in options else next(iter(options))
    return _labelled(label, dcc.RadioItems(items, value, id=_id(index, name), className="segments", inline=True))


def _switches(index: int, names: Mapping[str, str], pane: Pane) -> html.Div:
    boxes = [
        dcc.Checklist([{"label": text, "value": "on"}], ["on"] if getattr(pane, name) else [], id=_id(index, name))
        for name, text in names.items()
    ]
    return html.Div(boxes, className="control switches", role="group")
