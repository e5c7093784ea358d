"""How well points in the plane keep their neighbours; and whether t-SNE and UMAP need PCA before them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from mamba_attn.analytics.embed import embed
from mamba_attn.analytics.projection import components


def ranked(features: np.ndarray, count: int) -> np.ndarray:
    """Indices of every point's ``count`` nearest other points, nearest first, (n, count)."""
    found: np.ndarray = NearestNeighbors(n_neighbors=count).fit(features).kneighbors(return_distance=False)
    return found


def overlap(first: np.ndarray, second: np.ndarray, count: int = 12) -> float:
    """Which part of the ``count`` nearest points two sets of features of the same points share, on average."""
    return _shared(ranked(first, count), ranked(second, count))


@dataclass(frozen=True)
class PcaCheck:
    """With and without PCA before an embedding; all lists have one number per seed.

    Args:
        about: what was embedded, and how.
        kept: the part of the features' nearest neighbours that are nearest on the principal components too.
        explained: the part of the variance that the principal components have.
        trustworthiness: how far neighbours in the plane are neighbours among the features too, 1 at best (Venna and
            Kaski 2001); by "with" and "without".
        overlap: part of the features' nearest neighbours that are nearest in the plane, by the same names.
        seconds: that the embeddings took, PCA included, by the same names.
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
            "components, so PCA changes nothing; choose fewer."
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
    features: np.ndarray,
    made: dict[str, list[np.ndarray]],
    seconds: dict[str, list[float]],
    count: int,
    first: int,
    about: dict[str, Any],
) -> PcaCheck:
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
        trustworthiness={
            name: [float(trustworthiness(values, each, n_neighbors=count)) for each in them]
            for name, them in made.items()
        },
        overlap={name: [_shared(near, ranked(each, count)) for each in them] for name, them in made.items()},
        seconds=seconds,
        alike=[overlap(one, other, count) for one, other in zip(made["with"], before, strict=True)],
        seeds_alike=[overlap(before[0], other, count) for other in before[1:]],
    )


def _shared(first: np.ndarray, second: np.ndarray) -> float:
    """Part of the indices that rows have in common."""
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(first, second, strict=True)]) / first.shape[1])
