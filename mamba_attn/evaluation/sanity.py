"""Sanity: a map should change with the model's weights and with the class, and stay the same when nothing changes.

Cascading randomisation after Adebayo et al., NeurIPS 2018: weights are destroyed from the last block to the first, and
the map is compared with the trained model's by Spearman's rank correlation over the token grid. Deviation: a tensor's
entries are permuted, not redrawn, which keeps the range of any model's parameters and avoids numerical trouble.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core import ranks

_HEADS = ("head", "classifier", "fc")
Explain = Callable[[nn.Module], Tensor]  # a model's maps of some images, (batch, rows, columns)


def spearman(
    first: Float[Tensor, "batch rows columns"], second: Float[Tensor, "batch rows columns"]
) -> list[float | None]:
    """Return Spearman's rank correlation of pairs of maps; None if either is constant.

    Args:
        first: one map per image.
        second: one map per image.

    Example:
        >>> first = torch.arange(4.0).view(1, 2, 2)
        >>> spearman(first, first**3), spearman(first, torch.zeros(1, 2, 2))
        ([1.0], [None])
    """
    pairs = zip(first.double().flatten(1).cpu().numpy(), second.double().flatten(1).cpu().numpy(), strict=True)
    found = [ranks.spearman(a, b) for a, b in pairs]
    return [None if math.isnan(each) else each for each in found]


def blocks(model: nn.Module) -> list[list[str]]:
    """Return groups of names of a model's parameters to randomise together, last block first.

    A block follows from the numbers in the parameters' names (``layers.11``, ``layers.2.blocks.0``), or is the first
    part of a name without one. Blocks are in the order of their definition, except heads, which come last.

    Args:
        model: any.
    """
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(_block(name), []).append(name)
    heads = [group for group in groups if group.startswith(_HEADS)]
    return [groups[group] for group in [*(group for group in groups if group not in heads), *heads][::-1]]


def cascade(model: nn.Module, stages: int | None = None, seed: int = 0) -> Iterator[nn.Module]:
    """Yield a copy of the model with more and more blocks randomised, last to first; the model itself does not change.

    Args:
        model: any.
        stages: how many, evenly spaced; the last one randomises everything. Default: one per block.
        seed: of the permutations.

    Example:
        >>> [bool((changed.head.weight == model.head.weight).all()) for changed in cascade(model, stages=2)]
        [False, False]
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    parameters, order = dict(changed.named_parameters()), blocks(model)
    count = min(stages or len(order), len(order))
    ends = [round(len(order) * (stage + 1) / count) for stage in range(count)]
    for start, end in zip([0, *ends], ends, strict=False):
        for name in (name for group in order[start:end] for name in group):
            values = parameters[name].data
            shuffled = torch.randperm(values.numel(), generator=generator).to(values.device)
            parameters[name].data = values.flatten()[shuffled].view_as(values)
        yield changed


def randomisation(
    model: nn.Module,
    explain: Explain,
    original: Float[Tensor, "batch rows columns"],
    stages: int | None = None,
    seed: int = 0,
) -> list[list[float | None]]:
    """Return per image the maps' correlation with the trained model's, at every stage of the cascade.

    If it stays near 1, the method looks at the image and not at the model.

    Args:
        model: trained.
        explain: maps of the same images, for the same classes, by another model.
        original: maps by the trained model.
        stages: as in ``cascade``.
        seed: as in ``cascade``.

    Example:
        >>> original = torch.rand(2, 4, 4)
        >>> randomisation(model, lambda changed: original, original, stages=2)  # a method that never looks at the model
        [[1.0, 1.0], [1.0, 1.0]]
    """
    found = [spearman(original, explain(changed)) for changed in cascade(model, stages, seed)]
    return [list(each) for each in zip(*found, strict=True)]


def difference(first: Float[Tensor, "batch rows columns"], second: Float[Tensor, "batch rows columns"]) -> list[float]:
    """Return the largest difference of two maps over the largest value of the first, per image: 0 if repeatable.

    Args:
        first: one map per image.
        second: one map per image.
    """
    apart = (first.double() - second.double()).abs().flatten(1).amax(1)
    scale = first.double().abs().flatten(1).amax(1)
    return [float(each) for each in apart / torch.where(scale > 0, scale, 1)]


def _block(name: str) -> str:
    """Return the name up to its last number, else its first part."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    inner = [index for index in numbers if index <= 3]  # deeper ones number the parts of a block
    return ".".join(parts[: inner[-1] + 1]) if inner else parts[0]
