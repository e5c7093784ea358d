"""Embeddings of features in the plane: PCA, t-SNE and UMAP, with seeds and an optional cache."""

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from mamba_attn.analytics.projection import components
from mamba_attn.errors import nearest

METHODS = ("pca", "tsne", "umap")
_HINT = "pip install 'mamba_attn[embed]'"
_DISTRIBUTIONS = {"pca": ("numpy",), "tsne": ("numpy", "scikit-learn"), "umap": ("numpy", "umap-learn")}


class Cache(Protocol):
    """Caches embeddings; implemented by stores of attention."""

    def embedding(self, key: str) -> Any:
        """Return (points, about) of a key; return None or raise KeyError if absent."""

    def save_embedding(self, key: str, array: np.ndarray, about: dict[str, Any]) -> None:
        """Save an embedding under a key."""


class Embedding(NamedTuple):
    """Points in the plane.

    Args:
        points: (n, 2) float32.
        about: how they were made, as JSON values.
    """

    points: np.ndarray
    about: dict[str, Any]


def embed(
    features: np.ndarray,
    method: str = "pca",
    *,
    first: int | None = 100,
    unit_norm: bool = False,
    seed: int = 0,
    cache: Cache | None = None,
    **options: Any,
) -> Embedding:
    """Lay features out in the plane; the same call gives the same points.

    Args:
        features: (n, features), any type of number.
        method: "pca"; "tsne" (scikit-learn; perplexity 30, or less where there are few points); "umap" (umap-learn).
        first: principal components that t-SNE and UMAP get instead of the features, as in arXiv 2502.20764; None
            for the features themselves. No effect on "pca", or if there are fewer.
        unit_norm: divide every point's features by their Euclidean norm first.
        seed: of whatever is random.
        cache: read before computing, written afterwards; the key includes a hash of the features.
        **options: of sklearn.manifold.TSNE or umap.UMAP, e.g. ``perplexity=50`` or ``n_neighbors=30``.

    Raises:
        ValueError: an unknown method, an option for PCA, fewer than two points, NaN or Inf, ``first`` below two.
        ImportError: the method's package is not installed.

    Example:
        >>> embed(np.random.default_rng(0).random((20, 7))).points.shape
        (20, 2)
    """
    _check(features, method, first, options)
    about: dict[str, Any] = {
        "method": method,
        "first": first if method != "pca" else None,
        "unit_norm": unit_norm,
        "seed": seed,
        "options": options,
        "n": len(features),
        "features": features.shape[1],
        "versions": {name: _version(name, method) for name in _DISTRIBUTIONS[method]},
    }
    key = cache_key(features, about) if cache is not None else ""
    known = None if cache is None else _known(cache, key)
    if known is not None:
        return known
    values = _unit(features) if unit_norm else features
    points, made = _METHODS[method](_reduced(values, method, first, seed), seed, options)
    if not np.isfinite(points).all():
        raise ValueError(f"embed(method={method!r}): it returned NaN or Inf for these features{features.shape}.")
    found = Embedding(points.astype(np.float32), {**about, **made})
    if cache is not None:
        cache.save_embedding(key, *found)
    return found


def cache_key(features: np.ndarray, about: Mapping[str, Any]) -> str:
    """Return the cache key of an embedding: a hash of the features and of how it is made.

    Args:
        features: (n, features).
        about: the call's parameters, as JSON values.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    digest.update(str((features.dtype.str, features.shape)).encode())
    for start in range(0, len(features), 256):
        digest.update(np.ascontiguousarray(features[start : start + 256]).tobytes())
    return f"{about['method']}-{digest.hexdigest()[:24]}"


def _check(features: np.ndarray, method: str, first: int | None, options: Mapping[str, Any]) -> None:
    if method not in METHODS:
        raise ValueError(f"embed(method={method!r}): no such method. {nearest(method, METHODS)}")
    call = f"embed(features{features.shape}, method={method!r})"
    if features.ndim != 2 or features.shape[0] < 2 or not features.shape[1]:
        raise ValueError(f"{call}: expected (n, features) with at least two points.")
    if first is not None and first < 2:
        raise ValueError(f"{call}: first={first} principal components do not span a plane; pass at least 2, or None.")
    if method == "pca" and options:
        raise ValueError(f"{call}: PCA has no options, got {', '.join(options)}.")
    for start in range(0, len(features), 256):
        if not np.isfinite(np.asarray(features[start : start + 256], dtype=np.float64)).all():
            raise ValueError(f"{call}: the features contain NaN or Inf; leave these points out.")


def _known(cache: Cache, key: str) -> Embedding | None:
    try:
        found = cache.embedding(key)
    except KeyError:
        return None
    if found is None:
        return None
    points, about = found
    return Embedding(np.asarray(points), dict(about))


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of norm one; zeros stay zeros."""
    values = np.asarray(features, dtype=np.float64 if features.dtype == np.float64 else np.float32)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    unit: np.ndarray = values / np.where(norms > 0, norms, 1)
    return unit


def _reduced(features: np.ndarray, method: str, first: int | None, seed: int) -> np.ndarray:
    """Return the method's input: the features, or their principal components."""
    if method == "pca":
        return features
    if first is None or first >= min(features.shape):
        return np.asarray(features, dtype=np.float32)
    return components(features, first, seed).points.astype(np.float32)


def _pca(features: np.ndarray, seed: int, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    found = components(features, 2, seed)
    return found.points, {"explained": [float(share) for share in found.explained], "exact": found.exact}


def _tsne(features: np.ndarray, seed: int, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError(f"embed(method='tsne') needs scikit-learn: {_HINT}") from error
    perplexity = options.get("perplexity", min(30.0, (len(features) - 1) / 3))
    start = components(features, 2, seed).points  # signs are fixed there, so that machines agree
    start = start / (start[:, 0].std() or 1.0) + 0.1 * np.random.default_rng(seed).standard_normal(start.shape)
    start *= 1e-4  # without this noise, all seeds would give the same points
    given = {"init": start.astype(np.float32), **options, "perplexity": perplexity, "random_state": seed}
    made = TSNE(2, n_jobs=1, **given)
    with threadpool_limits(1, user_api="openmp"):  # after UMAP there are several threads, which spin while they wait
        points = made.fit_transform(features)
    return points, {"perplexity": float(perplexity), "divergence": float(made.kl_divergence_)}


def _umap(features: np.ndarray, seed: int, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # about its missing optional parts
            import umap
    except ImportError as error:
        raise ImportError(f"embed(method='umap') needs umap-learn: {_HINT}") from error
    neighbours = options.get("n_neighbors", min(15, len(features) - 1))
    start = components(features, 2, seed).points  # the spectral start depends on an iterative solver
    start = start / (np.abs(start).max() or 1.0) * 10
    given = {"init": start.astype(np.float32), **options, "n_neighbors": neighbours, "random_state": seed}
    made = umap.UMAP(n_components=2, n_jobs=1, **given)
    return np.asarray(made.fit_transform(features)), {"n_neighbors": int(neighbours)}


def _version(distribution: str, method: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"embed(method={method!r}) needs {distribution}: {_HINT}") from error


_METHODS = {"pca": _pca, "tsne": _tsne, "umap": _umap}
