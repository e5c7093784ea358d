"""Heat maps of maps and matrices: one or several, alone or over their image."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mamba_attn.figures.colours import as_image, as_values, plotly_scale, scale
from mamba_attn.figures.picture import data_uri, patch_size
from mamba_attn.figures.theme import Figure, add_heat, name_ticks, panels, photo, plain, readable, square_cells


def overlay(
    image: Any,
    values: Any,
    *,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 400,
) -> go.Figure:
    """Show a map over the image that it explains.

    Args:
        image: (rows, columns, 3), uint8 or in 0..1: what the model saw, before normalisation.
        values: (rows, columns), the image's size.
        opacity: of the map, 0 to 1.
        limits: values of the first and the last colour. Default: the values' range; signed data is centred on zero.
        signed: centre on zero. Default: whether a value is negative.
        colours: from low to high. Default: Inferno, for signed data orange above zero and blue below.
        title: above the figure.
        size: height of the figure in pixels.

    Raises:
        ValueError: shapes that disagree, or limits that do not fit.

    Example:
        >>> figure = overlay(torch.rand(32, 48, 3), torch.rand(32, 48), title="a map")
        >>> figure.write_html("map.html")  # doctest: +SKIP
        >>> len(figure.data)  # the photo and the map
        2
    """
    picture, array = as_image("overlay(image)", image), as_values("overlay(values)", values)
    if picture.shape[:2] != array.shape:
        raise ValueError(f"overlay: the map is {array.shape} pixels, the image {picture.shape[:2]}; they must agree.")
    chosen = scale(array, limits=limits, signed=signed, colours=colours)
    heat = go.Heatmap(
        z=array,
        zmin=chosen.low,
        zmax=chosen.high,
        colorscale=plotly_scale(chosen.colours),
        opacity=opacity,
        hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
    )
    width = round(size * array.shape[1] / array.shape[0]) + 60
    figure = Figure([photo(data_uri(picture), array.shape, array.shape), heat])
    plain(figure, title=title, width=width, height=size)
    square_cells(figure)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return figure


def volume(
    image: Any,
    values: Any,
    *,
    axis: int = 0,
    at: int | None = None,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 300,
) -> go.Figure:
    """Show a map of a volume or a video over what it explains: one slice, and next to it the maximum over all.

    Args:
        image: (depth or frames, rows, columns) or with 3 colours behind, uint8 or in 0..1.
        values: (depth or frames, rows, columns), the image's size.
        axis: that is cut and projected along.
        at: number of the slice. Default: the one that holds the largest absolute value.
        opacity: of the map, 0 to 1.
        limits: values of the first and the last colour. Default: the values' range; signed data is centred on zero.
        signed: centre on zero. Default: whether a value is negative.
        colours: from low to high. Default: Inferno, for signed data orange above zero and blue below.
        title: above the figure.
        size: height of a panel in pixels.

    Raises:
        ValueError: no volume, shapes that disagree, an axis or a slice that is not there.

    Example:
        >>> figure = volume(np.random.rand(4, 16, 16), np.random.rand(4, 16, 16), at=2)
        >>> figure.layout.annotations[0].text
        'slice 2'
    """
    picture, array = np.asarray(image), np.asarray(values, dtype=np.float64)
    picture = np.repeat(picture[..., None], 3, -1) if picture.ndim == 3 else picture
    if array.ndim != 3 or picture.shape != (*array.shape, 3):
        raise ValueError(
            f"volume(image{np.shape(image)}, values{array.shape}): expected a map (depth, rows, columns), and an image "
            "of its size, with or without 3 colours behind."
        )
    if not 0 <= axis < 3 or (at is not None and not 0 <= at < array.shape[axis]):
        raise ValueError(f"volume(axis={axis}, at={at}): the map has 3 axes, and {array.shape} slices along them.")
    picture, array = np.moveaxis(picture, axis, 0), np.moveaxis(array, axis, 0)
    strength = np.nan_to_num(np.abs(array))
    at = int(strength.max((1, 2)).argmax()) if at is None else at
    strongest = strength.argmax(0)[None]
    maps = [array[at], np.take_along_axis(array, strongest, 0)[0]]
    photos = [as_image("volume(image)", each) for each in (picture[at], picture.max(0))]
    shape = (size, size * array.shape[2] / array.shape[1])
    titles = [f"slice {at}", "maximum of all slices"]
    figure, places = panels("volume", 2, titles, columns=2, shape=shape, bar=True, title=title)
    for place, each, values_of in zip(places, photos, maps, strict=True):
        figure.add_trace(photo(data_uri(each), each.shape[:2], values_of.shape), **place)
    return add_heat(figure, places, maps, shared=True, opacity=opacity, limits=limits, signed=signed, colours=colours)


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
        colours: from low to high. Default: Inferno, for signed data orange above zero and blue below.
        title: above the figure.
        size: height of a panel in pixels.

    Raises:
        ValueError: no maps, another number of titles, or a map that does not tile the image.

    Example:
        >>> figure = layer_grid(torch.rand(32, 32, 3), [torch.rand(4, 4), torch.rand(8, 8)], ["first", "second"])
        >>> [title.text for title in figure.layout.annotations]
        ['first', 'second']
    """
    picture = as_image("layer_grid(image)", image)
    arrays = [as_values(f"layer_grid(maps[{index}])", values) for index, values in enumerate(maps)]
    pixels = picture.shape[:2]
    patches = [patch_size(f"layer_grid(maps[{index}])", pixels, array.shape) for index, array in enumerate(arrays)]
    shape = (size, size * pixels[1] / pixels[0])
    figure, places = panels("layer_grid", len(arrays), titles, columns=columns, shape=shape, bar=shared, title=title)
    source = data_uri(picture)
    for place, array, patch in zip(places, arrays, patches, strict=True):
        figure.add_trace(photo(source, pixels, array.shape), **place)
        figure.update_yaxes(scaleratio=patch[0] / patch[1], **place)
    return add_heat(
        figure, places, arrays, shared=shared, opacity=opacity, limits=limits, signed=signed, colours=colours
    )


