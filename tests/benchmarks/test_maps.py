import io
import json
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import boxes, images, maps, methods, run, scores
from benchmarks.measure import wall_seconds
from mamba_attn import models
from mamba_attn.evaluation.intervals import Interval

SIZES = [(16, 16), (17, 23)]
TINY = {
    "vim_micro": {"depth": 2, "embed_dim": 16, "num_classes": 3, "image_size": 32},
    "vmamba_micro": {"depths": (1, 1), "dims": 8, "num_classes": 3, "image_size": 32},
    "vit_micro": {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3, "image_size": 32},
}


@pytest.fixture(autouse=True)
def _threads():
    """run.main sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _jpeg(array):
    data = io.BytesIO()
    Image.fromarray(array).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The three zips, tiny: five boxed images of which four count, twelve validation images."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    rows = ["file,label,name,boxes_xyxy_in_224,box_union_fraction"]
    with zipfile.ZipFile(folder / "localise.zip", "w") as archive:
        for index, side in enumerate((64, 128, 96, 160, 192)):
            archive.writestr(
                f"imagenette_boxes224/images/{index}.JPEG", _jpeg(random.integers(0, 256, (224, 224, 3), np.uint8))
            )
            rows.append(f'images/{index}.JPEG,0,tench,"[[16, 32, {16 + side}, {32 + side}]]",{(side / 224) ** 2:.4f}')
        archive.writestr("imagenette_boxes224/boxes.csv", "\n".join(rows))
    for name in images.COLLECTIONS["objects"].sets:
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            files = [f"val/{index}.jpg" for index in range(6)]
            for file in files:
                archive.writestr(file, _jpeg(random.integers(0, 256, (40, 32, 3), np.uint8)))
            archive.writestr("labels.csv", "\n".join(["file,label,name", *(f"{file},0,only" for file in files)]))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, options in TINY.items():
        torch.manual_seed(0)
        save_file(models.create(name, **options).state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps({"options": options, "top1": 33.3}))
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_energy_of_a_uniform_map_is_the_area_and_of_one_inside_is_all(size):
    inside = _noise(3, *size)
    area = inside.double().mean((1, 2)).numpy()
    assert scores.energy_inside(torch.full((3, *size), 0.3), inside) == pytest.approx(area, rel=1e-12)
    box = torch.zeros(2, *size)
    box[:, 3:9, 5:8] = 1
    area = box.double().mean((1, 2)).numpy()
    assert scores.energy_inside(box * _noise(2, *size), box) / area == pytest.approx(1 / area, rel=1e-12)
    assert scores.energy_inside((1 - box) * _noise(2, *size), box).tolist() == [0, 0]


def test_energy_is_of_the_positive_part_and_nothing_positive_is_nothing_known():
    inside = torch.zeros(1, 4, 4)
    inside[:, :2] = 1
    values = torch.where(inside > 0, 3.0, -5.0)
    values[0, 3, 3] = 8.0
    assert scores.energy_inside(values, inside) == pytest.approx([24 / 32])
    assert scores.energy_inside(values, inside) == pytest.approx(scores.energy_inside(1e-20 * values, inside))
    assert scores.energy_inside(-values.abs(), inside) == pytest.approx([0.5])


def test_maps_that_no_model_made():
    inside = torch.zeros(400, 40, 36)
    inside[:, 3:25, 14:33] = 1
    random = scores.energy_inside(scores.random_map((400, 40, 36), 0), inside) / inside.double().mean((1, 2)).numpy()
    assert random.mean() == pytest.approx(1, abs=0.02)
    assert random.std() > 0.05
    centred = scores.centred_map((1, 41, 35))[0]
    assert centred.argmax() == 20 * 35 + 17
    assert torch.allclose(centred, centred.flip(0, 1))


def test_only_images_with_small_boxes_are_read(data, tmp_path):
    found = boxes.load(data, models.transform("vim_micro", 32))
    assert found.pixels.shape == (3, 32, 32, 3)
    side = found.inside.mean((1, 2)).sqrt().sort().values * 224
    assert side.tolist() == pytest.approx([64, 96, 128], rel=1e-4)
    (batch, rest) = found.batches(2)
    assert (len(batch), len(rest)) == (2, 1)
    expected = models.transform("vim_micro", 32)(Image.fromarray(found.pixels[2]))
    torch.testing.assert_close(rest[0], expected)
    assert len(boxes.load(data, models.transform("vim_micro", 32), limit=2)) == 2
    with pytest.raises(FileNotFoundError, match=r"expected localise\.zip there"):
        boxes.load(tmp_path, models.transform("vim_micro", 32))


@pytest.mark.parametrize("size", SIZES)
def test_the_highest_cells_are_taken(size):
    values = _noise(4, *size)
    top = scores.top_cells(values, 0, cell=5, fraction=0.25)
    assert top.shape == values.shape
    rows, columns = -(-size[0] // 5), -(-size[1] // 5)
    for one, where in zip(values, top, strict=True):
        cells = {(r, c): one[5 * r : 5 * r + 5, 5 * c : 5 * c + 5].mean() for r in range(rows) for c in range(columns)}
        highest = sorted(cells, key=cells.get, reverse=True)[: round(0.25 * rows * columns)]
        expected = torch.zeros(size, dtype=torch.bool)
        for r, c in highest:
            expected[5 * r : 5 * r + 5, 5 * c : 5 * c + 5] = True
        assert torch.equal(where, expected)


def test_equal_cells_are_taken_at_random():
    zeros = torch.zeros(300, 40, 40)
    first, again, other = (scores.top_cells(zeros, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.float().mean((1, 2)) == 0.2).all()  # 5 of 25 cells
    assert first.float().mean(0).sub(0.2).abs().max() < 0.08
    zeros[:, :8, 8:16] = 1
    assert scores.top_cells(zeros, 1)[:, :8, 8:16].all()


class Corner(torch.nn.Module):
    """A model that sees the mean of the cells in one corner, an eighth of an image of 64 pixels."""

    def forward(self, x):
        logit = x[:, :, :16, :32].mean((1, 2, 3))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


class Known:
    """A method that always says the same: where the corner is, or where it is not."""

    def __init__(self, sign):
        self.sign = sign

    def __str__(self):
        return f"known, {self.sign}"

    def build(self, model):
        corner = torch.zeros(1, 64, 64)
        corner[:, :16, :32] = self.sign
        return lambda inputs: corner.expand(len(inputs), -1, -1) - min(self.sign, 0)


def test_deletion_where_the_truth_is_known():
    count = 30
    white = np.full(count * 64 * 64 * 3, 255, np.uint8)
    table = np.array([[0, index * 64 * 64 * 3, 64, 64, 0] for index in range(count)])
    its = methods.Setting("toy", Corner(), (64, 64), {}, (Known(1), Known(-1)))
    found = maps.measure_deletion(its, images.Images([white], table, ["white"]))
    x = next(images.evaluation_batches(images.Images([white], table, ["white"]), 64, 1))[0]
    probability = torch.sigmoid(x.mean()).item()
    assert found["mean probability"] == pytest.approx(probability)
    right, wrong = found["methods"]["known, 1"], found["methods"]["known, -1"]
    assert right["drop"].value == pytest.approx(probability - 0.5)
    assert right["drop"].low == pytest.approx(right["drop"].high)
    assert wrong["drop"].value == 0
    # random 13 of 64 cells: on average that share of the corner's 8; the sigmoid is concave here, so a little less
    assert 0.5 < found["random drop"].value / (right["drop"].value * 13 / 64) < 1
    assert found["random drop"].low < found["random drop"].value < found["random drop"].high
    assert right["ratio"].value == pytest.approx(right["drop"].value / found["random drop"].value)
    assert right["another image"] == right["ratio"]  # all maps are the same
    assert found["ceiling"] == pytest.approx(probability / found["random drop"].value)
    assert found["controls"]["another random choice"]["ratio"].value == pytest.approx(1, abs=0.35)


def test_deletion_by_another_images_map():
    """The two images are bright in different halves, and the model sees brightness alone."""
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    pixels[0, :32], pixels[1, 32:] = 255, 255
    split = images.Images([pixels.reshape(-1)], np.array([[0, i * 64 * 64 * 3, 64, 64, 0] for i in (0, 1)]), ["half"])

    class Bright(torch.nn.Module):
        def forward(self, x):
            logit = x.clamp(min=0).mean((1, 2, 3))
            return torch.stack([logit, torch.zeros_like(logit)], dim=1)

    right = SimpleNamespace(build=lambda model: lambda inputs: inputs.mean(1))
    found = maps.measure_deletion(methods.Setting("toy", Bright(), (64, 64), {}, (right,)), split)
    (judged,) = found["methods"].values()
    assert judged["ratio"].value > 1.5
    assert judged["another image"].value == 0


def test_another_images_map_is_worth_what_it_shows_of_this_one():
    inside = torch.zeros(2, 8, 8)
    inside[0, :4], inside[1, 4:] = 1, 1
    boxed = boxes.BoxedImages(np.zeros((2, 8, 8, 3), np.uint8), inside)
    right = SimpleNamespace(build=lambda model: lambda inputs: inside)
    found = maps.measure_energy(methods.Setting("toy", Corner(), (8, 8), {}, (right,)), boxed)
    (judged,) = found["methods"].values()
    assert found["mean area"] == 0.5
    assert (judged["ratio"].value, judged["ratio of means"].value, judged["another image"].value) == (2, 2, 0)


def test_the_headline_is_the_best_default_not_the_best_variant():
    def entry(value):
        return {"ratio": Interval(value, value - 0.2, (value - 0.1, value + 0.1), value + 0.2)}

    found = {
        "images": 156,
        "methods": {
            "RawAttention": entry(1.1), "AttentionRollout": entry(1.3), "MambaAttribution": entry(1.2),
            "MambaAttribution, rule=paper": entry(9.0),
        },
    }  # fmt: skip
    row = maps.headline("vim_micro energy", found).row()
    assert (row["how"], row["value"], row["rounds"], row["met"]) == ("AttentionRollout", 1.3, 156, True)
    assert row["quartiles"] == pytest.approx([1.2, 1.4])
    assert maps.headline("vit_micro energy", found) is None
    assert maps.headline("vim_micro energy", {"methods": {"MambaAttribution, rule=paper": entry(9.0)}}) is None


@pytest.mark.full
def test_everything_is_measured_from_end_to_end(data, weights, tmp_path, capsys):
    run.main([
        "maps", "--data", str(data), "--cache", str(tmp_path), "--weights", str(weights), "--out", str(tmp_path),
        "--parts", "energy", "deletion",
    ])  # fmt: skip
    for name, count, figures in (("vim_micro", 16, 2), ("vmamba_micro", 14, 2), ("vit_micro", 3, 0)):
        written = json.loads((tmp_path / f"maps_{name}.json").read_text())
        assert written["quick"]  # other weights than the committed ones
        assert len(written["figures"]) == figures
        details = written["details"]
        assert details["pixels"] == [32, 32]
        assert details["energy"]["images"] == 3
        assert details["deletion"]["images"] == 12
        for part in ("energy", "deletion"):
            assert len(details[part]["methods"]) == count
            for row in details[part]["methods"].values():
                assert np.isfinite([row["ratio"][key] for key in ("value", "low", "high")]).all()
    table = capsys.readouterr().out
    assert "AttentionRollout, convention=implicit_unified" in table
    assert "centred Gaussian" in table


def test_methods_are_chosen_by_pattern(weights):
    chosen = methods.setting("vim_micro", weights, ["Raw*", "*, rule=*"]).methods
    assert [str(method) for method in chosen] == [
        "RawAttention", "RawAttention, signed=True", "MambaAttribution, rule=paper",
        "MambaAttribution, rule=published_code", "RawAttention, convention=hidden_mamba",
        "RawAttention, convention=implicit_unified",
    ]  # fmt: skip


def test_images_must_be_given(tmp_path):
    with pytest.raises(SystemExit, match="--data FOLDER is missing"):
        run.main(["maps", "--parts", "energy", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ([], True), (["--data", "x", "--runs", "3"], True), (["--limit", "5"], False), (["--methods", "Raw*"], False),
        (["--models", "vim_micro"], True), (["--weights", "x"], False), (["--parts", "time"], True),
        (["--parts", "time", "energy"], False), (["--methods", "*n", "*Rollout"], True),
        (["--parts", "time", "deletion", "energy"], True),
    ],
)  # fmt: skip
def test_what_leaves_something_out_does_not_replace_the_committed_figures(options, whole, monkeypatch):
    asked = []
    monkeypatch.setattr(maps, "run_maps", lambda args: [("maps_x", [], {})])
    monkeypatch.setattr(run, "finish", lambda what, figures, details, path, quick: asked.append((path, quick)))
    run.main(["maps", *options])
    assert asked == [(run.RESULTS / "maps_x.json", False) if whole else (None, True)]


def test_a_command_is_timed_in_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    check = "import os, sys, time; assert not os.listdir(sys.argv[1]); assert 'OMP_NUM_THREADS' not in os.environ; "
    seconds = wall_seconds([sys.executable, "-c", check + "open('file', 'w'); time.sleep(0.1)", "{folder}"], 2)
    assert len(seconds) == 2
    assert 0.1 < min(seconds) <= max(seconds) < 5
    with pytest.raises(RuntimeError, match=r"(?s)failed: .*AssertionError"):
        wall_seconds([sys.executable, "-c", "assert False"], 1)


def test_the_time_of_the_command_is_a_figure(monkeypatch):
    monkeypatch.setattr(maps, "wall_seconds", lambda command, runs: [30.0, 9.0, 10.0, 12.0][:runs])
    found, details = maps.measure_time(3)
    assert found.row()["value"] == 10
    assert (details["first"], details["seconds"]) == (30, [9, 10, 12])
    assert maps.EXPLAIN[1:4] == ["-m", "mamba_attn.commands.cli", "explain"]
