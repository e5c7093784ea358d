"""PCA, t-SNE and UMAP: against other code, seeded, remembered."""

import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_info, threadpool_limits

from mamba_attn.analytics import projection
from mamba_attn.analytics.embed import METHODS, cache_key, embed
from mamba_attn.analytics.projection import components

RNG = np.random.default_rng(0)
SHAPES = [(40, 7), (23, 301), (1, 4), (6, 6)]


def clusters(n=60, size=50, groups=3, spread=0.2):
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(groups, size))
    label = np.arange(n) % groups
    return centres[label] + spread * rng.normal(size=(n, size)), label


def purity(points, label):
    """Part of the points whose nearest neighbour has their label."""
    nearest = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(return_distance=False)
    return float((label[nearest[:, 0]] == label).mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_components_equal_a_singular_value_decomposition(shape):
    features = RNG.normal(size=shape) + 5
    found = components(features, 4)
    centred = features - features.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(4, int((values > 1e-9).sum()))
    np.testing.assert_allclose(np.abs(found.points[:, :kept]), np.abs(left * values)[:, :kept], atol=1e-9)
    assert not found.points[:, kept:].any()
    total = (values**2).sum() or 1
    np.testing.assert_allclose(found.explained[:kept], values[:kept] ** 2 / total, atol=1e-9)
    assert found.exact
    assert (found.points[np.abs(found.points).argmax(0), np.arange(4)] >= 0).all()


def test_components_do_not_depend_on_chunks_or_on_the_type_of_number(monkeypatch):
    features = RNG.normal(size=(15, 64)).astype(np.float16)
    whole = components(features, 3)
    monkeypatch.setattr(projection, "_CHUNK", 100)
    np.testing.assert_allclose(components(features, 3).points, whole.points, atol=1e-10)
    np.testing.assert_allclose(components(features.astype(np.float64), 3).points, whole.points, atol=1e-10)


def test_the_approximation_is_close_seeded_and_says_so(monkeypatch):
    features = RNG.normal(size=(90, 12)) @ RNG.normal(size=(12, 120)) + 0.01 * RNG.normal(size=(90, 120))
    truth = components(features, 5)
    monkeypatch.setattr(projection, "_DIAGONALISED", 10)
    found = components(features, 5, seed=3)
    assert not found.exact
    np.testing.assert_allclose(found.points, truth.points, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(components(features, 5, seed=3).points, found.points)
    expected = PCA(5, svd_solver="full").fit(features)
    np.testing.assert_allclose(found.explained, expected.explained_variance_ratio_, rtol=1e-8)


@pytest.mark.parametrize(
    ("features", "count", "sentence"),
    [
        (np.zeros(3), 2, r"components\(features\(3,\), count=2\): expected \(n, features\)"),
        (np.zeros((0, 3)), 2, "all at least 1"),
        (np.ones((2, 3)), 0, "count=0"),
        (np.full((4, 2), np.nan), 1, "features contain NaN or Inf"),
    ],
)
def test_components_refuse(features, count, sentence):
    with pytest.raises(ValueError, match=sentence):
        components(features, count)


def test_pca_is_centred_and_says_how_much_it_explains():
    features, _ = clusters()
    points, about = embed(features)
    assert points.shape == (60, 2)
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, components(features, 2).points, rtol=1e-6)
    assert about["method"] == "pca"
    assert about["first"] is None
    assert (about["n"], about["features"]) == features.shape
    assert 0.5 < sum(about["explained"]) <= 1


@pytest.mark.parametrize("first", [None, 20])
def test_tsne_is_seeded_and_keeps_clusters(first):
    features, label = clusters()
    found = embed(features, "tsne", first=first, seed=4)
    np.testing.assert_array_equal(embed(features, "tsne", first=first, seed=4).points, found.points)
    assert np.abs(embed(features, "tsne", first=first, seed=5).points - found.points).max() > 0.01
    assert purity(found.points, label) == 1
    assert found.about["first"] == first
    assert found.about["perplexity"] == pytest.approx(59 / 3)
    assert embed(features, "tsne", first=first, perplexity=5).about["perplexity"] == 5


def test_tsne_runs_in_one_thread_whatever_ran_before(monkeypatch):
    from sklearn.manifold import TSNE

    threads, original = [], TSNE.fit_transform

    def counted(self, features):
        threads.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "openmp")
        return original(self, features)

    monkeypatch.setattr(TSNE, "fit_transform", counted)
    with threadpool_limits(2, user_api="openmp"):  # as UMAP leaves it
        embed(clusters(20, 5)[0], "tsne")
    assert set(threads) == {1}