def matrix(
    values: Any,
    *,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    marks: Iterable[int] = (),
    labels: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 480,
) -> go.Figure:
    """Show a matrix: row i is what token i reads, column j where token j is read.

    Args:
        values: (rows, columns).
        limits: values of the first and the last colour. Default: the values' range; signed data is centred on zero.
        signed: centre on zero. Default: whether a value is negative.
        colours: from low to high. Default: Inferno, for signed data orange above zero and blue below.
        marks: tokens marked by a thin line on both axes, e.g. the class token.
        labels: the tokens of a text, written along both axes.
        title: above the figure.
        size: width and height of the figure in pixels.

    Raises:
        ValueError: not a matrix, limits that do not fit, or another number of labels than tokens.

    Example:
        >>> figure = matrix(torch.rand(5, 5), marks=[2])
        >>> figure.data[0].z.shape
        (5, 5)
    """
    array = as_values("matrix(values)", values)
    if labels is not None and array.shape != (len(labels),) * 2:
        raise ValueError(f"matrix(labels of {len(labels)} tokens): the matrix is {array.shape}; give one per token.")
    chosen = scale(array, limits=limits, signed=signed, colours=colours)
    heat = go.Heatmap(
        z=array,
        zmin=chosen.low,
        zmax=chosen.high,
        colorscale=plotly_scale(chosen.colours),
        hovertemplate="token %{y} reads token %{x}: %{z:.3g}<extra></extra>",
    )
    figure = plain(Figure(heat), title=title, width=size + 60, height=size)
    square_cells(figure)
    figure.update_xaxes(title="token read")
    figure.update_yaxes(title="reading token", scaleanchor="x")
    if labels is not None:
        shown = readable(labels)
        figure.data[0].update(
            customdata=[[[row, column] for column in shown] for row in shown],
            hovertemplate="token %{y} %{customdata[0]} reads token %{x} %{customdata[1]}: %{z:.3g}<extra></extra>",
        )
        for update in (figure.update_xaxes, figure.update_yaxes):
            name_ticks(update, shown, round(0.7 * size))
        figure.update_xaxes(tickangle=-90, automargin=True).update_yaxes(automargin=True)
    for token in marks:
        figure.add_vline(token, line={"color": "#888888", "width": 1, "dash": "dot"})
        figure.add_hline(token, line={"color": "#888888", "width": 1, "dash": "dot"})
    return figure


def depth_grid(
    values: Sequence[Any],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    shared: bool = False,
    limits: tuple[float, float] | None = None,
    signed: bool | None = None,
    colours: Sequence[str] | None = None,
    title: str | None = None,
    size: int = 260,
) -> go.Figure:
    """Show several matrices, or maps on the token grid, in reading order.

    Args:
        values: (rows, columns) each; sizes may differ.
        titles: one above each.
        columns: panels in a row. Default: all in one, at most six.
        shared: one colour range for all panels, with a bar, instead of each panel's own.
        limits: values of the first and the last colour of every panel.
        signed: centre on zero. Default: whether any value of any panel is negative.
        colours: from low to high. Default: Inferno, for signed data orange above zero and blue below.
        title: above the figure.
        size: side of a panel in pixels.

    Raises:
        ValueError: no panels, another number of titles, or a panel that is not (rows, columns).

    Example:
        >>> figure = depth_grid([torch.rand(5, 5)] * 3, ["first", "middle", "last"], shared=True)
        >>> len(figure.data)
        3
    """
    arrays = [as_values(f"depth_grid(values[{index}])", value) for index, value in enumerate(values)]
    figure, places = panels(
        "depth_grid", len(arrays), titles, columns=columns, shape=(size, size), bar=shared, title=title
    )
    return add_heat(figure, places, arrays, shared=shared, limits=limits, signed=signed, colours=colours)
