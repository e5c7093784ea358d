"""The trajectory of the hidden state: of known recurrences, and of traced models."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mamba_attn import models, orders, trace
from mamba_attn.analytics.states import StateTrajectory, state_trajectory
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.ranks import ranks, spearman
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import NonFiniteError, UnsupportedModelError
from mamba_attn.tracing.layers import ScanLayer

RNG = np.random.default_rng(0)
GRID = (3, 5)


def line(order="raster", length=15, **layout):
    """A state that moves by one along the same axis at every step."""
    tokens = orders.order(order, *GRID).numpy() if length == 15 else np.arange(length)
    direction = np.array([0.6, 0.0, -0.8])
    return StateTrajectory(np.arange(length)[:, None] * direction, tokens, TokenLayout(GRID, **layout))


def test_the_path_of_a_line_is_a_line():
    path = line().path(2)
    np.testing.assert_allclose(np.abs(np.diff(path.points[:, 0])), 1, atol=1e-12)
    assert not path.points[:, 1].any()
    np.testing.assert_allclose(path.explained, [1, 0])


@pytest.mark.parametrize("order", ["raster", "spiral", "hilbert", "random"])
def test_the_norm_stands_where_the_token_stands(order):
    norm = line(order).norm_map()
    assert norm.shape == GRID
    steps = orders.inverse(orders.order(order, *GRID)).view(GRID).numpy()
    np.testing.assert_allclose(norm, steps, atol=1e-12)


def test_class_tokens_and_cells_that_are_not_visited():
    own = StateTrajectory(np.eye(3), np.array([7, 0, 4]), TokenLayout(GRID, class_tokens=(7,)))
    norm = own.norm_map()
    assert norm[0, 0] == norm[0, 4] == 1
    assert np.isnan(norm).sum() == 13
    found = own.distances("sequence")
    assert found.distance.tolist() == [1]
    assert found.pairs.tolist() == [1]
    np.testing.assert_allclose(found.mean, np.sqrt(2))


@pytest.mark.parametrize("order", ["raster", "spiral", "random"])
def test_states_that_move_with_the_sequence_follow_the_sequence(order):
    own = line(order)
    found = own.distances("sequence")
    np.testing.assert_allclose(found.mean, found.distance, atol=1e-6)
    np.testing.assert_allclose(found.deviation, 0, atol=1e-6)
    assert found.pairs.tolist() == list(range(14, 0, -1))
    assert found.correlation > 1 - 1e-5
    raster = own.distances("raster")
    assert (raster.correlation > 0.999) == (order == "raster")


def test_distances_by_the_definition():
    states, order = RNG.normal(size=(15, 4)), orders.order("hilbert", *GRID).numpy()
    own = StateTrajectory(states, order, TokenLayout(GRID))
    pairs = [(i, j) for i in range(15) for j in range(i)]
    between = np.array([np.linalg.norm(states[i] - states[j]) for i, j in pairs])
    places = [divmod(int(token), 5) for token in order]
    by_kind = {
        "sequence": [i - j for i, j in pairs],
        "raster": [abs(int(order[i]) - int(order[j])) for i, j in pairs],
        "grid": [np.hypot(places[i][0] - places[j][0], places[i][1] - places[j][1]) for i, j in pairs],
    }
    for kind, apart in by_kind.items():
        found, apart = own.distances(kind), np.array(apart)
        assert found.kind == kind
        for bin_, mean, deviation, count in zip(found.distance, found.mean, found.deviation, found.pairs, strict=True):
            own_pairs = between[np.rint(apart) == bin_]
            assert len(own_pairs) == count > 0
            np.testing.assert_allclose([mean, deviation], [own_pairs.mean(), own_pairs.std()], atol=1e-9)
        assert found.pairs.sum() == len(pairs)
        assert found.correlation == pytest.approx(spearmanr(apart, between).statistic, abs=1e-12)


def test_a_choice_of_steps_is_seeded_and_close():
    layout, states = TokenLayout((20, 30)), np.cumsum(RNG.normal(size=(600, 3)), axis=0)
    own = StateTrajectory(states, np.arange(600), layout)
    some, again, all_ = own.distances(steps=150, seed=1), own.distances(steps=150, seed=1), own.distances()
    np.testing.assert_array_equal(some.mean, again.mean)
    assert some.pairs.sum() == 150 * 149 / 2
    assert all_.pairs.sum() == 600 * 599 / 2
    assert abs(some.correlation - all_.correlation) < 0.1


def test_standardised():
    own = StateTrajectory(np.concatenate([RNG.normal(size=(15, 2)) * [1, 1e6] + 3, np.ones((15, 1))], 1),
                          np.arange(15), TokenLayout(GRID)).standardised()  # fmt: skip
    np.testing.assert_allclose(own.states.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(own.states.std(0), [1, 1, 0], atol=1e-9)


def test_spearman_with_ties_and_constants():
    first, second = RNG.integers(0, 5, 40), RNG.integers(0, 5, 40)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    assert np.isnan(spearman(first, np.ones(40)))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: StateTrajectory(np.ones((3, 2)), np.arange(4), TokenLayout(GRID)), r"StateTrajectory\(states\(3, 2\)"),
        (lambda: StateTrajectory(np.ones((1, 2)), np.array([15]), TokenLayout(GRID)), "tokens outside the layout's"),
        (lambda: line().distances("taxicab"), r"distances\(kind='taxicab', steps=1024\): expected one of"),
        (lambda: line().distances(steps=1), "and two steps"),
        (lambda: line(length=1).distances(), "reads fewer than two patches"),
    ],
)  # fmt: skip
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def traced(name, **options):
    model = models.create(name, image_size=(24, 40), **options).eval()
    with trace(model) as record:
        model(torch.randn(2, 3, 24, 40))
    return record.layers[-1]


VIM = {"patch_size": 8, "embed_dim": 8, "depth": 2, "d_state": 3, "order": "spiral"}


def test_of_a_traced_model():
    layer = traced("vim_micro", **VIM)
    own = state_trajectory(layer, route=1, channels=[2, 0], image=1)
    states = layer.states(1, [2, 0])[1].detach().double().numpy()
    np.testing.assert_allclose(own.states.reshape(16, 2, 3), states.transpose(2, 0, 1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(own.order, layer.scan.read_order[1])
    row, column = divmod(int(own.layout.patches.tolist().index(int(own.order[-1]))), 5)
    assert own.norm_map()[row, column] == pytest.approx(np.linalg.norm(states[:, :, -1]), rel=1e-5)
    assert own.path().points.shape == (16, 2)
    assert state_trajectory(layer).states.shape == (16, layer.scan.channels * 3)


def test_of_routes_on_sub_grids():
    order = torch.stack([orders.sub_grid(4, 6, slice(k, None, 2), slice(k, None, 2)) for k in range(2)])
    record = ScanRecord.from_scan(
        torch.randn(1, 2, 3, 6), torch.rand(1, 2, 3, 6), -torch.rand(2, 3, 2), torch.randn(1, 2, 1, 2, 6),
        torch.randn(1, 2, 1, 2, 6), order=order, tokens=24, layout=TokenLayout((4, 6)),
    )  # fmt: skip
    for route in range(2):
        norm = state_trajectory(ScanLayer("mixer", record), route).norm_map()
        visited = ~np.isnan(norm)
        assert visited.sum() == 6
        assert visited[route::2, route::2].all()


def test_refusals_of_layers():
    layer = traced("vim_micro", **VIM)
    with pytest.raises(ValueError, match=r"state_trajectory\(image=2\): layers\.1\.mixer saw 0\.\.1"):
        state_trajectory(layer, image=2)
    with pytest.raises(ValueError, match=r"routes=2: 2 must be an integer in 0\.\.1"):
        state_trajectory(layer, 2)
    with pytest.raises(UnsupportedModelError, match="is softmax attention, which has no hidden state"):
        state_trajectory(traced("vit_micro", patch_size=8, embed_dim=8, num_heads=2, depth=1))
    spoilt = layer.scan.replace(source_u=layer.scan.source_u.detach().clone())
    spoilt.source_u[0] = float("nan")
    spoilt_layer = ScanLayer("mixer", spoilt)
    with pytest.raises(NonFiniteError, match="mixer: u contain NaN or Inf"):
        state_trajectory(spoilt_layer)
    assert np.isfinite(state_trajectory(spoilt_layer, image=1).states).all()
