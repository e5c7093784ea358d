"""What of some attention is shown: its sign, its normalisation, a logarithm."""

from typing import Any

import numpy as np

SIGNS = ("signed", "positive", "absolute")
NORMALISATIONS = ("none", "largest", "range", "sum")
_DECADES = 3.0  # of the logarithm, below the largest value


def shown(values: Any, *, sign: str = "signed", normalise: str = "none", log: bool = False) -> np.ndarray:
    """Return values as they are to be coloured.

    Args:
        values: any shape; NaN stays NaN.
        sign: "signed" as they are, "positive" with zero for what is negative, or "absolute".
        normalise: "largest" divides by the largest absolute value, "range" maps the smallest to 0 and the largest to 1,
            "sum" divides by the sum of absolute values; all zeros stay zeros.
        log: order of magnitude, keeping signs: 0 at a thousandth of the largest absolute value and below, 3 at it.

    Raises:
        ValueError: an unknown sign or normalisation.

    Example:
        >>> shown([[-2.0, 1.0]], sign="absolute").tolist()
        [[2.0, 1.0]]
    """
    if sign not in SIGNS or normalise not in NORMALISATIONS:
        raise ValueError(
            f"shown(sign={sign!r}, normalise={normalise!r}): expected a sign of {SIGNS} and a normalisation of "
            f"{NORMALISATIONS}."
        )
    array = np.asarray(values, dtype=np.float64)
    if sign != "signed":
        array = np.abs(array) if sign == "absolute" else np.where(array < 0, 0.0, array)
    array = _normalised(array, normalise)
    return _magnitude(array) if log else array


def _normalised(array: np.ndarray, how: str) -> np.ndarray:
    finite = array[np.isfinite(array)]
    if how == "none" or not finite.size:
        return array
    if how == "range":
        low, extent = float(finite.min()), float(np.ptp(finite))
        return (array - low) / extent if extent > 0 else array - low
    total = float(np.abs(finite).max() if how == "largest" else np.abs(finite).sum())
    return array / total if total > 0 else array


def _magnitude(array: np.ndarray) -> np.ndarray:
    finite = np.abs(array[np.isfinite(array)])
    largest = float(finite.max()) if finite.size else 0.0
    if largest == 0:
        return array
    with np.errstate(divide="ignore"):
        decades = np.log10(np.abs(array) / largest) + _DECADES
    return np.asarray(np.sign(array) * np.maximum(decades, 0.0))
