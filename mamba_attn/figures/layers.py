"""The maps of many layers, each over the same image."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from mamba_attn.figures.colours import as_image, as_values
from mamba_attn.figures.panels import add_heat, panels
from mamba_attn.figures.picture import data_uri, patch_size, photo


def layer_grid(
    image: Any,
    maps: Sequence[Any],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    shared: bool = False,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 180,
) -> go.Figure:
    """Show a map per layer over the image that all explain, in reading order.

    Args:
        image: (rows, columns, 3), uint8 or in 0..1: what the model saw, before normalisation.
        maps: (rows, columns) each: the image's size, or a grid of patches that tile it; sizes may differ.
        titles: one above each.
        columns: panels in a row. Default: all in one, at most six.
        shared: one colour range for all panels, with a bar, instead of each panel's own.
        opacity: of the maps, 0 to 1.
        limits: values of the first and the last colour of every panel.
        signed: centre on zero. Default: whether any value of any panel is negative.
        colours: from low to high. Default: Inferno, for signed data RdBu with blue below zero.
        title: above the figure.
        size: height of a panel in pixels.

    Raises:
        ValueError: no maps, another number of titles, or a map that does not tile the image.
    """
    picture = as_image("layer_grid(image)", image)
    arrays = [as_values(f"layer_grid(maps[{index}])", values) for index, values in enumerate(maps)]
    pixels = picture.shape[:2]
    patches = [patch_size(f"layer_grid(maps[{index}])", pixels, array.shape) for index, array in enumerate(arrays)]
    shape = (size, size * pixels[1] / pixels[0])
    figure, places = panels(
        "layer_grid", len(arrays), titles, columns=columns, shape=shape, bar=shared, title=title
    )  # fmt: skip
    source = data_uri(picture)
    for place, array, patch in zip(places, arrays, patches, strict=True):
        figure.add_trace(photo(source, pixels, array.shape), **place)
        figure.update_yaxes(scaleratio=patch[0] / patch[1], **place)
    return add_heat(
        figure, places, arrays, shared=shared, opacity=opacity, limits=limits, signed=signed, colours=colours
    )  # fmt: skip
