"""Findings of stores beside their controls: what agrees with what, what is missing, and what is said about it."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba_attn.analytics import AttentionStore, collect
from mamba_attn.analytics.places import LocalPlace
from mamba_attn.distributed import Ranks
from mamba_attn.errors import StoreError, WeightsError
from mamba_attn.findings import registry as findings
from mamba_attn.findings.accuracy import known_accuracy, over_orders
from mamba_attn.findings.controls import ALL, Report, Row, report
from mamba_attn.findings.intervals import Estimate
from mamba_attn.findings.measure import Measuring
from mamba_attn.findings.results import Block, Measured, compact
from mamba_attn.findings.tables import orders_sentence, verdicts
from tests.analytics import cases
from tests.explanations.cases import save

BIG = {"image_size": (32, 40), "depth": 3, "num_classes": 3, "embed_dim": 16, "d_state": 2}
STAGES = {"image_size": (48, 64), "depths": (1, 3), "dims": 8, "num_classes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("findings")


def weights(folder, name, options):
    """A file whose weights no seed gives."""
    path = save(folder, name, options)
    save_file({key: 1.25 * value for key, value in load_file(path).items()}, path)
    return path


@pytest.fixture(scope="module")
def stores(folder):
    """A Vim whose weights are in a file, a VMamba that was made in memory, a ViT."""
    from mamba_attn.analytics import Request
    from mamba_attn.datasets import loading, open_data

    data = open_data(cases.folder_of(folder, 2))
    file = weights(folder / "vim_weights", "vim_micro", BIG)
    vit = weights(folder / "vit_weights", "vit_micro", {**cases.OPTIONS["vit_micro"], "image_size": (32, 40)})
    made = {
        "vim": Request(loading.load("vim_micro", str(file)), data, batch=2),
        "vmamba": Request(cases.subject("vmamba_micro", **STAGES), data, batch=2),
        "vit": Request(loading.load("vit_micro", str(vit)), data, batch=2),
    }
    for name, request in made.items():
        collect(request, folder / name)
    return {name: AttentionStore.open(folder / name) for name in made}


@pytest.fixture(scope="module")
def reports(stores, folder):
    return {name: report(name, store, folder / "measured", seeds=2) for name, store in stores.items()}


def test_a_model_is_measured_beside_its_controls(reports):
    found = reports["vim"]
    assert found.notes == []
    assert (found.images, found.groups, found.order) == (6, 6, "raster")
    row = found.row("entropy")
    assert row.trained.low <= row.trained.value <= row.trained.high
    assert len(row.seeds) == 2
    assert row.untrained.low < row.random < row.untrained.high
    assert row.random == pytest.approx(np.mean(row.seeds))
    assert row.order.value == pytest.approx(row.trained.value - row.reordered, abs=1e-9)
    assert row.shuffled == pytest.approx(row.trained.value, abs=1e-5)  # entropy knows no places
    assert found.row("distance").shuffled != pytest.approx(found.row("distance").trained.value, abs=1e-3)
    blocks = [found.row("entropy", place).trained.value for place in found.depths]
    assert row.trained.value == pytest.approx(np.mean(blocks))
    assert found.row("block_silhouette", "stage 0").trained.units == 3  # groups that share no image
    assert found.row("entropy_by_depth") is None  # one number, in one row
    assert found.row("entropy_by_depth", "model").untrained is not None
    assert found.pairs == [3]


def test_further_trained_models_say_what_training_does(stores, folder, tmp_path):
    other = weights(tmp_path, "vim_micro", BIG)
    found = report("vim", stores["vim"], folder / "measured", seeds=2, weights=[other])
    row = found.row("entropy")
    alone = report("vim", stores["vim"], folder / "measured", seeds=2).row("entropy")
    assert (alone.others, alone.training, alone.training_verdict) == ((), None, "")
    assert row.trained == alone.trained
    again = Measuring(stores["vim"], 6, folder / "measured").model(stores["vim"].with_weights(other))[0]
    blocks = [values for (name, _), values in again.values.items() if name == "entropy"]
    assert row.others == (pytest.approx(np.mean(blocks)),)
    assert row.training.value == pytest.approx(np.mean([row.trained.value, *row.others]) - row.random)
    assert row.training.models == 2
    with pytest.raises(WeightsError):
        report("vim", stores["vim"], folder / "measured", seeds=0, weights=[tmp_path / "none.safetensors"])


def test_the_pass_gives_what_the_store_kept(stores, folder):
    measuring = Measuring(stores["vim"], 6, folder / "kept")
    own, kept = measuring.model(stores["vim"].subject, shuffled=True), measuring.kept()
    for one, other in zip(own, kept, strict=True):
        assert one.values.keys() == other.values.keys()
        for key, values in one.values.items():
            if findings.FINDINGS[key[0]].kind == "matrix":
                np.testing.assert_allclose(other.values[key], values, rtol=2e-2, err_msg=str(key))


def test_a_model_made_in_memory_is_measured_by_what_was_kept(reports):
    found = reports["vmamba"]
    assert "the trained model: not measured." in found.notes[0]
    assert "made in memory" in found.notes[0]
    assert found.notes[1] == "the trained numbers are of the matrices that the store kept."
    assert found.row("entropy").random is not None
    assert found.row("entropy").reordered is None
    assert "the random scan order: not measured." in found.notes[2]
    assert found.row("block_silhouette", "stage 1").trained.units == 3
    assert found.row("block_silhouette", "stage 0") is None  # of one block
    assert found.pairs == [3]


def test_softmax_attention_has_no_order_to_change(reports):
    found = reports["vit"]
    assert (found.notes, found.order) == ([], "")
    assert all(row.order is None and row.reordered is None for row in found.rows)
    assert found.row("order_over_raster") is None


def test_random_weights_are_the_architectures_and_the_seeds(stores):
    first, again, other = (stores["vmamba"].untrained(seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    state = torch.random.get_rng_state()
    stores["vim"].untrained(3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_reordering_keeps_the_weights_and_changes_the_routes(stores):
    found = stores["vim"].reordered("spiral")
    assert found.fingerprint == stores["vim"].index.model["fingerprint"]
    assert found.model.order == "spiral"
    with pytest.raises(StoreError, match="a vit_micro has no scan order to change"):
        stores["vit"].reordered("spiral")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"name": "someones_model", "spec": "someones_model"},
            "its model 'someones_model' is not one that mamba_attn.models builds",
        ),
        ({"options": {**BIG, "depth": 2}}, "is another model|has other layers"),
        ({"options": {**BIG, "class_token": "first"}}, "has other layers, grids or orders than the store's"),
        ({"options": {**BIG, "depht": 2}}, "build no vim_micro"),
        ({"options": {**BIG, "order": "rastr"}}, "build no vim_micro"),
    ],
)
def test_a_model_that_cannot_be_rebuilt_still_has_its_trained_numbers(stores, tmp_path, change, sentence):
    path = shutil.copytree(stores["vim"].folder, tmp_path / "store")
    index = json.loads((path / "store.json").read_text())
    index["model"] = {**index["model"], "weights": "", **change}
    (path / "store.json").write_text(json.dumps(index))
    store = AttentionStore.open(path)
    with pytest.raises(StoreError, match=sentence):
        store.untrained(0)
    found = report("store", store, tmp_path / "measured", seeds=2)
    assert any("random weights, seed 0: not measured." in note for note in found.notes)
    assert not any("seed 1" in note for note in found.notes)
    row = found.row("entropy")
    assert row.trained.value > 0
    assert (row.random, row.untrained, row.verdict) == (None, None, "")


def test_layers_that_are_projections_have_means_and_no_intervals(stores, tmp_path, monkeypatch):
    path = shutil.copytree(stores["vmamba"].folder, tmp_path / "store")
    store = AttentionStore.open(path)
    first = store.index.layers[0]
    assert first.exact
    object.__setattr__(first, "exact", False)  # as one of more tokens
    found = report("store", store, tmp_path / "measured", seeds=0)
    assert f"of {first.name} only means and projections are" in found.notes[1]
    assert found.row("entropy", first.name) is None
    assert found.row("grid_locality", first.name).trained.low is None
    assert found.row("image_share", first.name).trained.low is not None
    assert found.row("entropy_by_depth", "model") is None  # a block of it is missing
    assert found.row("image_share_by_depth", "model") is not None


def test_features_of_another_projection_are_refused(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("mamba_attn.analytics.store.feature_size", lambda tokens: 77)
    with pytest.raises(StoreError, match="they are of another projection: collect into a new folder"):
        report("vmamba", stores["vmamba"], tmp_path, seeds=0)


def test_one_image_has_no_intervals_and_nothing_to_compare(stores, tmp_path):
    found = report("vim", stores["vim"], tmp_path, images=1, seeds=1)
    assert found.notes == ["only one image: no intervals, and nothing that compares images."]
    assert found.row("entropy").trained.low is None
    assert found.row("entropy").verdict == ""
    assert found.row("image_share") is None
    assert found.row("block_silhouette") is None


def test_a_killed_call_goes_on_and_other_images_are_measured_anew(stores, tmp_path, monkeypatch):
    passes = []
    forward = Measuring._forward
    monkeypatch.setattr(Measuring, "_forward", lambda *args: (passes.append(args[3]), forward(*args)))
    first = report("vim", stores["vim"], tmp_path, images=2, seeds=1)
    done = len(passes)
    assert done == 3
    again = report("vim", stores["vim"], tmp_path, images=2, seeds=1)
    assert len(passes) == done
    assert again.rows == first.rows
    damaged = next(tmp_path.glob("*-0.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert report("vim", stores["vim"], tmp_path, images=2, seeds=1).rows == first.rows
    assert len(passes) == done + 1
    report("vim", stores["vim"], tmp_path, images=3, seeds=0)
    assert len(passes) > done + 1


def test_a_model_in_random_order_has_no_other(stores, folder, tmp_path):
    from mamba_attn.analytics import Request
    from mamba_attn.datasets import loading, open_data

    file = weights(tmp_path / "weights", "vim_micro", {**BIG, "order": "random"})
    request = Request(loading.load("vim_micro", str(file)), open_data(str(folder / "photos")), 2)
    collect(request, tmp_path / "store")
    found = report("store", AttentionStore.open(tmp_path / "store"), tmp_path / "measured", seeds=0)
    assert found.order == "random"
    assert found.notes == [
        "it was trained in a random order, so there is no comparison with another scan order."
    ]  # fmt: skip
    assert found.row("order_over_raster") is not None


def test_groups_of_images_are_their_means(stores):
    layer = stores["vim"].layers[0]
    block = Block(layer, 25)
    matrices = np.random.default_rng(0).random((25, layer.tokens, layer.tokens), dtype=np.float32)
    block.add(0, matrices[:7])
    block.add(7, matrices[7:])
    patches = layer.layout.patches.numpy()
    assert len(block.means) == findings.GROUPS
    np.testing.assert_allclose(block.means[3], matrices[3::10].mean(0)[np.ix_(patches, patches)], rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate(block.features)[4], compact(matrices[4]))


def test_of_large_grids_some_rows_are_drawn(monkeypatch, stores):
    monkeypatch.setattr("mamba_attn.findings.results.MOST_ROWS", 8)
    layer = stores["vim"].layers[0]
    block = Block(layer, 2, shuffle=0)
    block.add(0, np.random.default_rng(0).random((2, layer.tokens, layer.tokens), dtype=np.float32))
    assert block.sums.shape == (2, 8, 20)
    assert np.isfinite(block.results()[False]["grid_locality"]).all()
    assert block.diagonal.sum() == 8


def test_too_few_patches_have_no_rows(stores):
    small = next(layer for layer in stores["vmamba"].layers if layer.stage == 1)
    block = Block(small, 1)
    object.__setattr__(block, "patches", block.patches[: findings.LEAST - 1])
    assert not any(findings.FINDINGS[name].kind == "rows" for name in block.results()[False])


def test_one_patch_reads_no_other(stores):
    block = Block(stores["vmamba"].layers[-1], 2)
    block.patches, block.points = block.patches[:1], block.points[:1]
    block.sums = block.sums[:, :1, :1]
    tokens = stores["vmamba"].layers[-1].layout.tokens
    block.add(0, np.ones((2, tokens, tokens), np.float32))
    found = block.results()[False]
    assert {findings.FINDINGS[name].kind for name in found} == {"features"}
    other = Block(stores["vmamba"].layers[-1], 2)
    other.patches, other.points, other.sums = block.patches, block.points, np.zeros_like(block.sums)
    other.merge(block.arrays())
    assert other.results()[False].keys() == found.keys()


def test_what_is_saved_is_read_and_damage_is_nothing(tmp_path):
    own = Measured({("entropy", "layer"): np.arange(3.0), ("by", "model"): np.array([np.nan])})
    own.save(tmp_path / "own.npz")
    found = Measured.load(tmp_path / "own.npz")
    assert found.values.keys() == own.values.keys()
    np.testing.assert_array_equal(found.values["by", "model"], [np.nan])
    assert Measured.load(tmp_path / "none.npz") is None
    (tmp_path / "own.npz").write_bytes(b"PK broken")
    assert Measured.load(tmp_path / "own.npz") is None


def made(order, accuracy, value, model="vmamba_micro", **options):
    rows = [Row("entropy", ALL, Estimate(value, value - 1, value + 1, 9))]
    return Report(order, model, {"image_size": 64, "order": order, **options}, order, 9, 9, rows, accuracy=accuracy)


def test_what_goes_with_accuracy_is_compared_over_orders_and_not_over_seeds():
    values = {"raster": 1.0, "morton": 2.0, "spiral": 3.0, "diagonal": 4.0, "random": 5.0}
    reports = [
        made(order, 70 - value + shift, value + shift) for order, value in values.items() for shift in (-0.2, 0.2)
    ]
    reports += [made("raster", 99, 9, image_size=128), made("hilbert", None, 3), made("", 50, 1, "vit_micro")]
    (found,) = over_orders(reports)
    assert list(found.accuracy) == list(values)
    assert all(len(each) == 2 for each in found.accuracy.values())
    assert found.spread == pytest.approx(4)
    assert found.seeds_spread == pytest.approx(0.4)
    assert found.chance < 0.01
    assert found.correlations["entropy"].correlation == pytest.approx(-1)
    assert found.correlations["entropy"].count == 5
    sentence = orders_sentence(found)
    assert "top-1 of 10 models in 5 orders differs by 4.00 points" in sentence
    assert "orders differ more than by chance" in sentence
    assert "rank correlation -1.00 over 5 orders, p = 0.017" in sentence


def test_orders_that_differ_as_their_seeds_do_and_too_few_orders():
    random = np.random.default_rng(0)
    noise = [made(order, 70 + random.standard_normal(), 1.0) for order in ("raster", "morton") for _ in range(4)]
    (found,) = over_orders(noise)
    assert found.chance > 0.05
    assert "no more than by chance" in orders_sentence(found)
    assert "too few orders" in orders_sentence(found)
    single = over_orders([made("raster", 70, 1), made("morton", 71, 2)])[0]
    assert single.chance is None
    assert "With one seed each, this cannot be distinguished" in orders_sentence(single)


def test_accuracy_comes_from_the_card_beside_the_weights(stores, tmp_path):
    assert known_accuracy(stores["vim"]) is None  # a card without top1
    card = stores["vim"].folder.parent / "vim_weights" / "w.json"
    before = card.read_text()
    try:
        card.write_text(json.dumps({**json.loads(before), "top1": 71.5}))
        assert known_accuracy(stores["vim"]) == 71.5
        card.write_text("broken")
        assert known_accuracy(stores["vim"]) is None
    finally:
        card.write_text(before)


def test_verdicts_are_sentences(reports):
    claims = [name for name, finding in findings.FINDINGS.items() if finding.claim == (">", 0)][:2]
    found = Report("mine", "vim_micro", {}, "raster", 3, 3, [
        Row(claims[0], ALL, Estimate(0.5, 0.4, 0.6, 3)), Row(claims[1], ALL, Estimate(0.1, -0.2, 0.3, 3)),
    ])  # fmt: skip
    first, holds, undecided = verdicts(found)
    assert first == "1 of 2 claims of the paper hold for mine."
    assert holds == f"Holds: {findings.FINDINGS[claims[0]].title} (0.5; the paper says > 0)."
    assert undecided.startswith(f"Open, as the interval contains the bound: {findings.FINDINGS[claims[1]].title}")
    measured = verdicts(reports["vim"])[-1]
    outside = [row for row in reports["vim"].rows if row.place in (ALL, "model") and row.verdict in ("above", "below")]
    assert measured.startswith(f"{len(outside)} of ")
    assert verdicts(Report("none", "", {}, "", 1, 1)) == []


def test_verdicts_are_read_from_intervals():
    def row(name, low, high):
        return Row(name, ALL, Estimate((low + high) / 2, low, high, 9), order=Estimate(0, low, high, 9))

    assert row("preceding_lift", 1.1, 2).claimed == "holds"
    assert row("preceding_lift", 0.9, 2).claimed == "open"
    assert row("block_correlation", 0.1, 0.2).claimed == "fails"
    assert row("entropy", 0.1, 0.2).claimed == ""
    said = [row("entropy", *each).order_verdict for each in ((-1, 1), (1, 2), (-2, -1))]
    assert said == ["no difference", "more", "less"]
    assert Row("entropy", ALL, Estimate(1.0, None, None, 1)).order_verdict == ""


def test_ranks_measure_each_part_once_and_as_one_process_does(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("mamba_attn.findings.measure._PART", 2)
    monkeypatch.setattr("mamba_attn.findings.measure._PARTS", 3)
    whole = report("vim", stores["vim"], tmp_path / "alone", seeds=2)
    seen, forward = [], Measuring._forward

    def noted(self, subject, blocks, start, stop):
        seen.append((subject.fingerprint, subject.options.get("order"), start, stop))
        return forward(self, subject, blocks, start, stop)

    monkeypatch.setattr(Measuring, "_forward", noted)
    for rank in (1, 0):
        found = report("vim", stores["vim"], tmp_path / "two", seeds=2, ranks=Ranks(rank, 2, launcher="a job array"))
        assert (found.left > 0, bool(found.rows)) == ((True, False) if rank else (False, True))
    assert len(seen) == len(set(seen)) == 4 * 3  # models, and parts of each
    assert found.rows == whole.rows
    assert not list((tmp_path / "two").glob("*.parts"))
    alone, two = ({path.name: path for path in (tmp_path / name).iterdir()} for name in ("alone", "two"))
    assert alone.keys() == two.keys()
    for name, path in alone.items():
        own, other = (Measured.load(each).values for each in (path, two[name]))
        assert own.keys() == other.keys()
        assert all(np.array_equal(own[key], other[key], equal_nan=True) for key in own)


def test_what_another_job_is_still_writing_is_no_part(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("mamba_attn.findings.measure._PART", 2)
    monkeypatch.setattr("mamba_attn.findings.measure._PARTS", 3)
    own = LocalPlace.create

    def slow(place, name, content):  # the other job is killed in the middle of its part
        target = place.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in range(3):
            target.with_name(f"{number:04d}.npz.12345678.new").touch()
        return own(place, name, content)

    monkeypatch.setattr(LocalPlace, "create", slow)
    found = report("vim", stores["vim"], tmp_path / "two", seeds=2, ranks=Ranks(0, 2, launcher="a job array"))
    assert found.left > 0
    assert not found.rows


def test_a_killed_model_goes_on_at_its_part(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("mamba_attn.findings.measure._PART", 2)
    monkeypatch.setattr("mamba_attn.findings.measure._PARTS", 3)
    seen, forward = [], Measuring._forward

    def killed(self, subject, blocks, start, stop):
        seen.append(start)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return forward(self, subject, blocks, start, stop)

    monkeypatch.setattr(Measuring, "_forward", killed)
    measuring = Measuring(stores["vim"], 6, tmp_path / "measured")
    with pytest.raises(KeyboardInterrupt):
        measuring.model(stores["vim"].subject)
    again = measuring.model(stores["vim"].subject)
    assert seen == [0, 2, 2, 4]
    monkeypatch.setattr(Measuring, "_forward", forward)
    once = Measuring(stores["vim"], 6, tmp_path / "other").model(stores["vim"].subject)
    for key, values in once[0].values.items():
        np.testing.assert_array_equal(again[0].values[key], values)


def test_what_one_rank_cannot_measure_is_said_by_all(stores, tmp_path, monkeypatch):
    def damaged(self, subject, blocks, start, stop):
        raise StoreError("pixels are damaged")

    monkeypatch.setattr(Measuring, "_forward", damaged)
    for rank in (1, 0):
        ranks = Ranks(rank, 2, launcher="a job array")
        found = report("vim", stores["vim"], tmp_path / "two", seeds=0, ranks=ranks)
    assert found.notes[0] == "the trained model: not measured. pixels are damaged"
    assert found.rows  # of what the store kept


def test_a_block_in_parts_is_the_block_and_keeps_few_points(stores, monkeypatch):
    monkeypatch.setattr("mamba_attn.findings.results.MOST_POINTS", 12)
    layer, matrices = stores["vim"].layers[0], np.random.default_rng(0)
    matrices = matrices.random((30, stores["vim"].layers[0].tokens, stores["vim"].layers[0].tokens), dtype=np.float32)
    whole, merged = Block(layer, 30, shuffle=0), Block(layer, 30, shuffle=0)
    whole.add(0, matrices)
    for start in range(0, 30, 10):
        part = Block(layer, 30, shuffle=0)
        part.add(start, matrices[start : start + 10])
        merged.merge(part.arrays())
    assert sum(map(len, whole.features)) == sum(map(len, merged.features)) == 12
    for shuffled, its in whole.results().items():
        for name, values in merged.results()[shuffled].items():
            np.testing.assert_allclose(values, its[name], rtol=1e-4, atol=1e-6, err_msg=name)
