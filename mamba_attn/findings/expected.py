"""The range in which one more untrained model is expected: Student's prediction interval over random seeds.

The question is whether one trained model could be one of the untrained ones, so that their scatter counts and not how
well their mean is known. All models see the same images: what the choice of images adds to every model cancels, and
what it adds to each apart is part of the seeds' scatter already. The bootstrap over images is therefore not added.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.05  # of a verdict, after the correction
_ROUNDING = 1e-6  # of the size of a number: what float32 alone makes of seeds that do not differ


@dataclass(frozen=True)
class Expected:
    """Where one more untrained model is expected, and how rarely one lies as far from their mean as the trained one.

    Args:
        low: 2.5 % of untrained models lie below, if seeds scatter normally.
        high: 2.5 % lie above.
        chance: which part of untrained models lies as far from the mean as the trained one, either way: the p-value.
        corrected: the same after Holm's correction over the rows of a table.
    """

    low: float
    high: float
    chance: float
    corrected: float


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
    scatter = max(float(np.std(seeds, ddof=1)), _ROUNDING * max(1.0, abs(centre))) * math.sqrt(1 + 1 / count)
    half = quantile(count - 1) * scatter
    chance = tail(abs(value - centre) / scatter, count - 1)
    return Expected(centre - half, centre + half, chance, chance)


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, so that all errors together are bounded (Holm 1979).

    Args:
        chances: the p-values of one table.
    """
    found = [1.0] * len(chances)
    largest = 0.0
    for place, at in enumerate(sorted(range(len(chances)), key=lambda at: chances[at])):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[at]))
        found[at] = largest
    return found


def tail(t: float, freedom: int) -> float:
    """Return the probability that Student's t lies as far from 0, either way: Abramowitz and Stegun 26.7.3, 26.7.4.

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
    """Return the t that Student's t exceeds, either way, with a given probability.

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
