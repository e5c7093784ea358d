"""How well points in the plane keep their neighbours; and whether t-SNE and UMAP need PCA before them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mamba_attn.analytics.embed import embed
from mamba_attn.analytics.projection import components

_CHUNK = 2**24  # numbers of one temporary


def ranked(features: np.ndarray, count: int | None = None) -> np.ndarray:
    """Return every point's nearest other points, nearest first; of equal distances the lower index is first.

    Args:
        features: (n, features).
        count: how many of them. Default: all n - 1.

    Returns:
        (n, count) indices.

    Raises:
        ValueError: not two axes, or fewer other points than asked for.
    """
    n = len(features)
    wanted = n - 1 if count is None else count
    if features.ndim != 2 or not 1 <= wanted <= n - 1:
        raise ValueError(f"ranked(features{features.shape}, count={count}): expected (n, features), count in 1..n - 1.")
    values = np.asarray(features, dtype=np.float64 if features.size <= 2**26 else np.float32)
    values = values - values.mean(0)  # distances of points that are far from zero would cancel
    squares = np.einsum("nf,nf->n", values, values)
    found = np.empty((n, wanted), dtype=np.int64)
    step = max(1, _CHUNK // n)
    for start in range(0, n, step):
        own = slice(start, start + step)
        distances = squares[own, None] + squares[None] - 2 * values[own] @ values.T
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = np.inf
        found[own] = np.argsort(distances, axis=1, kind="stable")[:, :wanted]
    return found


def trustworthiness(features: np.ndarray, points: np.ndarray, count: int = 12) -> float:
    """Return how far neighbours in the plane are neighbours among the features too; 1 is best (Venna and Kaski 2001).

    1 - 2 / (n k (2n - 3k - 1)) times the sum, over points and those of their k nearest in the plane that are not among
    the k nearest of the features, of their rank there less k.

    Args:
        features: (n, features).
        points: (n, 2).
        count: k, below n / 2.

    Raises:
        ValueError: arrays of different lengths, or a count that is not in 1..n / 2.
    """
    n = _pair("trustworthiness", features, points, count)
    if 2 * count >= n:
        raise ValueError(f"trustworthiness(count={count}): expected less than half of the {n} points.")
    order, near = ranked(features), ranked(points, count)
    rank = np.empty((n, n), dtype=np.int64)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(1, n), order.shape), axis=1)
    excess = np.maximum(np.take_along_axis(rank, near, axis=1) - count, 0)
    return float(1 - 2 / (n * count * (2 * n - 3 * count - 1)) * excess.sum())


def overlap(first: np.ndarray, second: np.ndarray, count: int = 12) -> float:
    """Return which part of the k nearest points two sets of features of the same points share, on average.

    Args:
        first: (n, features).
        second: (n, other features).
        count: k.

    Raises:
        ValueError: arrays of different lengths, or a count that is not in 1..n - 1.
    """
    _pair("overlap", first, second, count)
    return _shared(ranked(first, count), ranked(second, count))


@dataclass(frozen=True)
class PcaCheck:
    """With and without PCA before an embedding; all lists have one number per seed.

    Args:
        about: what was embedded, and how.
        kept: the part of the features' nearest neighbours that are nearest on the principal components too.
        explained: the part of the variance that the principal components have.
        trustworthiness: of the embeddings against the features, by "with" and "without".
        overlap: part of the features' nearest neighbours that are nearest in the plane, likewise.
        seconds: that the embeddings took, PCA included, likewise.
        alike: part of the nearest neighbours in the plane that the two embeddings of a seed share.
        seeds_alike: that embeddings without PCA of two seeds share: what chance alone changes.
    """

    about: dict[str, Any]
    kept: float
    explained: float
    trustworthiness: dict[str, list[float]]
    overlap: dict[str, list[float]]
    seconds: dict[str, list[float]]
    alike: list[float]
    seeds_alike: list[float]

    def gain(self, measure: str = "trustworthiness") -> tuple[float, float]:
        """Return what PCA adds to a measure, on average over seeds, and the largest deviation from that.

        Args:
            measure: "trustworthiness", "overlap" or "seconds".
        """
        values: dict[str, list[float]] = getattr(self, measure)
        difference = np.subtract(values["with"], values["without"])
        return float(difference.mean()), float(np.abs(difference - difference.mean()).max())

    @property
    def needed(self) -> bool:
        """Whether PCA makes the embeddings more trustworthy in every seed, and their overlap larger on average."""
        every = np.subtract(self.trustworthiness["with"], self.trustworthiness["without"])
        return bool((every > 0).all() and self.gain("overlap")[0] > 0)


def pca_check(
    features: np.ndarray,
    method: str = "tsne",
    *,
    first: int = 100,
    count: int = 12,
    seeds: Sequence[int] = (0, 1, 2),
    unit_norm: bool = False,
    **options: Any,
) -> PcaCheck:
    """Embed with and without PCA before it, and compare: is that step needed?

    Args:
        features: (n, features).
        method: "tsne" or "umap".
        first: principal components.
        count: neighbours that are looked at.
        seeds: at least two.
        unit_norm: as in ``embed``.
        **options: as in ``embed``.

    Raises:
        ValueError: PCA itself, fewer than two seeds, as many components as features or points; as ``embed``.
    """
    if method == "pca" or len(seeds) < 2:
        raise ValueError(f"pca_check(method={method!r}, seeds={tuple(seeds)}): expected 'tsne' or 'umap', two seeds.")
    if first >= min(features.shape):
        raise ValueError(
            f"pca_check(features{features.shape}, first={first}): there are no more than {min(features.shape)} "
            "components, so PCA changes nothing; name fewer."
        )
    made: dict[str, list[np.ndarray]] = {"with": [], "without": []}
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    about: dict[str, Any] = {}
    for seed in seeds:
        for name, number in (("with", first), ("without", None)):
            start = time.perf_counter()
            found = embed(features, method, first=number, unit_norm=unit_norm, seed=seed, **options)
            seconds[name].append(time.perf_counter() - start)
            made[name].append(found.points)
            about = found.about
    return _compared(features, made, seconds, count, first, {**about, "first": first, "seeds": list(seeds)})


def _compared(
    features: np.ndarray, made: dict[str, list[np.ndarray]], seconds: dict[str, list[float]], count: int, first: int,
    about: dict[str, Any],
) -> PcaCheck:  # fmt: skip
    values = np.asarray(features, dtype=np.float64)
    if about["unit_norm"]:
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        values = values / np.where(norms > 0, norms, 1)
    reduced = components(values, first)
    near, before = ranked(values, count), made["without"]
    return PcaCheck(
        about={**about, "count": count},
        kept=_shared(near, ranked(reduced.points, count)),
        explained=float(reduced.explained.sum()),
        trustworthiness={name: [trustworthiness(values, each, count) for each in them] for name, them in made.items()},
        overlap={name: [_shared(near, ranked(each, count)) for each in them] for name, them in made.items()},
        seconds=seconds,
        alike=[overlap(one, other, count) for one, other in zip(made["with"], before, strict=True)],
        seeds_alike=[overlap(before[0], other, count) for other in before[1:]],
    )


def _pair(call: str, first: np.ndarray, second: np.ndarray, count: int) -> int:
    if len(first) != len(second) or not 1 <= count < len(first):
        raise ValueError(
            f"{call}: {len(first)} and {len(second)} points and count={count}; expected the same points, and a count "
            "below their number."
        )
    return len(first)


def _shared(first: np.ndarray, second: np.ndarray) -> float:
    """Part of the indices that rows have in common."""
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(first, second, strict=True)]) / first.shape[1])
