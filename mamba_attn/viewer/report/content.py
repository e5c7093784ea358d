"""Gathers the contents of a report, most important first, until the size limit is reached."""

from collections.abc import Callable, Sequence
from typing import Any

from mamba_attn.viewer.report import stored
from mamba_attn.viewer.report.budget import Content, ReportError
from mamba_attn.viewer.report.stored import Stored, elsewhere

_NOTES = 4000  # characters per store, reserved for the notes on what is left out


def gather(
    stores: Sequence[Any],
    methods: Sequence[str],
    images: int,
    limit: int,
    frame: Callable[[Content], int],
    advance: Callable[[str], None] = lambda what: None,
) -> Content:
    """Collect what the page shows, most important first; notes list what does not fit.

    Means of the routes' sum come first, then points, an image, each route's means, then the other images' matrices.

    Args:
        stores: ``AttentionStore`` objects.
        methods: of dimension reduction; but for the first, of the routes' sum alone.
        images: per store, how many of those kept in full are shown.
        limit: bytes of the page.
        frame: bytes of a page without matrices, points and pictures.
        advance: called with what is being done.

    Raises:
        ReportError: no layer can be shown, or not even the names and one mean fit.
        ImportError: a method's package is not installed.
    """
    content = Content(limit)
    kept = [Stored(store, content, methods) for store in stores]
    if not any(each.shown for each in kept):
        raise ReportError(f"all layers have grids of more than {stored.CELLS:,} patches. {elsewhere(stores)}")
    content.stores = [each.described() for each in kept]
    content.size = frame(content) + _NOTES * len(kept)
    if content.size > limit:
        raise ReportError(
            f"size={limit / 1e6:g}: names and orders alone need {content.size:,} bytes; "
            f"size={-int(-content.size // 1e6)} holds them."
        )
    steps: list[Callable[[Stored], None]] = [
        Stored.means,
        Stored.points,
        lambda each: each.pictures(images),
        Stored.first_image,
        Stored.routes,
    ]
    for step in steps:
        for each in kept:
            advance(each.name)
            step(each)
    advance("images")
    waiting = [each.images() for each in kept]
    while waiting:  # take turns: otherwise the first store would use up all the space
        waiting = [its for its in waiting if next(its, None) is not None]
    for each in kept:
        each.note_what_is_left_out()
    content.stores = [each.described() for each in kept if each.shown]
    return content
