"""Whether PCA is needed before t-SNE and UMAP, and the measures that say so."""

import numpy as np
import pytest
from sklearn.manifold import trustworthiness

from benchmarks.neighbours import overlap, pca_check, ranked
from mamba_attn.analytics.embed import embed
from mamba_attn.analytics.projection import components
from tests.analytics.test_embed import clusters

RNG = np.random.default_rng(0)


def test_no_point_is_its_own_neighbour():
    points = np.array([[0.0], [1.0], [3.0], [3.5]])
    assert ranked(points, 2).tolist() == [[1, 2], [0, 2], [3, 1], [2, 1]]


def test_overlap_of_a_plane_and_of_chance():
    points = RNG.normal(size=(200, 2))
    turned = points @ np.array([[0.0, 3.0], [-3.0, 0.0]]) + 9
    assert overlap(points, turned, 10) == 1
    assert overlap(points, RNG.normal(size=(200, 2)), 10) < 0.15


def test_whether_pca_is_needed_is_measured():
    features, _ = clusters(60, 80, spread=0.6)
    check = pca_check(features, first=10, count=5, seeds=(0, 1), max_iter=300)
    assert set(check.trustworthiness) == {"with", "without"}
    assert check.about["seeds"] == [0, 1]
    assert check.about["first"] == 10
    assert 0 < check.kept < 1
    assert check.kept == overlap(features, components(features, 10).points, 5)
    assert 0 < check.explained < 1
    for name, first in (("with", 10), ("without", None)):
        points = embed(features, "tsne", first=first, seed=1, max_iter=300).points
        assert check.trustworthiness[name][1] == trustworthiness(features, points, n_neighbors=5)
        assert check.overlap[name][1] == overlap(features, points, 5)
        assert all(seconds > 0 for seconds in check.seconds[name])
    mean, most = check.gain("overlap")
    differences = np.subtract(check.overlap["with"], check.overlap["without"])
    assert mean == pytest.approx(differences.mean())
    assert most == pytest.approx(np.abs(differences - mean).max())
    assert len(check.alike) == 2
    assert len(check.seeds_alike) == 1
    assert 0 < check.seeds_alike[0] < 1


def test_needed_asks_every_seed():
    features, _ = clusters()
    check = pca_check(features, first=5, seeds=(0, 1), max_iter=250)
    better = {"with": [0.9, 0.8], "without": [0.7, 0.7]}
    mixed = {"with": [0.9, 0.6], "without": [0.7, 0.7]}
    parts = {**vars(check), "trustworthiness": better, "overlap": better}
    assert type(check)(**parts).needed
    assert not type(check)(**{**parts, "trustworthiness": mixed}).needed
    assert not type(check)(**{**parts, "overlap": {"with": [0.1, 0.1], "without": [0.2, 0.2]}}).needed


def test_pca_check_refuses():
    features, _ = clusters()
    with pytest.raises(ValueError, match=r"pca_check\(method='pca'"):
        pca_check(features, "pca")
    with pytest.raises(ValueError, match="two seeds"):
        pca_check(features, seeds=(0,))
    with pytest.raises(ValueError, match="no more than 50 components, so PCA changes nothing"):
        pca_check(features, first=50)
