"""The points of a store as a widget for notebooks, drawn by the graphics card: for more than the page can show."""

from typing import Any

import numpy as np

from mamba_attn.core.requirements import require_extras
from mamba_attn.figures import colours
from mamba_attn.viewer.state import Pane

_AXES = ("column", "row", "slice")  # of a grid, last axis first; a text has columns


def scatter(
    store: Any,
    layer: int = -1,
    *,
    mode: str = "patches",
    route: int = -1,
    direction: str = "row",
    method: str = "pca",
    colour: str | None = None,
    **options: Any,
) -> Any:
    """Return the points of a layer as a ``jscatter.Scatter``, which holds millions; their layout is kept in the store.

    Args:
        store: an ``AttentionStore``, or what else the page shows.
        layer: its number; from the last if negative.
        mode: "patches", one point for each of the layer's patches, whose ``selection()`` holds numbers of tokens; or
            "blocks", one for every (block, image) of the layer's stage, whose ``selection()`` holds such pairs.
        route: number of a scan; default: their sum.
        direction: "row", patches are alike that take from the same places; "column", those that give to the same.
        method: of dimension reduction: "pca", "tsne", "umap".
        colour: "column", "row" (and "slice" of a volume), or "class", "predicted", "block". Default: the column of
            patches, the class of images.
        **options: of ``jscatter.Scatter``, e.g. ``height=600``.

    Raises:
        ImportError: jupyter-scatter is not installed.
        ValueError: no such layer, mode, direction, method or colour, or too few points.

    Example:
        >>> scatter(AttentionStore.open("store"), mode="blocks").show()  # doctest: +SKIP
    """
    require_extras({"jscatter": "jupyter-scatter"}, "scatter")
    import jscatter
    import pandas

    from mamba_attn.viewer.points import Scatter
    from mamba_attn.viewer.source import Source, patches_of

    source = Source(store)
    count = len(source.layers)
    if not -count <= layer < count:
        raise ValueError(f"layer={layer}: there are {count}, numbered from 0.")
    asked = {"layer": layer % count, "mode": mode, "route": route, "direction": direction, "method": method}
    pane, points = Pane.parsed(asked), Scatter(source)
    pairs = points.pairs(pane)
    if pairs is None:
        layout = source.layer(pane).layout
        index = pandas.Index(patches_of(layout), name="token")
        of_token = {token: place for place, token in enumerate(layout.patches.ravel().tolist())}
        places = np.unravel_index([of_token[token] for token in index], layout.grid)
        columns: dict[str, Any] = dict(zip(_AXES, places[::-1], strict=False))
    else:
        blocks = [source.layers[number].block for number, _ in pairs]
        index = pandas.MultiIndex.from_arrays([blocks, pairs[:, 1]], names=["block", "image"])
        its = [source.images[image] for image in pairs[:, 1]]
        kinds = {"class": [i.label for i in its], "predicted": [i.predicted for i in its], "block": blocks}
        columns = {name: pandas.Categorical([_named(one) for one in each]) for name, each in kinds.items()}
        columns["name"] = [image.key for image in its]
    by = colour or ("column" if pairs is None else "class")
    offered = [name for name in columns if name != "name"]
    if by not in offered:
        raise ValueError(f"colour={colour!r}: expected one of {offered}.")
    table = pandas.DataFrame(columns, index=index)
    table["x"], table["y"] = points.points(pane).T
    palette = _palette(None if pairs is None else len(table[by].cat.categories))
    usual = {"color_by": by, "color_map": palette, "tooltip": True, "tooltip_properties": list(columns), "legend": True}
    # selection() holds the index
    return jscatter.Scatter("x", "y", data=table, data_use_index=True, **{**usual, **options})


def _named(kind: str | int | None) -> str:
    return "not known" if kind is None else str(kind)


def _palette(kinds: int | None) -> list[Any]:
    """Cividis for numbers; as many colours as there are kinds."""
    if kinds is None:
        return list(colours.CIVIDIS)
    if kinds <= len(colours.CATEGORIES):
        return list(colours.CATEGORIES[:kinds])
    steps = colours.to_rgb(np.arange(kinds, dtype=np.float64), colours.Scale(0, kinds - 1, colours.VIRIDIS))
    return [tuple(each) for each in (steps / 255).tolist()]
