"""Whether a result may be timed at all: its error against the float64 specification."""

from benchmarks.kernel.verify import TOLERANCE, norm_error, term_error

__all__ = ["TOLERANCE", "norm_error", "require_exact", "term_error"]


def require_exact(name: str, error: float) -> None:
    """Refuse to report the speed of a wrong result.

    Raises:
        SystemExit: the error is beyond ``TOLERANCE``.
    """
    if not error <= TOLERANCE:
        raise SystemExit(
            f"{name}: error {error:.2g} of the absolute terms is more than {TOLERANCE}: no speed reported."
        )
