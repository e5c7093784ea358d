"""What the explorer reads equals the matrices, stored or of a live model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mamba_attn
from mamba_attn import images
from mamba_attn.analytics import AttentionStore, NotStoredError, collect
from mamba_attn.viewer.errors import UnavailableError
from mamba_attn.viewer.points import Scatter
from mamba_attn.viewer.source import Source, tokens_of
from mamba_attn.viewer.state import Pane
from tests.analytics.cases import folder_of, request
from tests.viewer.double import Double, tiny


@pytest.fixture(scope="module")
def store():
    return tiny()


@pytest.fixture(scope="module")
def gated():
    """A Vim, which has a class token and a gate."""
    torch.manual_seed(1)
    model = mamba_attn.models.create("vim_micro", image_size=(24, 40), depth=2, num_classes=3)
    pixels = np.random.default_rng(1).integers(0, 255, (2, 24, 40, 3), dtype=np.uint8)
    return Double(model, pixels, ["cat", "dog"], keep=0, name="vim_micro")


def explicit(store, number, layer, gate=False, skip=False, route=None):
    """The matrix of one image, from its definition."""
    with torch.no_grad(), mamba_attn.trace(store.model()) as record:
        store.model()(images.normalise(store.pixels(store.images[number])[None]))
    scan = record.layers[layer].scan
    if route is not None:
        scan = scan.select_routes(slice(route, route + 1))
    matrix = mamba_attn.hidden_attention(scan, fold="each")[0].double()
    if skip:  # D reads the token itself, once per route
        matrix = matrix + scan.scale * scan.D.double().sum(0)[:, None, None] * torch.eye(scan.tokens)
    if gate:
        matrix = matrix * scan.gate[0].double()[..., None]
    return matrix.mean(0).numpy()


@pytest.mark.parametrize("direction", ["row", "column"])
@pytest.mark.parametrize(("gate", "skip", "route"), [(0, 0, -1), (1, 0, -1), (0, 1, 1), (1, 1, -1)])
def test_a_live_model_gives_rows_and_columns_of_the_matrix(gated, direction, gate, skip, route):
    pane = Pane(layer=1, what="image", image=1, direction=direction, gate=bool(gate), skip=bool(skip), route=route)
    matrix = explicit(gated, 1, 1, gate, skip, None if route < 0 else route)
    matrix = matrix if direction == "row" else matrix.T
    for tokens in ([3], [0, 5, 6]):
        found = Source(gated).read(pane, tokens)
        np.testing.assert_allclose(found, matrix[tokens].mean(0), atol=1e-6 * np.abs(matrix).max())


def test_a_row_is_read_without_its_matrix(store, monkeypatch):
    source = Source(store)
    monkeypatch.setattr("mamba_attn.viewer.source._BAND", 16)
    store.lines_read.clear()
    expected = store._mean[store.layers[0].name, "sum"]
    np.testing.assert_allclose(source.read(Pane(), [4, 9]), expected[[4, 9]].mean(0), rtol=1e-5)
    name = store.layers[0].name
    assert store.lines_read == [(name, 0, 16)]
    np.testing.assert_allclose(
        source.read(Pane(direction="column"), [5, 90, 95]), expected[:, [5, 90, 95]].mean(1), rtol=1e-5
    )
    assert store.lines_read[1:] == [(name, 0, 16), (name, 80, 96)]
    source.read(Pane(), [0])
    assert len(store.lines_read) == 3  # remembered


def test_numbers_beyond_the_store_show_the_last_or_the_sum(store):
    source = Source(store)
    wild = Pane(layer=99, image=99, route=99)
    assert source.layer(wild) is store.layers[-1]
    assert source.image(wild) is store.images[-1]
    assert source.route(wild) == "sum"


def test_scans_without_a_gate_say_so(store):
    with pytest.raises(UnavailableError, match="This model's scans have no gate: switch it off"):
        Source(store).read(Pane(what="image", gate=True), [0])


def test_of_a_store_of_sums_the_mean_of_a_route_is_refused_in_a_sentence(tmp_path):
    collect(request(folder_of(tmp_path), "vmamba_micro", routes="sum"), tmp_path / "store")
    source = Source(AttentionStore.open(tmp_path / "store"))
    assert source.read(Pane(route=-1), [0]).shape == (60,)
    with pytest.raises(NotStoredError, match="route"):
        source.read(Pane(route=1), [0])


@pytest.mark.parametrize("what", ["mean", "spread"])
def test_gate_and_d_of_a_mean_are_refused_in_words(store, what):
    for pane in (Pane(what=what, gate=True), Pane(what=what, skip=True)):
        with pytest.raises(UnavailableError, match="single images only"):
            Source(store).read(pane, [0])


def test_the_class_token_is_a_cell_of_its_own(gated):
    layout = gated.layers[0].layout
    assert tokens_of(layout, [0, -1, 999, -9]) == [int(layout.patches[0]), layout.class_tokens[0]]


def test_the_spread_is_the_standard_deviation_over_images(store, monkeypatch):
    matrices = np.random.default_rng(0).random((5, 96, 96))
    monkeypatch.setattr(store, "variance", lambda layer, route: matrices.var(0))
    spread = matrices.std(0)
    for direction, expected in (("row", spread[[2, 9]].mean(0)), ("column", spread[:, [2, 9]].mean(1))):
        found = Source(store).read(Pane(what="spread", direction=direction), [2, 9])
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_matrix_that_is_not_stored_is_computed(store):
    source = Source(store)
    for image in (0, 2):  # kept, and not
        for route, which in (("sum", None), (2, 2)):
            expected = explicit(store, image, 1, route=which)
            np.testing.assert_allclose(source.matrix(1, image, route), expected, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(source.matrix(1, None, 0), store.mean(store.layers[1], 0))


def test_an_added_image_is_one_of_the_source_and_not_of_the_store(store):
    source, pixels = Source(store), store.pixels(store.images[2])
    number = source.add(pixels, "mine.jpg")
    assert (number, source.images[4].predicted, len(store.images)) == (4, None, 4)  # the double has no classes
    np.testing.assert_array_equal(source.pixels(Pane(image=4)), pixels)
    same = [source.read(Pane(what="image", image=image, layer=2), [1]) for image in (2, 4)]
    np.testing.assert_array_equal(*same)
    assert Scatter(source).count(Pane(mode="blocks")) == 4


def test_points_of_a_block_and_of_a_stage(store):
    scatter = Scatter(Source(store))
    assert scatter.points(Pane()).shape == (96, 2)
    blocks = Pane(mode="blocks", layer=2)
    assert scatter.pairs(blocks).tolist() == [[layer, image] for layer in (2, 3) for image in range(4)]
    assert scatter.points(blocks).shape == (8, 2)


def test_points_come_from_the_cache_without_a_look_at_features(store, monkeypatch):
    for pane in (Pane(layer=2, mode="blocks"), Pane(layer=2)):
        first = Scatter(Source(store)).points(pane)
        with monkeypatch.context() as blind:
            for name in ("features", "feature_rows", "lines", "mean"):
                blind.setattr(store, name, lambda *_, **__: pytest.fail("features were read"))
            again = Scatter(Source(store))
            np.testing.assert_array_equal(again.points(pane), first)


def test_features_of_many_images_are_projected_as_they_are_read(store, monkeypatch):
    whole = Scatter(Source(store)).features(Pane(mode="blocks"))
    monkeypatch.setattr("mamba_attn.viewer.points._WHOLE", 1000)
    few = Scatter(Source(store)).features(Pane(mode="blocks"))
    assert whole.shape == (4, 96 * 96)
    assert few.shape == (4, 4096)
    apart = [np.linalg.norm(each[:, None] - each[None], axis=-1) for each in (whole, few)]
    np.testing.assert_allclose(apart[1], apart[0], rtol=0.1)


def test_a_hundred_components_come_first_or_not_and_each_is_remembered(store, monkeypatch):
    asked = []

    def embed(features, method, *, first):
        asked.append((method, first))
        return np.full((len(features), 2), first or 0, np.float32), {}

    monkeypatch.setattr("mamba_attn.viewer.points.embed", embed)
    pane = Pane(layer=2, method="tsne")
    for _ in range(2):
        scatter = Scatter(Source(store))
        assert scatter.points(pane)[0, 0] == 100
        assert scatter.points(replace(pane, first=False))[0, 0] == 0
    assert asked == [("tsne", 100), ("tsne", None)]


def test_pictures_for_the_eye_have_the_pixels_of_their_files(tmp_path):
    photos = Path(folder_of(tmp_path, 2))
    y, x = np.mgrid[0:80, 0:96]
    for path in sorted(photos.rglob("*.png")):
        Image.fromarray(np.stack([2 * x, 3 * y, x + y], -1).astype(np.uint8)).save(path)
    collect(request(str(photos), "vmamba_micro", keep=1), tmp_path / "store")
    source = Source(AttentionStore.open(tmp_path / "store"))
    rows, columns = source.store.transform.size
    seen, shown = source.pixels(Pane()), source.picture(Pane())
    assert seen.shape == (rows, columns, 3)
    assert shown.shape[0] > rows
    assert abs(shown.shape[0] * columns / rows - shown.shape[1]) <= 1
    again = np.asarray(Image.fromarray(shown).resize((columns, rows), Image.Resampling.BOX))
    assert np.abs(again.astype(int) - seen).mean() < 3  # the same part of the picture
    changed = photos / source.images[1].key
    Image.new("RGB", (96, 80)).save(changed)
    np.testing.assert_array_equal(source.picture(Pane(image=1)), source.pixels(Pane(image=1)))
    changed.unlink()
    fresh = Source(source.store)
    np.testing.assert_array_equal(fresh.picture(Pane(image=1)), fresh.pixels(Pane(image=1)))
