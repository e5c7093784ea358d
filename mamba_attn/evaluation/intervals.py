"""Bootstrap intervals of a figure, and whether one method is significantly ahead of another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.05  # of a verdict, after Holm's correction


@dataclass(frozen=True)
class Interval:
    """A figure over a sample of images, and how far resampling the images moves it (percentiles of a bootstrap).

    Example:
        >>> Interval(0.3, 0.1, (0.25, 0.35), 0.5).clear
        True
    """

    value: float
    low: float  # 2.5 %
    quartiles: tuple[float, float]
    high: float  # 97.5 %

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Interval:
    """Resample the images with replacement, the same ones in every sample.

    Args:
        statistic: of samples with any leading axes, over the last one.
        samples: (images,) each.
        seed: of the resampling.

    Example:
        >>> found = bootstrap(mean, np.arange(100.0))
        >>> found.value, found.low < 49.5 < found.high
        (49.5, True)
    """
    count = len(samples[0])
    chosen = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    return interval(float(statistic(*samples)), statistic(*(sample[chosen] for sample in samples)))


def interval(value: float, drawn: np.ndarray) -> Interval:
    """Return a figure and the percentiles of its resampled values.

    Args:
        value: on the sample itself.
        drawn: (draws,); non-finite ones, such as a ratio to an accuracy of 0, are ignored.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(float(value), np.nan, (np.nan, np.nan), np.nan)
    low, first, third, high = np.percentile(drawn, [2.5, 25, 75, 97.5])
    return Interval(float(value), float(low), (float(first), float(third)), float(high))


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, which bounds the family-wise error (Holm 1979).

    Args:
        chances: the p-values of one table.
    """
    found = [1.0] * len(chances)
    largest = 0.0
    for place, at in enumerate(sorted(range(len(chances)), key=lambda at: chances[at])):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[at]))
        found[at] = largest
    return found


def mean(sample: np.ndarray) -> np.ndarray:
    """Return the mean over images, the last axis."""
    return np.asarray(sample.mean(-1))


def ratio_of_means(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the ratio of two means over images."""
    return np.asarray(numerator.mean(-1) / denominator.mean(-1))


def drawn_counts(units: int, seed: int = 0) -> np.ndarray:
    """Return how often each unit is in every resample, (draws, units).

    Args:
        units: images, or groups of images.
        seed: of the resampling.
    """
    chosen = np.random.default_rng(seed).integers(0, units, (DRAWS, units))
    counts = np.zeros((DRAWS, units))
    np.add.at(counts, (np.arange(DRAWS)[:, None], chosen), 1)
    return counts


class Resampler:
    """Resampled means of columns, for many methods on the same images.

    Args:
        images: number of images.
        seed: of the resampling; all methods share the draws, so their differences are paired.
    """

    def __init__(self, images: int, seed: int = 0) -> None:
        self._counts = np.concatenate([np.ones((1, images)), drawn_counts(images, seed)])  # the sample itself first

    def means(self, columns: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Return the columns' means over the sample, then over every draw: (1 + draws, columns).

        Args:
            columns: (images, columns).
            valid: (images,) bool; other images are dropped from every draw.
        """
        weights = self._counts[:, valid]
        # a draw without a valid image repeats the sample
        total = weights.sum(1, keepdims=True)
        weights = np.where(total > 0, weights, weights[:1])
        return np.asarray(weights @ columns[valid] / weights.sum(1, keepdims=True))
