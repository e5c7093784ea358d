"""What the explorer reads equals the matrices, stored or of a live model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mamba_attn
from mamba_attn import images
from mamba_attn.analytics import AttentionStore, collect
from mamba_attn.viewer.captions import heading, legend, point_colours
from mamba_attn.viewer.context import Context
from mamba_attn.viewer.errors import UnavailableError
from mamba_attn.viewer.interaction import after
from mamba_attn.viewer.source import Source, tokens_of
from mamba_attn.viewer.state import Pane, State
from mamba_attn.viewer.views import Views, card, thumbnail
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


def test_the_difference_is_the_image_less_the_mean(store):
    source = Source(store)
    for image in (0, 2):  # kept in the store, and not
        pane = Pane(what="difference", image=image)
        expected = explicit(store, image, 0)[7] - store.mean(store.layers[0])[7]
        np.testing.assert_allclose(source.read(pane, [7]), expected, atol=1e-6 * np.abs(expected).max())


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


def test_points_come_from_the_cache_without_a_look_at_features(store, monkeypatch):
    for pane in (Pane(layer=2, mode="blocks"), Pane(layer=2)):
        first = Views(Source(store)).points(pane)
        with monkeypatch.context() as blind:
            for name in ("features", "feature_rows", "lines", "mean"):
                blind.setattr(store, name, lambda *_, **__: pytest.fail("features were read"))
            again = Views(Source(store))
            np.testing.assert_array_equal(again.points(pane).xy, first.xy)
            expected = [5 if pane.mode == "blocks" else 3]
            assert again.selected(pane, State(grid=(2, 3), cells=(3,), points=((3, 1),))) == expected


def test_features_of_many_images_are_projected_as_they_are_read(store, monkeypatch):
    whole = Views(Source(store))._features(Pane(mode="blocks"))
    monkeypatch.setattr("mamba_attn.viewer.views._WHOLE", 1000)
    few = Views(Source(store))._features(Pane(mode="blocks"))
    assert whole.shape == (4, 96 * 96)
    assert few.shape == (4, 4096)
    apart = [np.linalg.norm(each[:, None] - each[None], axis=-1) for each in (whole, few)]
    np.testing.assert_allclose(apart[1], apart[0], rtol=0.1)


@pytest.mark.parametrize("pane", [Pane(gate=True), Pane(skip=True), Pane(what="difference", gate=True)])
def test_gate_and_d_of_a_mean_are_refused_in_words(store, pane):
    with pytest.raises(UnavailableError, match=r"single images only|switch them off"):
        Source(store).read(pane, [0])


def test_numbers_beyond_the_store_show_the_last_or_the_sum(store):
    source = Source(store)
    wild = Pane(layer=99, image=99, route=99)
    assert source.layer(wild) is store.layers[-1]
    assert source.image(wild) is store.images[-1]
    assert source.route(wild) == "sum"


def test_the_class_token_is_a_cell_of_its_own(gated):
    layout = gated.layers[0].layout
    assert tokens_of(layout, [0, -1, 999, -9]) == [int(layout.patches[0]), layout.class_tokens[0]]
    views = Views(Source(gated))
    heat = views.heat(Pane(), State(grid=tuple(layout.grid), cells=(-1,)))
    expected = gated.mean(gated.layers[0])[layout.class_tokens[0]][layout.patches.numpy()]
    np.testing.assert_allclose(heat.ravel(), expected)


def test_the_card_knows_where_a_patch_is_and_what_it_reads(store):
    views = Views(Source(store))
    found = card(views, Pane(sign="absolute"), 29)
    row = np.abs(store.mean(store.layers[0])[29])
    assert (found.row, found.column) == (2, 5)
    assert found.ranks == [30, 43, 67, 54]
    assert [r * 12 + c for r, c, _ in found.strongest] == np.argsort(-row)[:5].tolist()
    with pytest.raises(ValueError, match="the grid is 8x12"):
        card(views, Pane(), 96)


def test_points_of_a_block_and_of_a_stage(store):
    views = Views(Source(store))
    patches, blocks = views.points(Pane()), views.points(Pane(mode="blocks", layer=2))
    assert patches.xy.shape == (96, 2)
    assert blocks.pairs.tolist() == [[layer, image] for layer in (2, 3) for image in range(4)]
    state = State(grid=(8, 12), cells=(3, 4), points=((3, 1),))
    assert views.selected(Pane(), state) == [3, 4]
    assert views.selected(Pane(mode="blocks", layer=2), state) == [5]


def test_with_nothing_chosen_the_points_of_what_is_shown_are_lit(store):
    views = Views(Source(store))
    mean = Pane(mode="blocks", layer=3)
    assert views.selected(mean, State()) == [4, 5, 6, 7]
    assert views.selected(replace(mean, what="image", image=2), State()) == [6]
    assert views.selected(replace(mean, what="difference", image=99), State()) == [7]
    assert views.selected(Pane(), State()) == []


def test_a_lasso_over_blocks_opens_the_first_point_unless_one_is_shown(store):
    context = Context([Source(store)])
    xy = context.views(Pane()).points(Pane(mode="blocks", layer=2)).xy
    around = {axis: [float(xy.min()) - 1, float(xy.max()) + 1] for axis in "xy"}
    event = {"value": {"range": around}, "prop_id": "x.selectedData"}
    source = {"pane": 0, "view": "scatter"}
    for pane, opened in (
        (Pane(mode="blocks", layer=2), (2, 0, "image")),
        (Pane(mode="blocks", layer=3, image=1, what="difference"), (3, 1, "difference")),
    ):
        found = after(context, State((pane,)), source, event)
        assert len(found.points) == 8
        assert (found.panes[0].layer, found.panes[0].image, found.panes[0].what) == opened
    x, y = (float(one) for one in xy[5])
    near = {"value": {"range": {"x": [x - 1e-9, x + 1e-9], "y": [y - 1e-9, y + 1e-9]}}, "prop_id": "x.selectedData"}
    found = after(context, State((Pane(mode="blocks", layer=2, what="image"),)), source, near)
    assert (found.points, found.panes[0].layer, found.panes[0].image) == (((3, 1),), 3, 1)


def test_a_hundred_components_come_first_or_not_and_each_is_remembered(store, monkeypatch):
    asked = []

    def embed(features, method, *, first):
        asked.append((method, first))
        return np.full((len(features), 2), first or 0, np.float32), {}

    monkeypatch.setattr("mamba_attn.viewer.views.embed", embed)
    pane = Pane(layer=2, method="tsne")
    for _ in range(2):
        views = Views(Source(store))
        assert views.points(pane).xy[0, 0] == 100
        assert views.points(replace(pane, first=False)).xy[0, 0] == 0
    assert asked == [("tsne", 100), ("tsne", None)]


def test_softmax_attention_has_no_rank_no_path_and_no_gate(store, monkeypatch):
    source = Source(store)
    source.layers = [replace(layer, kind="softmax attention") for layer in source.layers]
    context = Context([source])
    assert point_colours(source, "patches") == ("column", "row")
    wishes = {"colour": "rank", "gate": ["on"], "skip": ["on"], "path": ["on"]}
    controls = [{"id": {"pane": 0, "set": name}, "value": value} for name, value in wishes.items()]
    assert context.pane(controls) == Pane()
    assert Context([Source(store)]).pane(controls) == Pane(colour="rank", gate=True, skip=True, path=True)


def test_scans_without_a_gate_say_so(store):
    with pytest.raises(UnavailableError, match="This model's scans have no gate: switch it off"):
        Source(store).read(Pane(what="image", gate=True), [0])


def test_what_is_shown_is_said(store):
    source, state = Source(store), State(grid=(8, 12), cells=(14,))
    assert heading(source, Pane(), State()) == "Where patches look, on average · average of 4 images"
    assert heading(source, Pane(what="image", image=2), state) == "Where patch (1, 2) looks · image_2.jpg"
    assert heading(source, Pane(what="difference"), state) == "Where patch (1, 2) looks · image_0.jpg minus the average"
    assert legend(source, Pane(path=True, sign="absolute")) == "absolute attention · path of route 1"
    assert legend(source, Pane(path=True, route=2)) == "attention · path of route 3"
    assert legend(source, Pane(route=2)) == "attention"


def test_signed_colours_stay_centred_on_zero_whatever_the_values(store):
    values = np.array([[0.0, 1.0], [2.0, 3.0]])
    palettes = {sign: thumbnail(values, Pane(sign=sign)) for sign in ("signed", "positive")}
    assert palettes["signed"] != palettes["positive"]
    views = Views(Source(store))
    views.heat = lambda *_: np.arange(96.0).reshape(8, 12)
    heat, changes = views.patches(Pane(), State()).data[1], views.changes(Pane(), State())
    assert heat.zmin == -heat.zmax == changes["zmin"] == -changes["zmax"]
    heat = views.patches(Pane(sign="positive"), State()).data[1]
    assert (heat.zmin, heat.zmax) == (0, np.percentile(np.arange(96), 99.5))
    assert heat.colorbar.ticktext[0] == "0"
    assert heat.colorbar.ticktext[-1] == "\N{GREATER-THAN OR EQUAL TO} 94.5"  # the largest one is beyond it


def test_the_path_of_a_route_visits_patches_as_raster_indices(gated):
    views = Views(Source(gated))
    count = len(gated.layers[0].layout.patches)
    assert views.path(Pane(route=0)).tolist() == list(range(count))
    assert views.path(replace(Pane(), route=1)).tolist() == list(range(count))[::-1]


def test_of_a_store_of_sums_the_mean_of_a_route_is_refused_in_a_sentence(tmp_path):
    collect(request(folder_of(tmp_path), "vmamba_micro", routes="sum"), tmp_path / "store")
    source = Source(AttentionStore.open(tmp_path / "store"))
    assert source.read(Pane(route=-1), [0]).shape == (60,)
    with pytest.raises(UnavailableError, match="route"):
        source.read(Pane(route=1), [0])
