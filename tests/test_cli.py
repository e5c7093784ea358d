import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mamba_attn import cli, images, models
from mamba_attn.attribution import AttentionRollout, RawAttention

ROOT = Path(__file__).parent.parent
CLASSES = ["dress", "hat", "[red]not markup[/red]"]
VIM = {"image_size": 32, "depth": 2, "embed_dim": 16, "d_state": 2, "num_classes": 3}


def save(folder, name, options, classes=CLASSES):
    """Random weights and their card."""
    torch.manual_seed(0)
    model = models.create(name, **options)
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "w.safetensors")
    (folder / "w.json").write_text(json.dumps({"options": options, "classes": classes}))
    return str(folder / "w.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights"), "vim_micro", VIM)


@pytest.fixture
def photos(tmp_path):
    """Two good images of the same name, in two folders, and one that is truncated."""
    for folder, source in zip(("one", "two"), images.samples(), strict=False):
        (tmp_path / folder).mkdir()
        shutil.copyfile(source, tmp_path / folder / "a.jpg")
    (tmp_path / "one" / "broken.jpg").write_bytes(images.samples()[0].read_bytes()[:3000])
    return tmp_path


def run(cwd, *arguments):
    command = [sys.executable, "-m", "mamba_attn.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    return result


def refused(capsys, *arguments):
    """What main says on stderr about a call that it refuses."""
    assert cli.main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mamba-attn explain: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_defaults_explain_the_images_of_the_package(tmp_path):
    result = run(tmp_path, "explain")
    assert result.returncode == 0, result.stderr
    assert "6 of 6 images explained; pictures and arrays are in mamba_attn_explain" in result.stdout
    assert result.stdout.count("%") == 6 * 5
    files = {path.name for path in (tmp_path / "mamba_attn_explain").iterdir()}
    assert files == {f"{path.stem}{suffix}" for path in images.samples() for suffix in (".png", ".npz")}


def test_a_broken_image_is_named_and_the_rest_done(photos, weights):
    (photos / "text.png").write_text("hello")
    result = run(photos, "explain", "one", "two", "text.png", "--weights", weights, "--out", "out/here")
    assert result.returncode == 1
    assert "skipped: one/broken.jpg: the image is damaged or incomplete" in result.stderr
    assert "skipped: text.png: this is not an image" in result.stderr
    assert "2 of 4 images explained; pictures and arrays are in out/here" in result.stdout
    assert "[red]not markup[/red]" in result.stdout
    assert {path.name for path in (photos / "out/here").iterdir()} == {"a.png", "a.npz", "a-2.png", "a-2.npz"}
    first, second = (np.load(photos / "out/here" / name) for name in ("a.npz", "a-2.npz"))
    assert not np.array_equal(first["image"], second["image"])


def test_usage_errors_end_with_two_and_one_sentence(tmp_path):
    result = run(tmp_path, "explain", "--model", "vim_micor")
    assert result.returncode == 2
    assert result.stderr.startswith("mamba-attn explain: create('vim_micor'): no such model. Did you mean 'vim_micro'")
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_those_of_the_methods(photos, weights):
    assert cli.main(["explain", str(photos / "two"), "--weights", weights, "--out", str(photos / "out")]) == 0
    arrays = np.load(photos / "out" / "a.npz")
    picture = images.crop(images.read(photos / "two" / "a.jpg"), (32, 32))
    assert np.array_equal(arrays["image"], picture)
    model, inputs = models.create("vim_micro", weights=weights, **VIM), images.normalise(picture[None])
    raw, rollout = RawAttention(model), AttentionRollout(model)
    np.testing.assert_array_equal(arrays["raw_attention"], raw.attribute(inputs)[0, 0].numpy())
    np.testing.assert_array_equal(arrays["rollout"], rollout.attribute(inputs)[0, 0].numpy())
    assert arrays["layers"].tolist() == ["layers.0.mixer", "layers.1.mixer"]
    for name, row in raw.rows(inputs).items():
        np.testing.assert_array_equal(arrays[f"row.{name}"], row[0].numpy())
    with torch.no_grad():
        np.testing.assert_allclose(arrays["probabilities"], model(inputs).softmax(1)[0].numpy(), atol=1e-7)
    assert arrays["classes"].tolist() == CLASSES


def test_the_picture_shows_the_crop_and_the_maps_on_it(photos, weights):
    assert cli.main(["explain", str(photos / "two"), "--weights", weights, "--out", str(photos / "out")]) == 0
    sheet = np.asarray(Image.open(photos / "out" / "a.png")).astype(int)
    crop = Image.fromarray(np.load(photos / "out" / "a.npz")["image"]).resize((256, 256), Image.Resampling.BICUBIC)
    panels = [sheet[8:264, left : left + 256] for left in (8, 272, 536)]
    assert sheet.shape[1] == 3 * 256 + 4 * 8
    assert np.array_equal(panels[0], np.asarray(crop))
    for panel in panels[1:]:
        assert np.abs(panel - panels[0]).max() > 50
        assert np.corrcoef(panel.mean(2)[::8].ravel(), panels[0].mean(2)[::8].ravel())[0, 1] > 0.1


def test_a_model_of_four_stages_and_names_for_nameless_classes(photos, tmp_path, capsys):
    options = {"image_size": [64, 32], "depths": [1, 1, 1], "dims": 16, "num_classes": 4}
    path = save(tmp_path / "vmamba", "vmamba_micro", options, classes=[])
    arguments = ["explain", str(photos / "two"), "--model", "vmamba_micro", "--weights", path]
    assert cli.main([*arguments, "--out", str(photos / "out")]) == 0
    arrays = np.load(photos / "out" / "a.npz")
    assert arrays["rollout"].shape == arrays["raw_attention"].shape == (64, 32)
    assert [arrays[f"row.{name}"].shape for name in arrays["layers"]] == [(128,), (32,), (8,)]
    assert "class 3" in capsys.readouterr().out


def test_a_vit(photos, tmp_path):
    options = {"image_size": 32, "depth": 2, "embed_dim": 32, "num_classes": 3}
    path = save(tmp_path / "vit", "vit_micro", options)
    arguments = ["explain", str(photos / "two"), "--model", "vit_micro", "--weights", path]
    assert cli.main([*arguments, "--out", str(photos / "out")]) == 0
    arrays = np.load(photos / "out" / "a.npz")
    assert arrays["layers"].tolist() == ["blocks.0.attn", "blocks.1.attn"]
    np.testing.assert_allclose(arrays["row.blocks.1.attn"].sum(), 1, atol=1e-6)
    assert arrays["rollout"].shape == (32, 32)


def test_official_models_see_the_crop_that_they_were_measured_with(photos, tmp_path):
    path = save(tmp_path / "tiny", "vim_tiny", {**VIM, "image_size": [32, 48]})
    arguments = ["explain", str(photos / "two"), "--model", "vim_tiny", "--weights", path]
    assert cli.main([*arguments, "--out", str(photos / "out")]) == 0
    picture = images.read(photos / "two" / "a.jpg")
    expected = images.crop(picture, (32, 48), cover=(36, 54), interpolation="bicubic")
    assert np.array_equal(np.load(photos / "out" / "a.npz")["image"], expected)


def test_activations_that_are_not_finite_are_an_error_of_the_image(photos, tmp_path, capsys):
    path = save(tmp_path / "nan", "vim_micro", VIM)
    state = models.create("vim_micro", weights=path, **VIM).state_dict()
    state["layers.1.mixer.in_proj.weight"][:] = torch.nan
    save_file(state, path)
    assert cli.main(["explain", str(photos / "two"), "--weights", path, "--out", str(photos / "out")]) == 1
    captured = capsys.readouterr()
    assert "skipped: layers.1.mixer:" in captured.err
    assert "NaN or Inf" in captured.err
    assert "0 of 1 images explained" in captured.out


def test_imagenets_classes_have_names():
    names = cli._class_names(models.create("vim_micro", depth=1, num_classes=1000), {})
    assert len(names) == 1000
    assert names[0] == "tench"


def test_files_of_the_same_name_get_numbers():
    paths = [Path(name) for name in ("x/a.jpg", "y/a.png", "a-2.jpg", "z/a.jpg", "b.jpg")]
    assert cli._names(paths) == ["a", "a-2", "a-2-2", "a-3", "b"]


def test_images_that_are_not_there(capsys, tmp_path):
    assert "there is no file or folder 'none.png'" in refused(capsys, "none.png", "--out", str(tmp_path / "out"))
    assert "holds no images" in refused(capsys, str(tmp_path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there_or_do_not_fit(capsys, weights, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    assert "no demo weights come for this model" in refused(capsys, "--model", "vmamba_base_s1l20", *out)
    assert "there is no such file" in refused(capsys, "--weights", str(tmp_path / "w.pth"), *out)
    assert "do not fit" in refused(capsys, "--weights", weights, "--model", "vim_tiny", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("{", r"w.json: this card beside the weights is not JSON"),
        ("[1]", "w.json: expected a card with 'options'"),
        ('{"options": 3}', "w.json: expected a card with 'options'"),
        ('{"options": {"depht": 2}}', "depht"),
    ],
)
def test_cards_that_are_none(capsys, weights, tmp_path, card, message):
    shutil.copyfile(weights, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(card)
    said = refused(capsys, "--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "out"))
    assert message in said


def test_a_folder_that_cannot_be_written(capsys, weights, tmp_path):
    (tmp_path / "file").touch()
    said = refused(capsys, "--weights", weights, "--out", str(tmp_path / "file" / "out"))
    assert "file/out: this folder cannot be written (Not a directory); name another." in said


def test_a_device_that_is_not_there(capsys, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(capsys, "--weights", weights, "--device", "cuda", "--out", str(tmp_path / "out"))
    assert "--device cuda: PyTorch sees no CUDA device here; use --device cpu." in said


def test_missing_extras_are_named_with_the_remedy(capsys, monkeypatch):
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name in ("PIL", "rich") else found(name))
    assert "pillow and rich not installed: pip install 'mamba_attn[explain]'" in refused(capsys)


def test_only_what_exists_is_offered(capsys):
    for arguments in ([], ["compare"], ["explain", "--method", "all"], ["explain", "--device", "tpu"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "explain" in shown
    assert "compare" not in shown
