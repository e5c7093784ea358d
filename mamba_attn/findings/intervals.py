"""Uncertainty of a finding: intervals over images, the range of untrained models, and rank correlation.

The range in which one more untrained model is expected is Student's prediction interval over random seeds. The
question is whether one trained model could be one of the untrained ones, so that their scatter counts and not how well
their mean is known. All models see the same images: what the choice of images adds to every model cancels, and what it
adds to each apart is part of the seeds' scatter already. The bootstrap over images is therefore not added.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from mamba_attn.core.ranks import ranks, spearman
from mamba_attn.evaluation.intervals import LEVEL, drawn_counts

_EXACT = 7  # up to this count of numbers, try all permutations
_PERCENT = (2.5, 97.5)
_FEW = 15  # units: with fewer the percentiles of a bootstrap are too narrow, and Student's interval is taken
_ROUNDING = 1e-6  # float32 error of a matrix that does not change
_LEAST_SCATTER = 1e-6  # relative float32 error of seeds that do not differ


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval of 95 %; ``low`` and ``high`` are None for a single number.

    Args:
        value: the mean.
        low: its lower end.
        high: its upper end.
        units: number of images, or groups of images.
    """

    value: float
    low: float | None
    high: float | None
    units: int

    def beyond(self, sign: str, number: float) -> bool | None:
        """Return whether the interval lies on one side of a number; None if it contains it or there is no interval.

        Args:
            sign: ">" or "<".
            number: the threshold.
        """
        if self.low is None or self.high is None or self.low - _ROUNDING <= number <= self.high + _ROUNDING:
            return None
        return (self.low > number) == (sign == ">")


def mean(values: np.ndarray, seed: int = 0) -> Estimate | None:
    """Return the mean of numbers, one per image or group, and its interval; None without numbers.

    The interval is of a bootstrap's percentiles, or, of fewer than 15 numbers, Student's.

    Args:
        values: (units,); NaN are ignored.
        seed: of the resampling.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    if len(known) < 2:
        return Estimate(float(known[0]), None, None, 1)
    centre, count = float(known.mean()), len(known)
    if count < _FEW:
        half = quantile(count - 1) * float(known.std(ddof=1)) / math.sqrt(count)
        return Estimate(centre, centre - half, centre + half, count)
    drawn = np.concatenate([counts.astype(np.float64) @ known for counts in drawn_counts(count, seed)])
    return Estimate(centre, *_percentiles(drawn / count), count)


def difference(values: np.ndarray, other: np.ndarray, seed: int = 0) -> Estimate | None:
    """Return the mean of numbers minus that of the same images in another model; None without a common image.

    Args:
        values: (units,).
        other: (units,).
        seed: of the resampling.
    """
    return None if len(values) != len(other) else mean(values - other, seed)


@dataclass(frozen=True)
class Together:
    """How strongly the ranks of two short lists of numbers agree.

    Args:
        correlation: Spearman's; NaN if either is constant.
        chance: fraction of all permutations (or of 10,000 drawn) that correlate as strongly, two-sided: the p-value.
        border: 95 % of the permutations correlate less strongly than this.
        count: how many numbers.
    """

    correlation: float
    chance: float
    border: float
    count: int


def together(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Together:
    """Compare a rank correlation with those of random permutations.

    Args:
        first: (numbers,).
        second: (numbers,).
        seed: of drawn permutations, if there are too many to try all.
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


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, _PERCENT)
    return float(low), float(high)


@dataclass(frozen=True)
class Expected:
    """The range of one more untrained model, and how rarely one lies as far from their mean as the trained one.

    Args:
        low: 2.5 % of untrained models lie below, if seeds scatter normally.
        high: 2.5 % lie above.
        chance: fraction of untrained models that lie as far from the mean as the trained one, two-sided: the p-value.
        corrected: the same after Holm's correction over the rows of a table.
        below: how many of the untrained models lie below the trained one: its rank, which no distribution is assumed
            for.
    """

    low: float
    high: float
    chance: float
    corrected: float
    below: int


def expected(value: float, seeds: Sequence[float]) -> Expected | None:
    """Compare a model's number with those of untrained models: mean ± t(0.975, k - 1) sd sqrt(1 + 1 / k) over k seeds.

    Args:
        value: of the trained model.
        seeds: of k untrained models on the same images; fewer than two give None.
    """
    count = len(seeds)
    if count < 2:
        return None
    centre = float(np.mean(seeds))
    scatter = _scatter(seeds) * math.sqrt(1 + 1 / count)
    half = quantile(count - 1) * scatter
    chance = tail(abs(value - centre) / scatter, count - 1)
    return Expected(centre - half, centre + half, chance, chance, sum(each < value for each in seeds))


@dataclass(frozen=True)
class Effect:
    """What training does to a number, models being the units: the mean of trained models less that of untrained ones.

    Args:
        value: the difference.
        low: lower end of its interval of 95 %.
        high: upper end.
        chance: the two-sided p-value.
        corrected: the same after Holm's correction over the rows of a table.
        models: how many trained ones there are.
    """

    value: float
    low: float
    high: float
    chance: float
    corrected: float
    models: int


def effect(trained: Sequence[float], untrained: Sequence[float]) -> Effect | None:
    """Compare trained models, each of a seed of its own, with untrained ones, both as random draws.

    Student's t of the difference, each side with its own scatter as Welch (1947) has it, and the degrees of freedom of
    the smaller side: that errs in at most 5 % whatever the two scatters are (Mickey and Brown 1966), where Welch's own
    degrees err more often with two or three models.

    Args:
        trained: one number per trained model; fewer than two give None.
        untrained: one per untrained model; fewer than two give None.
    """
    if len(trained) < 2 or len(untrained) < 2:
        return None
    freedom = min(len(trained), len(untrained)) - 1
    scatter = math.sqrt(sum(_scatter(each) ** 2 / len(each) for each in (trained, untrained)))
    value = float(np.mean(trained) - np.mean(untrained))
    half, chance = quantile(freedom) * scatter, tail(abs(value) / scatter, freedom)
    return Effect(value, value - half, value + half, chance, chance, len(trained))


def _scatter(seeds: Sequence[float]) -> float:
    """Return the standard deviation of seeds, at least the rounding of float32."""
    return max(float(np.std(seeds, ddof=1)), _LEAST_SCATTER * max(1.0, abs(float(np.mean(seeds)))))


def tail(t: float, freedom: int) -> float:
    """Return the two-sided tail probability of Student's t: Abramowitz and Stegun 26.7.3, 26.7.4.

    Args:
        t: from 0 on.
        freedom: degrees of freedom, from 1 on.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for step in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * step / (step + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - inside))


@cache
def quantile(freedom: int, chance: float = LEVEL) -> float:
    """Return the two-sided quantile of Student's t for a given probability.

    Args:
        freedom: degrees of freedom, from 1 on.
        chance: the probability, both tails together.
    """
    low, high = 0.0, 1.0
    while tail(high, freedom) > chance:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > chance else (low, middle)
    return (low + high) / 2
