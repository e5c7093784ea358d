"""Freezes the page: gathers its contents, most important first, until its size is reached."""

from collections.abc import Callable, Sequence
from typing import Any

from mamba_attn.viewer.page import page
from mamba_attn.viewer.report import stored
from mamba_attn.viewer.report.budget import Content, ReportError
from mamba_attn.viewer.report.quantised import ERROR
from mamba_attn.viewer.report.stored import Stored, elsewhere
from mamba_attn.viewer.source import Source

_NOTES = 4000  # characters per store, reserved for the notes on what is left out
_NOTE = (
    "Numbers are stored in 16 bits, with one scale per row of a matrix, so the error is at most "
    f"1/{round(1 / ERROR):,} of the largest number in the row."
)


def make(
    stores: Sequence[Any],
    methods: Sequence[str],
    images: int,
    size: float,
    made_with: str,
    advance: Callable[[str], None] = lambda what: None,
    *,
    first: tuple[int, int] | None = None,
    start: str = "",
) -> tuple[str, Content]:
    """Return the page of some stores, and what it holds.

    Args:
        stores: ``AttentionStore`` objects, or sources of them.
        methods: of dimension reduction; but for the first, of the routes' sum alone.
        images: per store, how many of those kept in full are shown.
        size: of the page at most, in 10^6 bytes.
        made_with: what made the page, for its last note.
        advance: called with what is being done.
        first: number of a store and of its image that goes in before the others, computed if it is not kept.
        start: what the page shows first, as the part of an address behind its #.

    Raises:
        ReportError: nothing can be shown, or the names alone do not fit.
        ImportError: a method's package is not installed.
    """

    def frozen() -> str:
        notes = [*content.notes, _NOTE, f"Made with {made_with}."]
        return page({"live": False, "stores": content.stores}, notes, content.matrices, start)

    content = Content(int(size * 1e6))
    wanted = dict([first] if first else [])
    sources = [store if isinstance(store, Source) else Source(store) for store in stores]
    kept = [Stored(source, content, methods, wanted.get(at)) for at, source in enumerate(sources)]
    if not any(each.shown for each in kept):
        where = elsewhere([source.store for source in sources])
        raise ReportError(f"all layers have grids of more than {stored.CELLS:,} patches. {where}")
    content.stores = [each.described() for each in kept]
    content.size = len(frozen().encode()) + _NOTES * len(kept)
    if content.size > content.limit:
        raise ReportError(
            f"size={content.limit / 1e6:g}: names and orders alone need {content.size:,} bytes; "
            f"size={-int(-content.size // 1e6)} holds them."
        )
    for step in (Stored.means, Stored.layouts, lambda each: each.pictures(images)):
        for each in kept:
            advance(each.name)
            step(each)
    advance("routes and images")
    waiting = [each.rest() for each in kept]
    while waiting:  # take turns: otherwise the first store would use up all the space
        waiting = [its for its in waiting if next(its, None) is not None]
    for each in kept:
        each.note_what_is_left_out()
    content.stores = [each.described() for each in kept if each.shown]
    return frozen(), content
