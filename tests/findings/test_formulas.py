"""Each finding on matrices whose answer is known."""

import numpy as np
import pytest
import torch

from mamba_attn import orders
from mamba_attn.analytics.index import StoredLayer
from mamba_attn.core.layout import TokenLayout
from mamba_attn.erf.reach import attention_distance
from mamba_attn.findings import formulas
from mamba_attn.findings import registry as findings
from mamba_attn.findings.intervals import mean
from mamba_attn.findings.places import places_of
from mamba_attn.findings.registry import FINDINGS, finding

GRIDS = [(4, 5), (8, 8), (6, 3)]


def layer(grid=(6, 5), order="raster", routes="cross", **layout):
    its = TokenLayout(grid, patch_size=4, **layout)
    if routes == "cross":
        found = orders.cross(order, *grid)
    else:
        found = orders.both_ways(orders.insert_tokens(orders.order(order, *grid), its.class_tokens))
    return StoredLayer("layer", "selective scans", 0, 0, len(found), its, found.numpy(), True)


def shares(matrix):
    return formulas.shares_of(np.asarray(matrix, dtype=np.float32)[None])


def decaying(places, steps, scale=3.0):
    """Attention that falls with the distance it is given."""
    return np.exp(-np.asarray(steps, dtype=np.float64) / scale)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_diagonal_matrix_reads_nothing_but_itself(grid):
    places = places_of(layer(grid))
    own = shares(-2.0 * np.eye(len(places)))
    assert formulas.distance(own, places)[0] == 0
    assert formulas.entropy(own, places)[0] == 0
    assert formulas.neighbour_share(own, places)[0] == 1
    assert np.isnan(formulas.preceding_lift(own, places)[0])


