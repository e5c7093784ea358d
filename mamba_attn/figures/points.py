"""Points in the plane, e.g. blocks or patches after a dimension reduction, coloured by a number or by a kind."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mamba_attn.figures.colours import CIVIDIS, INK, categories, plotly_scale
from mamba_attn.figures.theme import Figure, plain

_WEBGL = 1500  # points, beyond which SVG gets slow
_FAINT = 0.12  # opacity of points outside the selection
_LIT = 10  # size in pixels of points inside it
_SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon"]


def embedding(
    points: Any,
    colour: Any,
    *,
    sizes: Any | None = None,
    texts: Sequence[str] | None = None,
    selected: Iterable[int] = (),
    colour_title: str = "",
    axes: tuple[str, str] = ("", ""),
    title: str | None = None,
    size: int = 460,
) -> go.Figure:
    """Show points that can be clicked and lassoed; each carries its number as ``customdata``.

    Args:
        points: (points, 2).
        colour: of each point, a number (a colour bar is drawn) or a name (a trace and a symbol per kind is drawn).
        sizes: diameter of each point in pixels. Default: 8.
        texts: under the pointer.
        selected: numbers of points; the others turn faint. None of them: all are drawn alike.
        colour_title: what the colours mean.
        axes: names of the axes.
        title: above the figure.
        size: height of the figure in pixels; the width is that of its container.

    Raises:
        ValueError: points that are not (points, 2), or another number of colours, sizes or texts.

    Example:
        >>> figure = embedding(torch.rand(20, 2), torch.arange(20), selected=[3], axes=("first", "second"))
        >>> len(figure.data) >= 1
        True
    """
    places = np.asarray(points, dtype=np.float64)
    wanted = {"colour": colour, "sizes": sizes, "texts": texts}
    given = {name: len(items) for name, items in wanted.items() if items is not None}
    if places.ndim != 2 or places.shape[1] != 2 or set(given.values()) != {len(places)}:
        raise ValueError(
            f"embedding: expected points (points, 2) and as many of each else, got {places.shape}, {given}."
        )
    diameters = np.full(len(places), 8.0) if sizes is None else np.asarray(sizes, dtype=np.float64)
    words = np.array([""] * len(places) if texts is None else list(texts), dtype=object)
    chosen = set(selected)
    if all(isinstance(one, str) for one in colour):
        traces = _kinds(places, list(colour), diameters, words, chosen)
    else:
        traces = [_numbers(places, np.asarray(colour, dtype=np.float64), diameters, words, chosen, colour_title)]
    figure = plain(Figure(traces), title=title, width=size, height=size)
    line = {"showgrid": True, "gridcolor": "#eef0f2", "zeroline": False, "showticklabels": False, "ticks": ""}
    figure.update_xaxes(title={"text": axes[0], "standoff": 4}, **line).update_yaxes(
        title={"text": axes[1], "standoff": 4}, **line
    )
    margin = {"l": 26, "r": 8, "t": 34 if title else 28, "b": 26}
    return figure.update_layout(
        width=None,
        autosize=True,
        margin=margin,
        dragmode="lasso",
        hovermode="closest",
        legend={"title": {"text": colour_title}, "itemsizing": "constant"},
    )


def highlighted(figure: go.Figure, selected: Iterable[int]) -> list[list[int] | None]:
    """Return ``selectedpoints`` of every trace of an ``embedding`` figure for some numbers of points."""
    chosen = set(selected)
    return [
        [place for place, number in enumerate(trace.customdata) if int(number) in chosen] if chosen else None
        for trace in figure.data
    ]


def _kinds(
    places: np.ndarray, kinds: list[str], diameters: np.ndarray, words: np.ndarray, chosen: set[int]
) -> list[go.Scatter]:
    names = list(dict.fromkeys(kinds))
    of_kind = np.array(kinds, dtype=object)
    traces = []
    for index, (name, colour) in enumerate(zip(names, categories(len(names)), strict=True)):
        numbers = np.flatnonzero(of_kind == name)
        marker = {
            "color": colour,
            "symbol": _SYMBOLS[index % len(_SYMBOLS)],
            "size": diameters[numbers],
            "line": {"width": 0.6, "color": "white"},
        }
        traces.append(_trace(places, numbers, words, chosen, marker, len(places), name=name))
    return traces


def _numbers(
    places: np.ndarray, values: np.ndarray, diameters: np.ndarray, words: np.ndarray, chosen: set[int], title: str
) -> go.Scatter:
    bar = {"title": {"text": title, "side": "right"}, "thickness": 10, "outlinewidth": 0, "x": 1.0, "xpad": 4}
    marker = {
        "color": values,
        "colorscale": plotly_scale(CIVIDIS),
        "size": diameters,
        "showscale": True,
        "colorbar": bar,
        "line": {"width": 0.5, "color": "white"},
    }
    return _trace(places, np.arange(len(places)), words, chosen, marker, len(places), showlegend=False)


def _trace(
    places: np.ndarray,
    numbers: np.ndarray,
    words: np.ndarray,
    chosen: set[int],
    marker: dict[str, Any],
    count: int,
    **options: Any,
) -> go.Scatter:
    kind = go.Scattergl if count > _WEBGL else go.Scatter
    return kind(
        x=places[numbers, 0],
        y=places[numbers, 1],
        mode="markers",
        customdata=numbers.tolist(),
        text=words[numbers],
        hovertemplate="%{text}<extra></extra>",
        marker=marker,
        unselected={"marker": {"opacity": _FAINT}},
        selected={"marker": {"opacity": 1.0, "size": _LIT}},
        hoverlabel={"font": {"color": INK}, "bgcolor": "white"},
        selectedpoints=[place for place, number in enumerate(numbers) if int(number) in chosen] if chosen else None,
        **options,
    )
