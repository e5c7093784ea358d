"""Shows failures on the page as sentences: a damaged store, weights that moved, a missing package."""

from typing import Any

from mamba_attn.errors import MambaAttnError

# failures of store, model or machine; anything else is a bug and must not be hidden
FAILURES = (MambaAttnError, OSError, ImportError)
# drawn instead of a view that failed: otherwise the old picture would stay under a new title
BLANK: dict[str, Any] = {
    "data": [],
    "layout": {"xaxis": {"visible": False}, "yaxis": {"visible": False}, "dragmode": False},
}


class UnavailableError(MambaAttnError):
    """This store or model cannot show what was asked for; the message is shown on the page."""


def on_error(error: Exception) -> None:
    """Show a failure above the views; dash calls this for errors of every callback.

    Args:
        error: raised by a callback.

    Raises:
        Exception: the error itself, if it is a bug.
    """
    if not isinstance(error, FAILURES):
        raise error
    from dash import set_props  # imported late: views work without dash

    set_props("message", {"children": sentence(error)})


def sentence(error: Exception) -> str:
    """Return a failure as a sentence."""
    text = str(error) or type(error).__name__
    return f"{text[0].upper()}{text[1:]}" if text[:1].isalpha() else text
