"""Bootstrap intervals of a figure, and whether one method is significantly ahead of another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.05  # of a verdict, after Holm's correction
_BLOCK = 2**20  # numbers of the draws that are looked at together: 8 MB as float64
_KEPT = 2**27  # bytes of counts that are kept between calls; of more images they are drawn again


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
    drawn = [statistic(*(sample[chosen] for sample in samples)) for chosen in _draws(len(samples[0]), seed)]
    return interval(float(statistic(*samples)), np.concatenate(drawn))


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


def _draws(units: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the units of every resample, (draws, units), some draws at a time: the same numbers as all at once."""
    random, rows = np.random.default_rng(seed), max(1, _BLOCK // max(1, units))
    for start in range(0, DRAWS, rows):
        yield random.integers(0, units, (min(rows, DRAWS - start), units))


def drawn_counts(units: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield how often each unit is in every resample, (draws, units), some draws at a time.

    Args:
        units: images, or groups of images.
        seed: of the resampling.
    """
    for chosen in _draws(units, seed):
        flat = (chosen + np.arange(len(chosen))[:, None] * units).ravel()
        yield np.bincount(flat, minlength=len(chosen) * units).reshape(len(chosen), units)


class Resampler:
    """Resampled means of columns, for many methods on the same images, in memory that images hardly enlarge.

    Args:
        images: number of images.
        seed: of the resampling; all methods share the draws, so their differences are paired.
    """

    def __init__(self, images: int, seed: int = 0) -> None:
        self._images, self._seed = images, seed
        self._kept = [*self._weights()] if DRAWS * images <= _KEPT else None

    def means(self, columns: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Return the columns' means over the sample, then over every draw: (1 + draws, columns).

        Args:
            columns: (images, columns).
            valid: (images,) bool; other images are dropped from every draw.
        """
        chosen, found = slice(None) if valid.all() else valid, []
        columns = columns[chosen]
        for counts in self._weights() if self._kept is None else self._kept:
            weights = counts[:, chosen].astype(np.float64)
            total = weights.sum(1, keepdims=True)
            weights = np.where(total > 0, weights, 1.0)  # a draw without a valid image repeats the sample
            found.append(weights @ columns / weights.sum(1, keepdims=True))
        return np.concatenate(found)

    def _weights(self) -> Iterator[np.ndarray]:
        """Yield the sample itself and all draws, in the fewest bytes: hardly any image is drawn more than ten times."""
        before = np.ones((1, self._images), np.uint8)
        for counts in drawn_counts(self._images, self._seed):
            yield np.concatenate([before, counts.astype(np.min_scalar_type(int(counts.max(initial=0))))])
            before = before[:0]
