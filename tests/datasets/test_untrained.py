"""A model built again with random weights: by its name, and by a user's own code."""

import pytest
import torch

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets import load
from mamba_attn.datasets.untrained import untrained

CODE = """
import torch
from mamba_attn import models

def build(depth=1, fixed=False):
    if fixed:
        torch.manual_seed(3)
    return models.create("vim_micro", depth=depth, image_size=16, embed_dim=16, num_classes=3)
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "net_of_tests.py").write_text(CODE)
    return f"{tmp_path / 'net_of_tests.py'}:build"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_by_your_own_code(spec):
    trained = load(spec, depth=2)
    first, again, other = (untrained(trained, seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len({first.fingerprint, other.fingerprint, trained.fingerprint}) == 3
    assert len(first.model.layers) == 2
    before = torch.get_rng_state()
    untrained(trained, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_that_returns_the_same_weights_is_refused(spec):
    with pytest.raises(ValueError, match="same weights with every seed"):
        untrained(load(spec, fixed=True), 1)


def test_what_was_made_in_memory_is_refused():
    with pytest.raises(ValueError, match="made in memory"):
        untrained(LoadedModel(torch.nn.Linear(2, 2)))
