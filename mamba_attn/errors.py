"""What can go wrong that is not a wrong argument: one base error and few kinds.

Wrong arguments raise ValueError or TypeError; everything here is about state: a model, a trace, a machine.
"""

import difflib
from collections.abc import Iterable


class MambaAttnError(RuntimeError):
    """Base of every error that is about state and not about an argument."""


class TraceError(MambaAttnError):
    """A trace was read before, or other than, the forward pass it recorded."""


class UnknownLayerError(MambaAttnError, KeyError):
    """A layer name that the trace does not hold; the message lists the names."""

    __str__ = RuntimeError.__str__  # KeyError would print the repr of the sentence


class UnsupportedModelError(MambaAttnError):
    """A model, or a variant of a known family, that no adapter can treat exactly."""


class NonFiniteError(MambaAttnError):
    """A layer met NaN or Inf."""


class MatrixTooLargeError(MambaAttnError):
    """A dense matrix would not fit the memory; nothing was allocated."""


class BackendUnavailableError(MambaAttnError):
    """A backend that was insisted upon cannot run here, or not on these inputs."""


class WeightsError(MambaAttnError):
    """A checkpoint that does not fit, is damaged, or is not safe to load."""


class StoreError(MambaAttnError):
    """A store of collected attention that is half written, damaged, of another version or of another model."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the sentence that helps after a misspelt name: the nearest names, or all of them when few.

    Args:
        name: what was asked for.
        names: what there is.
    """
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(item) for item in close) + "?"
    shown = ", ".join(repr(item) for item in known[:40])
    return f"Known: {shown}{', ...' if len(known) > 40 else ''}."
