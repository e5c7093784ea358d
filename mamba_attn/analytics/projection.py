"""Dimension reduction: a fixed random projection that keeps distances, and principal components.

Features of a whole attention matrix are the matrix itself while it is small, else the sparse Johnson-Lindenstrauss
transform (Kane and Nelson, J. ACM 61(1), 2014, the block construction): every entry of a matrix is added, with a random
sign, to one number of each of four blocks. The variance of a squared distance is at most 2 / 4096 of its square, so
distances are off by 1.1 % typically. Where an entry goes is a fixed function of its place (splitmix64, Steele et al.,
OOPSLA 2014): the same in every run and version.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from mamba_attn._types import Float

EXACT = 2**18  # entries of the largest matrix that is kept as it is
SIZE = 4096
_BLOCKS = 4
_SEED = 0x6D616D6261
_AT_ONCE = 2**18  # entries whose places are spelt out as 64-bit integers
_DIAGONALISED = 3000  # the smaller side up to which a symmetric matrix is diagonalised
_CHUNK = 2**24  # numbers of one temporary
_EXTRA, _ROUNDS = 20, 6  # of the approximation: directions beyond those asked for, power iterations
_NOISE = 1e-7  # of the largest singular value; squares of smaller ones are below the precision of float64


def feature_size(tokens: int) -> int:
    """Return the number of features of a matrix.

    Args:
        tokens: its side.
    """
    return tokens * tokens if tokens * tokens <= EXACT else SIZE


def project(matrix: Float[np.ndarray, "tokens tokens"]) -> Float[np.ndarray, " features"]:
    """Return the random projection of a matrix to 4,096 numbers, float32; distances are kept within a few percent.

    Args:
        matrix: of any size.
    """
    values = np.ascontiguousarray(matrix).reshape(-1)
    places = _places(values.size)
    block = SIZE // _BLOCKS
    result = np.zeros((_BLOCKS, 2 * block))
    for start in range(0, values.size, _AT_ONCE):
        part = values[start : start + _AT_ONCE].astype(np.float64)
        for own, bins in zip(result, places[:, start : start + _AT_ONCE], strict=True):
            own += np.bincount(bins, weights=part, minlength=2 * block)
    signed = result[:, :block] - result[:, block:]  # a bin for each sign
    return np.asarray(signed.reshape(-1) / np.sqrt(_BLOCKS), dtype=np.float32)


def project_all(matrices: Float[torch.Tensor, "images tokens tokens"]) -> Float[np.ndarray, "images features"]:
    """Return the random projection of every matrix, computed where it is; on a CPU that of ``project``.

    Elsewhere the entries of each bin are gathered and summed in a fixed order: additions into the bins by many threads
    at once would come in another order, and give other last digits, every time.

    Args:
        matrices: of any size, on any device.
    """
    if matrices.device.type == "cpu":
        return np.stack([project(matrix) for matrix in matrices.numpy()])
    return np.stack([project_gathered(matrix).cpu().numpy() for matrix in matrices])


def project_gathered(matrix: Float[torch.Tensor, "tokens tokens"]) -> Float[torch.Tensor, " features"]:
    """Return the projection of a matrix as ``project`` does, by gathering: the same sums on any device.

    Args:
        matrix: of any size.
    """
    values = torch.cat([matrix.reshape(-1), matrix.new_zeros(1)])  # the last entry fills bins that are not full
    sums = [values[its].double().sum(1) for its in _entries(matrix.numel(), matrix.device)]
    block = SIZE // _BLOCKS
    signed = torch.stack([each[:block] - each[block:] for each in sums])
    projected: torch.Tensor = signed.reshape(-1) / _BLOCKS**0.5
    return projected.float()


@lru_cache(maxsize=4)
def _entries(entries: int, device: torch.device) -> list[torch.Tensor]:
    """(bins, most entries of a bin) for each block: the entries of every bin; ``entries`` itself stands for none."""
    bins, found = 2 * SIZE // _BLOCKS, []
    for block in _places(entries):
        order = np.argsort(block, kind="stable")
        counts = np.bincount(block, minlength=bins)
        table = np.full((bins, int(counts.max())), entries, np.int32)
        own = np.arange(entries) - np.repeat(np.cumsum(counts) - counts, counts)
        table[block[order], own] = order
        found.append(torch.from_numpy(table).to(device))
    return found


def power_of_two(largest: float) -> float:
    """Return the power of two that scales numbers for float16: the largest becomes 0.5 to 1.

    Args:
        largest: of their absolute values.
    """
    return 1.0 if largest <= 0 else float(2.0 ** -np.frexp(largest)[1])


@lru_cache(maxsize=4)
def _places(entries: int) -> np.ndarray:
    """(blocks, entries) bin of every entry in each block: 11 bits of its hash each, the highest of them the sign."""
    bins = 2 * SIZE // _BLOCKS
    places = np.empty((_BLOCKS, entries), np.uint16)
    for start in range(0, entries, _AT_ONCE):
        stop = min(start + _AT_ONCE, entries)
        hashed = _splitmix64(np.arange(start, stop, dtype=np.uint64))
        for block in range(_BLOCKS):
            places[block, start:stop] = (hashed >> np.uint64(16 * block)) & np.uint64(bins - 1)
    return places


def _splitmix64(counter: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = np.uint64(_SEED) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


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
    Components that do not exist, or have no variance, are zeros.

    Args:
        features: (n, features), any type of number.
        count: how many components.
        seed: of the approximation.

    Raises:
        ValueError: not two axes, no points, NaN or Inf, or count < 1.

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
        raise ValueError(f"components(features{features.shape}): the features contain NaN or Inf.")
    exact = min(n, size) <= _DIAGONALISED
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
    """Yield centred features in float64, a few columns at a time."""
    n, size = features.shape
    width = max(1, _CHUNK // n)
    for start in range(0, size, width):
        own = slice(start, start + width)
        chunk = np.asarray(features[:, own], dtype=np.float64)
        yield own, chunk - chunk.mean(0)
