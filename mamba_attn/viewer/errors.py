"""Failures that the page shows as sentences: a damaged store, weights that moved, a missing package."""

from mamba_attn.errors import MambaAttnError

# failures of store, model or machine; anything else is a bug and must not be hidden
FAILURES = (MambaAttnError, OSError, ImportError)


class UnavailableError(MambaAttnError):
    """This store or model cannot show what was asked for; the message is shown on the page."""


def sentence(error: Exception) -> str:
    """Return a failure as a sentence."""
    text = str(error) or type(error).__name__
    return f"{text[0].upper()}{text[1:]}" if text[:1].isalpha() else text
