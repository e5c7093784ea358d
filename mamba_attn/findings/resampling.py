"""Intervals of a bootstrap over images, and whether two orders of numbers go together."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from mamba_attn.core.ranks import ranks, spearman

DRAWS = 2000
_EXACT = 7  # numbers whose orders are all tried
_PERCENT = (2.5, 97.5)
_ROUNDING = 1e-6  # what float32 alone makes of a matrix that does not change


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval that resampling gives; ``low`` and ``high`` are None where there is nothing to resample.

    Args:
        value: the mean.
        low: 2.5 % of the draws lie below.
        high: 2.5 % lie above.
        units: images, or groups of images, that were counted.
    """

    value: float
    low: float | None
    high: float | None
    units: int

    def beyond(self, sign: str, number: float) -> bool | None:
        """Return whether the interval lies on one side of a number; None where it holds it, or there is none.

        Args:
            sign: ">" or "<".
            number: the border.
        """
        if self.low is None or self.high is None or self.low - _ROUNDING <= number <= self.high + _ROUNDING:
            return None
        return (self.low > number) == (sign == ">")


def mean(values: np.ndarray, seed: int = 0) -> Estimate | None:
    """Return the mean of numbers, one per image or group, and the percentiles of a bootstrap; None without numbers.

    Args:
        values: (units,); NaN are left out.
        seed: of the resampling.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    if len(known) < 2:
        return Estimate(float(known[0]), None, None, 1)
    drawn = _counts(len(known), seed) @ known / len(known)
    return Estimate(float(known.mean()), *_percentiles(drawn), len(known))


def difference(values: np.ndarray, other: np.ndarray, seed: int = 0) -> Estimate | None:
    """Return the mean of numbers less that of the same images' numbers in another model; None without a common image.

    Args:
        values: (units,).
        other: (units,).
        seed: of the resampling.
    """
    return None if len(values) != len(other) else mean(values - other, seed)


@dataclass(frozen=True)
class Together:
    """How far two orders of a few numbers go together.

    Args:
        correlation: Spearman's; NaN where one of the two is constant.
        chance: which part of all orders (or of 10,000 drawn ones) correlate as far, whichever way: the p-value.
        border: 95 % of the orders correlate less far than this.
        count: numbers.
    """

    correlation: float
    chance: float
    border: float
    count: int


def together(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Together:
    """Compare two orders with all that chance could make of them.

    Args:
        first: (numbers,).
        second: (numbers,).
        seed: of the orders that are drawn, where there are too many to try all.
    """
    count = len(first)
    found = spearman(first, second) if count > 1 else float("nan")
    if count < 3 or math.isnan(found):
        return Together(found, 1.0, 1.0, count)
    a, b = (ranks(np.asarray(values)) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    if count <= _EXACT:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        random = np.random.default_rng(seed)
        orders = np.array([range(count), *(random.permutation(count) for _ in range(9999))])
    chance = np.abs(b[orders] @ a) / np.sqrt((a @ a) * (b @ b))
    return Together(found, float((chance >= abs(found) - 1e-9).mean()), float(np.percentile(chance, 95)), count)


def _counts(units: int, seed: int) -> np.ndarray:
    """(draws, units) how often each is drawn."""
    drawn = np.random.default_rng(seed).integers(0, units, (DRAWS, units))
    counts = np.zeros((DRAWS, units))
    np.add.at(counts, (np.arange(DRAWS)[:, None], drawn), 1)
    return counts


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, _PERCENT)
    return float(low), float(high)
