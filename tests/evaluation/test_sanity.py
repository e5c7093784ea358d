"""Randomisation, rank correlation, repeatability, cost."""

import itertools

import pytest
import torch

from mamba_attn import models
from mamba_attn.attribution import RawAttention
from mamba_attn.evaluation import sanity
from mamba_attn.evaluation.cost import cost
from tests.explanations.cases import VIM, VIT, VMAMBA


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    first, second = torch.rand(3, 4, 5), torch.rand(3, 4, 5).mul(4).round()  # with ties
    expected = [stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
    assert sanity.spearman(first, second) == pytest.approx(expected)
    assert sanity.spearman(first, first.exp()) == pytest.approx([1, 1, 1])
    assert sanity.spearman(first, -first) == pytest.approx([-1, -1, -1])
    assert sanity.spearman(first[:1], torch.ones(1, 4, 5)) == [None]


@pytest.mark.parametrize(("name", "options"), [("vim_micro", VIM), ("vmamba_micro", VMAMBA), ("vit_micro", VIT)])
def test_blocks_hold_every_parameter_once_head_first(name, options):
    model = models.create(name, **options)
    found = [name for block in sanity.blocks(model) for name in block]
    assert sorted(found) == sorted(dict(model.named_parameters()))
    assert found[0].startswith(("head", "classifier"))


def test_the_cascade_permutes_from_the_last_block_and_leaves_the_model_alone():
    model = models.create("vim_micro", **VIM)
    before = {name: value.clone() for name, value in model.named_parameters()}
    names = [name for block in sanity.blocks(model) for name in block]
    changed = []
    for copy in sanity.cascade(model):
        changed.append({name for name, value in copy.named_parameters() if not torch.equal(value, before[name])})
        for name, value in copy.named_parameters():
            assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
    assert changed[0] <= {name for name in names if name.startswith("head")}
    assert all(first <= second for first, second in itertools.pairwise(changed))
    assert len(changed[-1]) > 0.7 * len(names)  # constant tensors stay as they are
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert len(list(sanity.cascade(model, stages=3))) == 3


def test_a_map_of_the_image_alone_fails_and_one_of_the_model_does_not():
    torch.manual_seed(1)
    model, images = models.create("vim_micro", **VIM), torch.randn(2, 3, 32, 32)

    def edges(changed):
        return images.mean(1)

    def attention(changed):
        return RawAttention(changed).attribute(images)[:, 0]

    assert sanity.randomisation(model, edges, edges(model), 3)[0] == pytest.approx([1, 1, 1])
    found = sanity.randomisation(model, attention, attention(model), 3)
    assert len(found) == 2
    assert min(found[0]) < 0.9
    assert found == sanity.randomisation(model, attention, attention(model), 3)


def test_differences_are_relative():
    first = torch.tensor([[[2.0, -4.0]], [[0.0, 0.0]]])
    assert sanity.difference(first, first) == [0, 0]
    assert sanity.difference(first, first + 1) == [0.25, 1]


def test_cost_counts_what_is_freed_at_once(capfd):
    def call():
        torch.ones(1000, 1000).add(1).add(1)

    found = cost(call, torch.device("cpu"))
    assert 0 < found.seconds < 5
    assert found.peak_bytes == pytest.approx(8e6, rel=0.01)
    assert capfd.readouterr().err == ""
