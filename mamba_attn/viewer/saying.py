"""What goes wrong while the page is used, as sentences on it: a damaged store, weights that moved, no such package."""

from typing import Any

from mamba_attn.errors import MambaAttnError

# the state of the store, the model or the machine; anything else is a bug, and stays one
FAILURES = (MambaAttnError, OSError, ImportError)
# in place of a view that cannot be drawn: an old picture must not stand under a new title
BLANK: dict[str, Any] = {
    "data": [], "layout": {"xaxis": {"visible": False}, "yaxis": {"visible": False}, "dragmode": False},
}  # fmt: skip


class UnavailableError(MambaAttnError):
    """Something that this store and model cannot show; the message is for the page."""


def on_error(error: Exception) -> None:
    """Say a failure above the views, whichever callback met it; dash asks this for all of them.

    Args:
        error: what a callback raised.

    Raises:
        Exception: the same, if it is a bug.
    """
    if not isinstance(error, FAILURES):
        raise error
    from dash import set_props  # the views behind the page need no dash

    set_props("message", {"children": said(error)})


def said(error: Exception) -> str:
    """Return a failure as a sentence."""
    text = str(error) or type(error).__name__
    return f"{text[0].upper()}{text[1:]}" if text[:1].isalpha() else text