@pytest.mark.full
def test_umap_is_seeded_and_keeps_clusters():
    features, label = clusters(45, 30)
    found = embed(features, "umap", first=20, seed=4, n_epochs=50)
    np.testing.assert_array_equal(embed(features, "umap", first=20, seed=4, n_epochs=50).points, found.points)
    assert purity(found.points, label) == 1
    assert found.about["n_neighbors"] == 15


def test_few_points_and_constant_ones():
    for method in ("pca", "tsne"):
        for n in (2, 3, 5):
            assert embed(RNG.normal(size=(n, 4)), method).points.shape == (n, 2)
        assert np.isfinite(embed(np.ones((6, 4)), method).points).all()


def test_unit_norm_forgets_lengths():
    features, _ = clusters()
    longer = features * np.linspace(1, 9, 60)[:, None]
    np.testing.assert_allclose(embed(longer, unit_norm=True).points, embed(features, unit_norm=True).points, atol=1e-5)
    assert np.abs(embed(longer).points - embed(features).points).max() > 1
    assert np.isfinite(embed(np.concatenate([features, np.zeros((1, 50))]), unit_norm=True).points).all()


class Memory:
    """A cache that forgets nothing."""

    def __init__(self, missing):
        self.kept, self.missing, self.asked = {}, missing, []

    def embedding(self, key):
        self.asked.append(key)
        if key in self.kept:
            return self.kept[key]
        if self.missing is None:
            return None
        raise self.missing

    def save_embedding(self, key, array, about):
        self.kept[key] = array, about


@pytest.mark.parametrize("missing", [None, KeyError("no such embedding")])
def test_a_cache_is_asked_first_and_told_afterwards(missing):
    features, _ = clusters()
    memory = Memory(missing)
    found = embed(features, cache=memory)
    (key,) = memory.kept
    memory.kept[key] = found.points + 7, {"method": "remembered"}
    again = embed(features, cache=memory)
    np.testing.assert_array_equal(again.points, found.points + 7)
    assert again.about == {"method": "remembered"}
    assert memory.asked == [key, key]
    other = features.copy()
    other[3, 3] += 1e-12
    for changed in ({"features": other}, {"unit_norm": True}, {"seed": 1}, {"features": features[::-1]}):
        embed(**{"features": features, **changed}, cache=memory)
    assert len(memory.kept) == 5


def test_the_key_does_not_depend_on_memory_layout():
    features, _ = clusters()
    about = {"method": "pca"}
    assert cache_key(np.asfortranarray(features), about) == cache_key(features, about)
    assert cache_key(features.astype(np.float32), about) != cache_key(features, about)


@pytest.mark.parametrize(
    ("features", "options", "sentence"),
    [
        (np.ones((4, 3)), {"method": "tnse"}, r"embed\(method='tnse'\): no such method. Did you mean 'tsne'"),
        (np.ones((1, 3)), {}, r"embed\(features\(1, 3\), method='pca'\): expected .* at least two points"),
        (np.ones(3), {}, "at least two points"),
        (np.ones((4, 3)), {"first": 1}, "first=1 principal components do not span a plane"),
        (np.ones((4, 3)), {"perplexity": 3}, "PCA has no options, got perplexity"),
        (np.full((4, 3), np.inf), {}, "features contain NaN or Inf"),
    ],
)
def test_embed_refuses(features, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        embed(features, **options)


@pytest.mark.parametrize(("method", "module"), [("tsne", "sklearn.manifold"), ("umap", "umap")])
def test_what_is_not_installed_is_named(monkeypatch, method, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'mamba_attn\[embed\]'"):
        embed(np.eye(8), method)
    assert embed(np.eye(8)).points.shape == (8, 2)


def test_the_methods_are_known():
    assert METHODS == ("pca", "tsne", "umap")
