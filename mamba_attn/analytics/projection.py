"""Features of whole attention matrices: exact while they are small, else a random projection that keeps distances.

The projection is the sparse Johnson-Lindenstrauss transform (Kane and Nelson, J. ACM 61(1), 2014, the block
construction): every entry of a matrix is added, with a random sign, to one number of each of four blocks. The variance
of a squared distance is at most 2 / 4096 of its square, so distances are off by 1.1 % typically. Where an entry goes
is a fixed function of its place (splitmix64, Steele et al., OOPSLA 2014): the same in every run and version.
"""

from functools import lru_cache

import numpy as np

from mamba_attn._types import Float

EXACT = 2**18  # entries of the largest matrix that is kept as it is
SIZE = 4096
_BLOCKS = 4
_SEED = 0x6D616D6261
_AT_ONCE = 2**18  # entries whose places are spelt out as 64-bit integers


def feature_size(tokens: int) -> int:
    """Numbers that stand for a matrix.

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


def power_of_two(largest: float) -> float:
    """Return what numbers are multiplied with so that float16 holds them well: the largest becomes 0.5 to 1.

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
