"""Running statistics: any split into batches, and any merge, gives the mean and the variance of all."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mamba_attn.analytics.statistics import LayerStatistics, Running, merge, merge_means
from mamba_attn.errors import NonFiniteError


def counted(values, sizes):
    running, before = Running.zeros(values.shape[-1]), 0
    for size in sizes:
        running.update(values[before : before + size], before)
        before += size
    return running


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), offset=st.sampled_from([0.0, 1e4]))
def test_any_split_gives_the_same(sizes, offset):
    torch.manual_seed(0)
    values = torch.randn(sum(sizes), 7, 7, dtype=torch.float64) + offset
    kept = values.clone()
    running = counted(values, sizes)
    assert torch.equal(values, kept)
    assert np.allclose(running.mean, values.mean(0), rtol=1e-14)
    exact = (values - values.mean(0)).square().sum(0)
    assert np.allclose(running.m2, exact, rtol=1e-9, atol=1e-12 * max(offset, 1) ** 2)


@given(first=st.integers(1, 5), second=st.integers(1, 5))
def test_merging_is_counting_all(first, second):
    torch.manual_seed(0)
    values = torch.randn(first + second, 5, 5)
    states = torch.randn(first + second, 2, 1, 3, 4, dtype=torch.float64)
    whole, one, two = (LayerStatistics.zeros(["sum"], 5, (1, 3, 4)) for _ in range(3))
    for layer, part, own in (
        (whole, values, states), (one, values[:first], states[:first]), (two, values[first:], states[first:])
    ):  # fmt: skip
        layer.routes["sum"].update(part, 0)
        layer.update_moments(tuple(own.mean(0)), 0, len(part))
    mine, its = one.routes["sum"], two.routes["sum"]
    merge(mine.mean, mine.m2, first, its.mean, its.m2, second)
    merge_means(one.moments, first, two.moments, second)
    for name, array in whole.arrays().items():
        assert np.allclose(one.arrays()[name], array, rtol=1e-9, atol=1e-12)


def test_blocks_of_rows_cover_the_matrix():
    torch.manual_seed(0)
    values = torch.randn(3, 401, 401)
    running = counted(values, [2, 1])
    assert np.allclose(running.mean, values.double().mean(0), rtol=0, atol=1e-14)
    assert np.allclose(running.m2 / 3, values.double().var(0, correction=0), rtol=0, atol=1e-13)


def test_one_image_at_a_time_is_the_same_formula_to_the_bit():
    torch.manual_seed(0)
    values = torch.randn(4, 401, 401)  # several blocks
    running, mean, m2 = counted(values, [1] * 4), *torch.zeros(2, 401, 401, dtype=torch.float64)
    for before, each in enumerate(values.double()):
        merge(mean, m2, before, each, torch.zeros(()), 1)
    assert torch.equal(running.mean, mean)
    assert torch.equal(running.m2, m2)


def test_moments_in_blocks_are_those_at_once():
    torch.manual_seed(0)
    shape = (2, 40, 2000)  # more than a block
    layer, whole = LayerStatistics.zeros(["sum"], 2, shape), torch.zeros(2, *shape, dtype=torch.float64)
    for before in range(3):
        found = torch.randn(2, *shape)
        layer.update_moments(tuple(found), before, 1)
        merge_means(whole, before, found.double(), 1)
    assert torch.equal(layer.moments, whole)


def test_nan_is_an_error():
    with pytest.raises(NonFiniteError, match="contains NaN or Inf; check the weights"):
        Running.zeros(2).update(torch.full((1, 2, 2), torch.nan), 0)
    layer = LayerStatistics.zeros(["sum"], 2, (1, 1, 2))
    with pytest.raises(NonFiniteError, match="states of the scans contain NaN"):
        layer.update_moments((torch.full((1, 1, 2), torch.inf), torch.zeros(1, 1, 2)), 0, 1)
