"""Warnings of what will go: docs/stability.md says how long a public name or argument still works.

``tests/core/test_deprecation.py`` fails once the version is reached in which something announced here should be gone.
"""

import warnings


def warn_deprecated(call: str, *, write: str, gone: str, stacklevel: int = 2) -> None:
    """Warn that a call works in another way from now on.

    Args:
        call: what was called, with the deprecated name: ``"attribute(query=(3, 4)): query"``.
        write: what to write instead.
        gone: the version in which it stops working.
        stacklevel: as in ``warnings.warn``, seen from the caller of this function; 2 points at the line that called it.

    Example:
        >>> import warnings
        >>> def explain(images, place=None, pixel=None):
        ...     if place is not None:
        ...         warn_deprecated("explain(place=...): place", write="pixel=", gone="0.9")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     explain(None, place=(3, 4))
        >>> print(caught[0].message)
        explain(place=...): place is deprecated; write pixel=. It stops working in 0.9.
    """
    message = f"{call} is deprecated; write {write}. It stops working in {gone}."
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)
