"""What a pane shows, in words and colours: captions, units, palettes."""

from mamba_attn.figures import colours
from mamba_attn.viewer.source import Source, scans
from mamba_attn.viewer.state import Pane, State


def palette(pane: Pane) -> list[str]:
    """Return a pane's colours of values that are not negative."""
    return colours.CIVIDIS if pane.palette == "cividis" else colours.VIRIDIS


def signed(pane: Pane) -> bool | None:
    """Return True where colours are centred on zero, whatever the values; None: the values say."""
    return True if pane.sign == "signed" and pane.normalise != "range" else None


def of(source: Source, pane: Pane) -> str:
    """Return of which images a pane's map is."""
    if pane.what == "mean":
        count = len(source.images)
        return f"mean of {count} images" if count > 1 else "the one image"
    name = source.image(pane).key.rpartition("/")[2]
    return name if pane.what == "image" else f"{name} less the mean"


def heading(source: Source, pane: Pane, state: State) -> str:
    """Return a title of maps: what is shown, and of which images."""
    return f"{caption(source, pane, state)} · {of(source, pane)}"


def legend(source: Source, pane: Pane) -> str:
    """Return what stands above a map: what its colours are, and whose path is drawn."""
    path = f" · path of route {drawn_route(source, pane) + 1}" if pane.path and scans(source.layer(pane)) else ""
    return f"{unit(pane)}{path}"


def drawn_route(source: Source, pane: Pane) -> int:
    """Return the number of the route whose path stands for the pane's: of a sum the first."""
    return min(max(pane.route, 0), int(source.layer(pane).routes) - 1)


def unit(pane: Pane) -> str:
    """Return what the numbers of a pane's map are, in a few words."""
    kind = "attention" if pane.what != "difference" else "image less mean"
    kind = kind if pane.sign == "signed" else f"{pane.sign} {kind}"
    of = {"none": "", "largest": " / largest", "range": ", 0 to 1", "sum": " / sum"}[pane.normalise]
    return f"{kind}{of}{', decades' if pane.log else ''}"


def caption(source: Source, pane: Pane, state: State) -> str:
    """Return what the patch view shows, as a sentence."""
    layer = source.layer(pane)
    patches = state.on_grid(tuple(layer.layout.grid))
    rest = [cell for cell in state.cells if cell < 0]
    width = layer.layout.grid[1]
    if len(patches) == 1 and not rest:
        row, column = divmod(patches[0], width)
        who = f"patch ({row}, {column})"
    elif not patches and not rest:
        who = "all patches, on average,"
    elif not patches:
        who = "the class token" if rest == [-1] and layer.layout.class_tokens else f"{len(rest)} extra tokens"
    else:
        who = f"{len(patches)} patches, on average,"
    plural = who.endswith(",") or who.endswith("tokens")
    verb = ("read" if plural else "reads") if pane.direction == "row" else ("are read" if plural else "is read")
    return f"{'Where' if pane.direction == 'column' else 'What'} {who} {verb}"
