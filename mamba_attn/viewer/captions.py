"""Captions, units and palettes: what a pane shows, in words and colours; and which settings its store and mode support.

Controls offer these, and a pane falls back to them.
"""

from collections.abc import Sequence
from dataclasses import replace

from mamba_attn.figures.colours import CIVIDIS, VIRIDIS
from mamba_attn.viewer.source import Source, scans
from mamba_attn.viewer.state import COLOURS, Pane, State


def palette(pane: Pane) -> list[str]:
    """Return the colour scale of a pane whose values are not negative."""
    return CIVIDIS if pane.palette == "cividis" else VIRIDIS


def signed(pane: Pane) -> bool | None:
    """Return True if colours are centred on zero whatever the values; None leaves it to the values."""
    return True if pane.sign == "signed" and pane.normalise != "range" else None


def of(source: Source, pane: Pane) -> str:
    """Return which images a pane's map is of."""
    if pane.what == "mean":
        count = len(source.images)
        return f"average of {count} images" if count > 1 else "the one image"
    name = source.image(pane).key.rpartition("/")[2]
    return name if pane.what == "image" else f"{name} minus the average"


def heading(source: Source, pane: Pane, state: State) -> str:
    """Return a title of maps: what is shown, and of which images."""
    return f"{caption(source, pane, state)} · {of(source, pane)}"


def legend(source: Source, pane: Pane) -> str:
    """Return the text above a map: what its colours mean, and which route's path is drawn."""
    path = f" · path of route {drawn_route(source, pane) + 1}" if pane.path and scans(source.layer(pane)) else ""
    return f"{unit(pane)}{path}"


def drawn_route(source: Source, pane: Pane) -> int:
    """Return the number of the route whose path is drawn; for a sum, the first."""
    return min(max(pane.route, 0), int(source.layer(pane).routes) - 1)


def unit(pane: Pane) -> str:
    """Return what the numbers of a pane's map are, in a few words."""
    kind = "attention" if pane.what != "difference" else "difference from average"
    kind = kind if pane.sign == "signed" else f"{pane.sign} {kind}"
    of = {"none": "", "largest": " / maximum", "range": ", 0 to 1", "sum": " / sum"}[pane.normalise]
    return f"{kind}{of}{', decades' if pane.log else ''}"


def caption(source: Source, pane: Pane, state: State) -> str:
    """Return what the patch view shows, as a sentence."""
    layer = source.layer(pane)
    patches = state.on_grid(tuple(layer.layout.grid))
    rest = [cell for cell in state.cells if cell < 0]
    width = layer.layout.grid[1]
    many = True
    if len(patches) == 1 and not rest:
        row, column = divmod(patches[0], width)
        who, many = f"patch ({row}, {column})", False
    elif not patches and not rest:
        who = "patches"
    elif patches:
        who = f"{len(patches)} patches"
    elif rest == [-1] and layer.layout.class_tokens:
        return f"Where the class token {'looks' if pane.direction == 'row' else 'is seen from'}"
    else:
        who = f"{len(rest)} extra tokens"
    verbs = ("look", "are seen from") if many else ("looks", "is seen from")
    averaged = ", on average" if many else ""
    return f"Where {who} {verbs[pane.direction == 'column']}{averaged}"


def visits(ranks: Sequence[int | None], steps: int) -> str:
    """Return when each route visits a patch, e.g. "3rd and 14th of 16 in routes 1-2".

    Args:
        ranks: its step in each route, from 1; None where the route leaves it out.
        steps: of every route.
    """
    *others, last = ["never" if rank is None else _ordinal(rank) for rank in ranks]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} of {steps:,}{f' in routes 1-{len(ranks)}' if others else ''}"


def _ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 1,021st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


def point_colours(source: Source, mode: str) -> tuple[str, ...]:
    """Return the possible meanings of the points' colours; the first is the default.

    Args:
        source: of the store.
        mode: "blocks" or "patches".
    """
    return tuple(name for name in COLOURS[mode] if name != "rank" or source.scans)


def fitting(source: Source, pane: Pane) -> Pane:
    """Return a pane with unsupported settings replaced by defaults.

    Args:
        source: of the pane's store.
        pane: any pane.
    """
    offered = point_colours(source, pane.mode)
    pane = pane if pane.colour in offered else replace(pane, colour=offered[0])
    if source.scans:
        return pane
    return replace(pane, gate=False, skip=False, path=False)  # softmax attention has no gate, D or path
