"""What a row needs before it is run: bytes, for the memory there is, and work, for the time there is.

Rough and rather too small than too large: a row is left out where it surely does not fit; the rest is tried.
"""

import dataclasses
import math

from benchmarks.kernel import counting
from benchmarks.kernel.counting import FORMULATIONS, Scans, Work
from benchmarks.kernel.subjects import TRANSFORMERS, Model

_BLOCK = 2**24 * 4 * 4  # bytes of the blocked path's temporaries


def attention_work(model: Model, batch: int, once: bool = False) -> Work:
    """Return the work of the attention, none for a transformer, in the factored form.

    Args:
        model: the model at its size and type.
        batch: number of images.
        once: of one layer per shape instead of all.
    """
    scans = _one_layer_each(model) if once else model.scans
    return counting.total(counting.attention_work(each, batch, FORMULATIONS[1], model.its.itemsize) for each in scans)


def forward_work(model: Model, batch: int) -> Work:
    """Return the matrix products of a forward pass: two operations per token and entry of a layer's projections."""
    if model.transformer:
        return Work(0, 2 * model.parameters * batch * _transformer_tokens(model), 0, 0)
    steps = sum(each.layers * each.length * each.channels**2 for each in model.scans)
    return Work(0, 2 * batch * steps, 0, 0)


def scan_work(model: Model, batch: int) -> Work:
    """Return the work of the scan of one layer per shape, without attention."""
    scans = _one_layer_each(model)
    steps = batch * sum(each.width * each.length for each in scans)
    moved = sum(_inputs(each, batch) for each in scans)
    return Work(steps, 6 * steps, moved, moved // 2)


def formula_work(model: Model, batch: int) -> Work:
    """Return the work of VMamba's formula, one layer per shape: a product per channel, each written and read."""
    scans = _one_layer_each(model)
    flops = 2 * batch * sum(each.width * each.length**2 for each in scans)
    entries = sum(batch * each.routes * each.channels * each.length**2 for each in scans)
    return Work(0, flops, 4 * entries, 4 * entries)


def forward_bytes(model: Model, batch: int) -> int:
    """Return the bytes of weights, images, and a dozen tensors of the widest layer."""
    widest = max((each.routes * each.length * each.channels for each in model.scans), default=0)
    if model.transformer:
        widest = _transformer_tokens(model) * TRANSFORMERS[model.its.model][0]
    return model.its.itemsize * (model.parameters + batch * (3 * model.its.pixels**2 + 12 * widest))


def kept_bytes(model: Model, batch: int) -> int:
    """Return the bytes of the matrices of all layers, which a trace keeps; of a transformer those of all heads."""
    if model.transformer:
        features, layers = TRANSFORMERS[model.its.model]
        return layers * batch * features // 64 * model.its.itemsize * _transformer_tokens(model) ** 2
    return sum(each.layers * batch * 4 * each.length**2 for each in model.scans)


def matrix_bytes(model: Model, batch: int) -> int:
    """Return the bytes of one layer's matrix and its inputs, each twice, and of temporaries."""
    return max((2 * 4 * batch * each.length**2 + 2 * _inputs(each, batch) for each in model.scans), default=0) + _BLOCK


def scan_bytes(model: Model, batch: int) -> int:
    """Return the bytes of one layer's inputs, three times, and of the states at the boundaries of blocks."""
    return max(
        3 * _inputs(each, batch) + 4 * 4 * batch * each.routes * each.channels * each.states * math.isqrt(each.length)
        for each in model.scans
    )


def formula_bytes(model: Model, batch: int) -> int:
    """Return the bytes of VMamba's formula for one route of one layer."""
    return max(4 * batch * each.channels * (each.length**2 + 3 * each.states * each.length) for each in model.scans)


def loop_bytes(model: Model, batch: int) -> int:
    """Return the bytes of the published loops for one route of one layer, were all its rows computed."""
    return max(4 * batch * each.channels * (each.length**2 + 2 * each.length * each.states) for each in model.scans)


def shown(count: float) -> str:
    """Return a number of bytes for people.

    Args:
        count: bytes.
    """
    unit = min(int(math.log10(max(count, 1)) // 3), 4)
    return f"{count / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"


def _one_layer_each(model: Model) -> list[Scans]:
    return [dataclasses.replace(each, layers=1) for each in model.scans]


def _inputs(scans: Scans, batch: int) -> int:
    return 4 * batch * scans.routes * scans.length * 2 * (scans.channels + scans.states)


def _transformer_tokens(model: Model) -> int:
    return (model.its.pixels // 16) ** 2 + 1
