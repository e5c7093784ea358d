"""What a store and a mode have, of all that a pane can ask for: controls offer this, and other wishes fall back."""

from dataclasses import replace

from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import COLOURS, Pane


def colours(source: Source, mode: str) -> tuple[str, ...]:
    """Return what the points' colours can mean; the first is the default.

    Args:
        source: of the store.
        mode: of the points.
    """
    return tuple(name for name in COLOURS[mode] if name != "rank" or source.scans)


def fitting(source: Source, pane: Pane) -> Pane:
    """Return a pane with what its store and its mode do not have in its place: the default.

    Args:
        source: of the pane's store.
        pane: any.
    """
    offered = colours(source, pane.mode)
    pane = pane if pane.colour in offered else replace(pane, colour=offered[0])
    if source.scans:
        return pane
    return replace(pane, gate=False, skip=False, path=False)  # softmax attention has none of them
