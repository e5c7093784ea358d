"""How many images at once, and in a part; whether the statistics fit into memory."""

from collections.abc import Sequence

import torch

from mamba_attn.analytics.index import StoredLayer
from mamba_attn.analytics.part_writer import route_names
from mamba_attn.errors import MatrixTooLargeError
from mamba_attn.ops import free_bytes

_BATCH_ENTRIES = 2**23  # of a batch of matrices, 32 MiB
_LARGEST_BATCH = 16
_SMALLEST_PART, _LARGEST_PART = 64, 1024  # images
_PART_ENTRIES = 2**30  # of the matrices of a part's largest layer, on a CPU
_RESERVE = 2**28  # bytes for the model, one image and everything else
_UNASKED = 2**26


def batch_size(layers: Sequence[StoredLayer]) -> int:
    """Return the batch size that the matrices of the largest layer allow.

    Args:
        layers: whose attention is collected.
    """
    largest = max(layer.tokens for layer in layers) ** 2
    return max(1, min(_LARGEST_BATCH, _BATCH_ENTRIES // largest))


def part_size(layers: Sequence[StoredLayer], wanted: int, device: torch.device) -> int:
    """Return the images of a part: few parts, whose statistics are written once each, and little that a kill loses.

    Args:
        layers: whose attention is collected.
        wanted: number of images.
        device: of the model; on a CPU parts of large matrices take minutes.
    """
    most = _LARGEST_PART
    if device.type == "cpu":
        most = max(_SMALLEST_PART, min(most, _PART_ENTRIES // max(layer.tokens for layer in layers) ** 2))
    eighth = -(-wanted // 8)
    return max(_SMALLEST_PART, min(most, -(-eighth // _LARGEST_BATCH) * _LARGEST_BATCH))


def require_memory(layers: Sequence[StoredLayer], routes: str, batch: int, device: torch.device | str = "cpu") -> None:
    """Refuse statistics that would not fit into memory, before allocating anything.

    Args:
        layers: whose attention is collected.
        routes: "each" or "sum".
        batch: images at once.
        device: of the model, where the statistics are too.

    Raises:
        MatrixTooLargeError: they would not fit; the message says what would.
    """
    needed = _bytes(layers, routes, batch)
    free = free_bytes(torch.device(device)) if needed > _UNASKED else None
    if free is None or needed + _RESERVE <= free:
        return
    free = max(0, free - _RESERVE)
    largest = max(layers, key=lambda layer: layer.tokens)
    raise MatrixTooLargeError(
        f"means and variances of {len(layers)} layers (the largest, {largest.name}: {largest.routes} routes, "
        f"{largest.tokens} x {largest.tokens}) need {needed:,} bytes, {free:,} are free. "
        f"{_what_fits(layers, routes, batch, free)}"
    )


def _bytes(layers: Sequence[StoredLayer], routes: str, batch: int) -> int:
    running = sum(
        len(route_names(layer, routes)) * 16 * layer.tokens**2
        + (0 if layer.moments is None else 16 * layer.moments[0] * layer.moments[1] * layer.moments[2])
        for layer in layers
    )
    projections = sum(8 * tokens**2 for tokens in {layer.tokens for layer in layers if not layer.exact})
    return running + projections + max(batch * 12 * layer.tokens**2 for layer in layers)


def _what_fits(layers: Sequence[StoredLayer], routes: str, batch: int, free: int) -> str:
    """Describe the nearest smaller calls that would fit."""
    found = []
    if batch > 1 and _bytes(layers, routes, 1) <= free:
        found.append("batch=1")
    if routes == "each" and _bytes(layers, "sum", batch) <= free:
        found.append("routes='sum'")
    for choice in dict.fromkeys((routes, "sum")):
        small = _fitting(layers, choice, free)
        if small:
            first = "batch=1 " + ("routes='sum' " if choice != routes else "")
            found.append(f"{first}layers={[layer.name for layer in small]}")
    rows = "Rows and columns take linear memory: trace(model), then layer.row(token), layer.column(token)."
    return f"What would fit: {'; or '.join(found)}. {rows}" if found else f"None of the layers would fit. {rows}"


def _fitting(layers: Sequence[StoredLayer], routes: str, free: int) -> list[StoredLayer]:
    """Return the smallest layers that fit together, in execution order; never all layers."""
    small: list[StoredLayer] = []
    for layer in sorted(layers, key=lambda layer: layer.tokens):
        if _bytes([*small, layer], routes, 1) > free:
            break
        small.append(layer)
    return [layer for layer in layers if layer in small] if len(small) < len(layers) else []
