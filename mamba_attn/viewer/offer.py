"""Which settings a store and a mode support; controls offer these, and a pane falls back to them."""

from dataclasses import replace

from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import COLOURS, Pane


def colours(source: Source, mode: str) -> tuple[str, ...]:
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
    offered = colours(source, pane.mode)
    pane = pane if pane.colour in offered else replace(pane, colour=offered[0])
    if source.scans:
        return pane
    return replace(pane, gate=False, skip=False, path=False)  # softmax attention has no gate, D or path
