"""A model as it is before training: built again, with random weights."""

import torch

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.loading import load


def untrained(subject: LoadedModel, seed: int = 0) -> LoadedModel:
    """Build a model again with the random weights of a seed; your own code is called again for that.

    Args:
        subject: built by ``mamba_attn.load``.
        seed: of the weights.

    Raises:
        ValueError: it was made in memory, so there is nothing to build it from; or what builds it gives the same
            weights whatever the seed.

    Example:
        >>> untrained(load("vim_micro"), seed=1).weights
        'random'
    """
    if not subject.spec:
        raise ValueError(
            f"{subject.name} was made in memory, so it cannot be built again without its weights; "
            "name what builds it: FILE.py:FUNCTION, or mamba_attn.load in Python."
        )
    found = _drawn(subject, seed)
    if found.fingerprint == subject.fingerprint == _drawn(subject, seed + 1).fingerprint:
        raise ValueError(
            f"{subject.spec}: it returns the same weights with every seed, so it is no untrained model; "
            "let it load its weights only where an argument says so, and give them as weights."
        )
    found.transform, found.head, found.layout = subject.transform, subject.head, subject.layout
    return found


def _drawn(subject: LoadedModel, seed: int) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load(subject.spec, "random", device=subject.device.type, **subject.options)
