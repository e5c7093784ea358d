"""Principal components of (n, features): exact where one side is small, else seeded and approximate; fixed signs."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_EXACT = 3000  # the smaller side up to which a symmetric matrix is diagonalised
_CHUNK = 2**24  # numbers of one temporary
_EXTRA, _ROUNDS = 20, 6  # of the approximation: directions beyond those asked for, power iterations
_NOISE = 1e-7  # of the largest singular value; squares of smaller ones are below the precision of float64


class Components(NamedTuple):
    """Points on principal components.

    Args:
        points: (n, components) float64, centred; of every column the entry of largest size is positive.
        explained: (components,), the share of the variance that each one has.
        exact: False where it is an approximation.
    """

    points: np.ndarray
    explained: np.ndarray
    exact: bool


def components(features: np.ndarray, count: int = 2, seed: int = 0) -> Components:
    """Return (n, features) on their first principal components.

    The covariance, or the matrix of inner products where that is smaller, is diagonalised in float64; features are read
    in chunks. Where both sides exceed 3,000 a randomised range finder (arXiv 0909.4061, algorithm 4.4) stands in.
    Components that are not there, or have no variance, are zeros.

    Args:
        features: (n, features), any type of number.
        count: how many components.
        seed: of the approximation.

    Raises:
        ValueError: not two axes, no points, NaN or Inf, or no components asked for.

    Example:
        >>> components(np.eye(5), 3).points.shape
        (5, 3)
    """
    if features.ndim != 2 or 0 in features.shape or count < 1:
        raise ValueError(
            f"components(features{features.shape}, count={count}): expected (n, features) and a count, all at least 1."
        )
    n, size = features.shape
    total = 0.0
    for _, chunk in _centred(features):
        total += float((chunk**2).sum())
    if not np.isfinite(total):
        raise ValueError(f"components(features{features.shape}): there are NaN or Inf among the features.")
    exact = min(n, size) <= _EXACT
    if not exact:
        points, squares = _randomised(features, count, seed)
    elif size < n:
        points, squares = _by_covariance(features)
    else:
        points, squares = _by_inner_products(features)
    return _signed(points, squares, count, total, exact)


def _signed(points: np.ndarray, squares: np.ndarray, count: int, total: float, exact: bool) -> Components:
    """The first components, largest first."""
    order = np.argsort(-squares, kind="stable")[:count]
    squares = squares[order]
    real = squares > _NOISE**2 * max(squares.max(), np.finfo(float).tiny)
    shown, explained = np.zeros((len(points), count)), np.zeros(count)
    shown[:, : len(order)] = np.where(real, points[:, order], 0.0)
    explained[: len(order)] = np.where(real, squares, 0.0) / (total or 1.0)
    largest = np.abs(shown).argmax(0)
    shown *= np.where(shown[largest, np.arange(count)] < 0, -1.0, 1.0)
    return Components(shown, explained, exact)


def _by_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centred = np.concatenate([chunk for _, chunk in _centred(features)], axis=1)
    squares, axes = np.linalg.eigh(centred.T @ centred)
    return centred @ axes, np.maximum(squares, 0)


def _by_inner_products(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inner = np.zeros((len(features), len(features)))
    for _, chunk in _centred(features):
        inner += chunk @ chunk.T
    squares, left = np.linalg.eigh(inner)
    squares = np.maximum(squares, 0)
    return left * np.sqrt(squares), squares


def _randomised(features: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    width = min(count + _EXTRA, *features.shape)
    axes = np.random.default_rng(seed).standard_normal((features.shape[1], width))
    for _ in range(_ROUNDS):
        axes = np.linalg.qr(_transposed_times(features, np.linalg.qr(_times(features, axes))[0]))[0]
    left = np.linalg.qr(_times(features, axes))[0]
    inside = _transposed_times(features, left)
    squares, turned = np.linalg.eigh(inside.T @ inside)
    squares = np.maximum(squares, 0)
    return left @ turned * np.sqrt(squares), squares


def _times(features: np.ndarray, axes: np.ndarray) -> np.ndarray:
    product = np.zeros((len(features), axes.shape[1]))
    for own, chunk in _centred(features):
        product += chunk @ axes[own]
    return product


def _transposed_times(features: np.ndarray, left: np.ndarray) -> np.ndarray:
    return np.concatenate([chunk.T @ left for _, chunk in _centred(features)])


def _centred(features: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some features at a time, float64, less their means."""
    n, size = features.shape
    width = max(1, _CHUNK // n)
    for start in range(0, size, width):
        own = slice(start, start + width)
        chunk = np.asarray(features[:, own], dtype=np.float64)
        yield own, chunk - chunk.mean(0)