@pytest.mark.parametrize("grid", GRIDS)
def test_uniform_attention_has_the_highest_entropy_and_reads_nothing_more_than_another_thing(grid):
    places = places_of(layer(grid))
    even = shares(np.ones((len(places), len(places))))
    assert formulas.entropy(even, places)[0] == pytest.approx(1, abs=1e-6)
    assert formulas.preceding_lift(even, places)[0] == pytest.approx(1, abs=1e-5)
    assert formulas.neighbour_share(even, places)[0] == pytest.approx(places.near.mean(), abs=1e-6)
    half = np.zeros((len(places), len(places)))
    half[:, : len(places) // 2] = 7.0
    expected = np.log(len(places) // 2) / np.log(len(places))
    assert formulas.entropy(shares(half), places)[0] == pytest.approx(expected, abs=1e-6)


def test_distances_are_those_of_the_receptive_field():
    its = layer((5, 7), routes="both", class_tokens=(3,))
    matrix = torch.randn(2, 36, 36, generator=torch.Generator().manual_seed(0))
    patches = its.layout.patches.numpy()
    between = matrix.numpy()[:, patches[:, None], patches]
    found = formulas.distance(formulas.shares_of(between), places_of(its))
    np.testing.assert_allclose(found, attention_distance(matrix, its.layout), rtol=1e-5)


def test_rows_that_read_nothing_are_left_out():
    places = places_of(layer((4, 4)))
    matrix = np.eye(16)
    matrix[0] = 0
    matrix[1] = 1
    whole = formulas.entropy(shares(matrix), places)[0]
    assert whole == pytest.approx(1 / 15)
    assert np.isnan(formulas.entropy(shares(np.zeros((16, 16))), places)[0])


@pytest.mark.parametrize("order", ["raster", "diagonal", "morton", "spiral", "random"])
def test_reading_the_step_before_is_found_in_the_own_order_alone(order):
    own, other = places_of(layer((6, 6), order, "both")), places_of(layer((6, 6), "hilbert", "both"))
    walk = orders.order(order, 6, 6).numpy()
    matrix = np.zeros((36, 36))
    matrix[walk[1:], walk[:-1]] = 1
    most = 35 / own.before[walk[1:]].sum(1).mean()  # the first patch reads nothing
    assert formulas.preceding_lift(shares(matrix), own)[0] == pytest.approx(most, rel=1e-5)
    assert formulas.preceding_lift(shares(matrix), other)[0] < 0.9 * most


@pytest.mark.parametrize("order", ["diagonal", "morton", "spiral", "random"])
def test_a_pattern_along_an_order_follows_it_rather_than_the_raster(order):
    places = places_of(layer((8, 8), order))
    rows = formulas.Rows(decaying(places, places.steps))
    assert formulas.sequence_locality(rows, places) > 0.8
    assert formulas.order_over_raster(rows, places) > 0.05
    raster = formulas.Rows(decaying(places, places.raster))
    assert formulas.order_over_raster(raster, places) < -0.05
    alike = places_of(layer((8, 8)))
    assert np.isnan(formulas.order_over_raster(rows, alike))


def test_a_class_token_in_the_way_changes_no_steps():
    with_token, without = (places_of(layer((4, 6), routes="both", class_tokens=each)) for each in ((12,), ()))
    np.testing.assert_array_equal(with_token.steps, without.steps)
    np.testing.assert_array_equal(with_token.before, without.before)
    assert with_token.in_raster_order


def test_patches_that_a_route_leaves_out_are_far_from_it():
    sub = orders.sub_grid(4, 4, slice(0, None, 2), slice(0, None, 2))[None]
    its = StoredLayer("layer", "selective scans", 0, 0, 1, TokenLayout((4, 4)), sub.numpy(), True)
    places = places_of(its)
    assert places.steps[0, 2] == 1
    assert places.steps[0, 1] > 1000
    assert not places.before[:, 1].any()


def test_columns_that_read_alike_are_seen_as_columns():
    places = places_of(layer((6, 5)))
    noise = 0.01 * np.random.default_rng(0).standard_normal((30, 30))
    rows = formulas.Rows(np.eye(5)[places.column] @ np.random.default_rng(1).random((5, 30)) + noise)
    assert formulas.column_purity(rows, places) == pytest.approx(1)
    assert formulas.row_purity(rows, places) < 0.1
    assert formulas.column_similarity(rows, places) > 0.1 > abs(formulas.row_similarity(rows, places))
    turned = formulas.Rows(np.eye(6)[places.row] @ np.random.default_rng(1).random((6, 30)) + noise)
    assert formulas.row_purity(turned, places) == pytest.approx(1)
    assert formulas.row_similarity(turned, places) > 0.1


def test_similarity_is_the_difference_of_mean_cosines():
    places = places_of(layer((4, 4)))
    matrix = np.random.default_rng(0).standard_normal((16, 16))
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    cosine, same = unit @ unit.T, places.column[:, None] == places.column
    others = ~np.eye(16, dtype=bool)
    expected = cosine[same & others].mean() - cosine[~same].mean()
    assert formulas.column_similarity(formulas.Rows(matrix), places) == pytest.approx(expected)


def test_purity_of_blobs_is_one_and_of_shuffled_labels_none():
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(8), 40)
    blobs = formulas.Rows(10 * np.eye(8)[label] + random.standard_normal((320, 8)))
    assert formulas.purity(blobs, label) == pytest.approx(1)
    chance = [formulas.purity(blobs, random.permutation(label)) for _ in range(20)]
    assert abs(np.mean(chance)) < 0.02
    small = np.repeat(np.arange(160), 2)  # of each label two: one neighbour can share it
    pairs = formulas.Rows(np.repeat(random.standard_normal((160, 6)), 2, axis=0))
    assert formulas.purity(pairs, small) == pytest.approx(1)
    assert np.isnan(formulas.purity(pairs, np.arange(320)))


def test_z_blocks_are_the_squares_that_morton_visits_in_one_go():
    places = places_of(layer((8, 8), "morton"))
    walk = places.block[orders.order("morton", 8, 8).numpy()]
    assert (np.diff(walk) != 0).sum() == len(np.unique(walk)) - 1
    assert len(np.unique(walk)) == 4
    rows = formulas.Rows(np.eye(64)[places.block] + 0.01 * np.eye(64))
    assert formulas.block_purity(rows, places) == pytest.approx(1)


def test_nearness_in_the_image_is_found_and_shuffled_places_lose_it():
    places = places_of(layer((8, 8)))
    rows = formulas.Rows(decaying(places, places.away, 8.0))
    assert formulas.grid_locality(rows, places) > 0.9
    lost = [formulas.grid_locality(rows, places.shuffled(seed)) for seed in range(10)]
    assert max(map(abs, lost)) < 0.2
    assert np.isnan(formulas.grid_locality(formulas.Rows(np.ones((64, 64))), places))


def test_points_keep_their_distances_where_there_are_too_few_for_100_components():
    matrix = np.random.default_rng(0).standard_normal((16, 40))
    unit = formulas.unit(matrix)
    expected = ((unit[:, None] - unit) ** 2).sum(2)
    np.testing.assert_allclose(formulas.Rows(matrix).squares, expected, atol=1e-12)


def share(features):
    spread = formulas.Spread(len(features))
    spread.add(0, features)
    return formulas.image_share(spread)


def stage(features, means=(), distances=()):
    points = means[0].shape[1:] if len(means) else (1, 1)
    return formulas.Stage(features, means, np.eye(*points, dtype=bool), distances)


def test_blocks_apart_form_clusters_and_blocks_alike_none():
    random = np.random.default_rng(0)
    images = [random.standard_normal((20, 50)) for _ in range(3)]
    apart = stage([each + 30 * random.standard_normal(50) for each in images])
    assert formulas.block_silhouette(apart).mean() > 0.8
    assert (formulas.block_neighbours(apart) == 1).all()
    alike = stage(images)
    assert abs(formulas.block_silhouette(alike).mean()) < 0.1
    assert formulas.block_neighbours(alike).mean() < 0.6


def test_the_silhouette_is_that_of_scikit_learn_in_every_group_of_images():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    features = [random.standard_normal((9, 12)) + 0.5 * block for block in range(3)]
    groups = [[0, 4, 8], [1, 5], [2, 6], [3, 7]]
    assert [group.tolist() for group in formulas.groups_of(9)] == groups
    expected, nearest = [], []
    for group in groups:
        points, labels = (
            np.concatenate([formulas.unit(each[group]) for each in features]),
            np.repeat(range(3), len(group)),
        )
        expected.append(metrics.silhouette_score(points, labels))
        away = ((points[:, None] - points) ** 2).sum(2) + np.diag(np.full(len(points), 99))
        nearest.append((labels[away.argmin(1)] == labels).mean())
    np.testing.assert_allclose(formulas.block_silhouette(stage(features)), expected, atol=1e-7)
    np.testing.assert_allclose(formulas.block_neighbours(stage(features)), nearest, atol=1e-9)


def test_groups_share_no_image_and_what_images_share_is_not_counted_twice():
    for images in (0, 1, 2, 5, 19, 20, 200):
        groups = formulas.groups_of(images)
        assert sorted(np.concatenate(groups).tolist()) == list(range(images))
        assert len(groups) == max(1, min(10, images // 2))
        assert min(len(group) for group in groups) >= min(2, images)
    random = np.random.default_rng(0)
    held = []
    for _ in range(
        200
    ):  # a statistic of all images: the truth is 1 / 2, each block's own pattern as strong as the noise
        pattern = random.standard_normal(40)
        found = mean(share(pattern + np.linalg.norm(pattern) / 40**0.5 * random.standard_normal((60, 40))))
        held.append(found.low <= 0.5 <= found.high)
        assert found.units == 10
    assert 0.9 <= np.mean(held) <= 1


def test_blocks_that_complement_each_other_correlate_less_than_by_chance():
    near = np.random.default_rng(0).random((2, 9, 9))
    nothing = [np.zeros((2, 1))]
    found = formulas.block_correlation(stage(nothing * 2, [near, 1 - near]))
    np.testing.assert_allclose(found, -1, atol=0.15)
    same = formulas.block_correlation(stage(nothing * 2, [near, -3 * near]))  # sizes count
    np.testing.assert_allclose(same, 1, atol=0.15)
    off = near + 50 * np.eye(9)
    np.testing.assert_allclose(formulas.block_correlation(stage(nothing * 2, [near, off])), 1, atol=0.15)
    constant = formulas.block_correlation(stage(nothing * 2, [near, np.ones((2, 9, 9))]))
    assert np.isnan(constant).all()


@pytest.mark.parametrize("blocks", [2, 5, 12])
def test_the_number_of_pairs_makes_no_two_blocks_complement_each_other(blocks):
    random = np.random.default_rng(blocks)
    smooth = [np.abs(random.standard_normal((30, 16, 1)) @ random.standard_normal((30, 1, 16))) for _ in range(blocks)]
    found = formulas.block_correlation(stage([np.zeros((30, 1))] * blocks, smooth))
    assert abs(found.mean()) < 4 * found.std(ddof=1) / 30**0.5 + 0.01


def test_ranges_shares_and_trends():
    two = stage([np.zeros((2, 1))] * 2, distances=[np.array([1.0, 2]), np.array([5.0, 1])])
    np.testing.assert_array_equal(formulas.distance_range(two), [4, 1])
    alone = stage([np.zeros((2, 1))], distances=[np.ones(2)])
    for name in ("distance_range", "block_silhouette", "block_neighbours", "block_correlation"):
        assert np.isnan(getattr(formulas, name)(alone)).all()
    pattern = np.random.default_rng(0).random(30)
    np.testing.assert_allclose(share(np.stack([pattern, 3 * pattern])), 0, atol=1e-12)
    random = np.random.default_rng(1).standard_normal((200, 500))
    assert share(random).mean() == pytest.approx(1, abs=0.01)
    assert share(random).shape == (10,)
    assert np.isnan(share(pattern[None])).all()
    rising = np.array([[1.0, 4], [2, 3], [np.nan, 2], [7, 1]])
    np.testing.assert_allclose(formulas.by_depth(rising), [1, -1])
    assert np.isnan(formulas.by_depth(rising[:2])).all()


def test_every_finding_says_what_it_is():
    assert {each.of for each in FINDINGS.values()} == {"", *(f"F{number}" for number in range(1, 8))}
    for name, each in FINDINGS.items():
        assert each.name == name
        assert each.function.__doc__
        assert each.question.endswith("?")
        assert each.kind in ("matrix", "rows", "features", "blocks", "depth")
        assert (each.source in FINDINGS) == (each.kind == "depth")
    assert [each.name for each in findings.of_kind("features")] == ["image_share"]
    with pytest.raises(ValueError, match=r"finding\('entropie'\): no such finding\. Did you mean 'entropy'"):
        finding("entropie")
