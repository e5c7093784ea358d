"""What a report holds: of every store what matters most first, as much as fits the size that is asked for."""

from collections.abc import Callable, Sequence
from typing import Any

from mamba_attn.viewer.report import stored
from mamba_attn.viewer.report.budget import Content, ReportError
from mamba_attn.viewer.report.stored import Stored, elsewhere

_NOTES = 4000  # characters that are kept free for what is left out of a store


def gather(
    stores: Sequence[Any], methods: Sequence[str], images: int, limit: int, frame: Callable[[Content], int],
    advance: Callable[[str], None] = lambda what: None,
) -> Content:  # fmt: skip
    """Collect what the page shows; what matters most comes first, and what no longer fits is said.

    Means of the routes' sum come first, then points, an image, each route's means, then the other images' matrices.

    Args:
        stores: ``AttentionStore`` objects.
        methods: of dimension reduction; but for the first, of the routes' sum alone.
        images: per store, how many of those kept in full are shown.
        limit: bytes of the page.
        frame: bytes of a page without matrices, points and pictures.
        advance: told what is being done.

    Raises:
        ReportError: no layer can be shown, or not even the names and one mean fit.
        ImportError: a method's package is not installed.
    """
    content = Content(limit)
    kept = [Stored(store, content, methods) for store in stores]
    if not any(each.shown for each in kept):
        raise ReportError(f"all layers have grids of more than {stored.CELLS:,} patches. {elsewhere(stores)}")
    content.stores = [each.told() for each in kept]
    content.size = frame(content) + _NOTES * len(kept)
    if content.size > limit:
        raise ReportError(
            f"size={limit / 1e6:g}: names and orders alone need {content.size:,} bytes; "
            f"size={-int(-content.size // 1e6)} holds them."
        )
    steps: list[Callable[[Stored], None]] = [
        Stored.means, Stored.points, lambda each: each.pictures(images), Stored.first_image, Stored.routes,
    ]  # fmt: skip
    for step in steps:
        for each in kept:
            advance(each.name)
            step(each)
    advance("images")
    waiting = [each.images() for each in kept]
    while waiting:  # by turns, so that none takes the others' place
        waiting = [its for its in waiting if next(its, None) is not None]
    for each in kept:
        each.say_what_is_left_out()
    content.stores = [each.told() for each in kept if each.shown]
    return content
