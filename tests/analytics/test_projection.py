"""The sparse projection: distances, the same everywhere, linear."""

import numpy as np
import pytest
import torch

from mamba_attn.analytics.projection import SIZE, _splitmix64, feature_size, power_of_two, project, project_gathered


def test_splitmix64_is_the_published_one():
    """The first outputs of the reference implementation with seed 0, whose counter starts at one gamma."""
    seed = 0x6D616D6261
    shifted = np.array([-seed], dtype=np.int64).view(np.uint64)
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        inverse = np.uint64(pow(int(gamma), -1, 2**64))
        first = shifted * inverse  # the counter that makes the seed vanish
        found = _splitmix64(first + np.arange(3, dtype=np.uint64))
    assert [int(value) for value in found] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_distances_of_decaying_matrices_are_kept_within_five_percent():
    """Attention-like: the energy lies near the diagonal, as far as it can from a random vector."""
    rng = np.random.default_rng(0)
    side = 600
    lag = np.arange(side)[:, None] - np.arange(side)
    matrices = [
        np.where(lag >= 0, np.exp(-lag.clip(0) / (1 + 3 * number)), 0) * rng.normal(1, 0.5, (1, side))
        for number in range(12)
    ]
    features = [project(matrix) for matrix in matrices]
    for i in range(12):
        for j in range(i):
            exact = np.linalg.norm(matrices[i] - matrices[j])
            assert abs(np.linalg.norm(features[i] - features[j]) / exact - 1) < 0.05


def test_it_is_linear_and_fixed():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 530, 530))
    assert np.allclose(project(a) + 2 * project(b), project(a + 2 * b), atol=1e-3)
    ramp = np.arange(530 * 530).reshape(530, 530) / 530**2
    found = project(ramp)
    assert found.shape == (SIZE,)
    # stores of other runs and versions can be merged only while these numbers stay
    assert found[[0, 1, 2048, 4095]] == pytest.approx([-2.80879, -1.66707, 8.84464, 1.55897], abs=1e-4)


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (512, 2**18), (513, 4096)])
def test_what_is_kept_exactly(tokens, size):
    assert feature_size(tokens) == size


@pytest.mark.parametrize("largest", [0.0, 1e-30, 0.3, 1.0, 7e5])
def test_the_scale_is_a_power_of_two_that_makes_the_largest_about_one(largest):
    scale = power_of_two(largest)
    assert np.frexp(scale)[0] == 0.5
    assert largest == 0 or 0.5 <= largest * scale <= 1


@pytest.mark.parametrize("tokens", [1, 7, 600])
def test_gathering_is_the_same_projection(tokens):
    """What a GPU does, in an order that is the same every time."""
    matrix = torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(tokens))
    found, exact = project_gathered(matrix).numpy(), project(matrix.numpy())
    assert np.abs(found - exact).max() <= 2.0**-22 * np.abs(exact).max()
    assert np.array_equal(found, project_gathered(matrix).numpy())
