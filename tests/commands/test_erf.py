"""mamba-attn erf from end to end, and what it refuses."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamba_attn import images
from mamba_attn.commands import cli
from mamba_attn.commands import erf as command
from mamba_attn.datasets import loading, open_data
from mamba_attn.erf.fields import FieldSum, receptive_field
from mamba_attn.images import normalise
from mamba_attn.models import transform as transform_of
from tests.datasets.cases import boxes_zip, class_folders
from tests.explanations.cases import VIM, VIT, VMAMBA, photo, save


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    pairs = [("vim_micro", VIM), ("vmamba_micro", VMAMBA), ("vit_micro", VIT)]
    return {name: save(folder / name, name, options) for name, options in pairs}


@pytest.fixture
def photos(tmp_path):
    for which in range(2):
        photo(tmp_path / "photos", f"{which}.jpg", which)
    return str(tmp_path / "photos")


def erf(*arguments):
    return cli.main(["erf", *map(str, arguments)])


def refused(capsys, *arguments):
    assert erf(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mamba-attn erf: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_size_that_is_not_square_beside_random_weights(tmp_path, weights, photos, capsys):
    out = tmp_path / "new" / "out"
    options = ["--weights", weights["vim_micro"], "--size", "24,56", "--untrained", "--seed", "5", "--out", out]
    assert erf(photos, *options) == 0
    captured = capsys.readouterr()
    assert "at the output of layers.1.mixer; distances in pixels" in captured.out
    assert f"open {out / 'erf.html'}" in captured.out
    assert {path.name for path in out.iterdir()} == {"erf.html", "erf.npz", "erf.png", "measured"}
    with np.load(out / "erf.npz") as arrays:
        assert arrays["erf"].shape == arrays["untrained.erf"].shape == (24, 56)
        assert arrays["images"] == 2
        assert arrays["row.layers.0.mixer"].shape == (3, 7)
        assert not np.array_equal(arrays["erf"], arrays["untrained.erf"])
        assert str(arrays["command"]).startswith("mamba-attn erf ")
    page = (out / "erf.html").read_text()
    assert "untrained: rollout" in page
    assert "plotly" not in page
    with Image.open(out / "erf.png") as picture:
        assert picture.width > 500


def test_other_models_queries_and_layers(tmp_path, weights, photos, capsys):
    calls = [
        ("vmamba_micro", ["--query", "10,20", "--layer", "1"], "pixel 10, 20 at the output of layers.1.blocks.0.op"),
        ("vim_micro", ["--query", "class", "--limit", "1"], "the class token at the output of layers.1.mixer"),
        (
            "vit_micro",
            ["--box", "0,0,16,16", "--layer", "blocks.0.attn"],
            "the marked box at the output of blocks.0.attn",
        ),
    ]
    for name, options, sentence in calls:
        where = ["--out", tmp_path / name]
        assert erf(photos, "--model", name, "--weights", weights[name], *options, *where) == 0
        assert sentence in capsys.readouterr().out
        with np.load(tmp_path / name / "erf.npz") as arrays:
            assert arrays["images"] == (1 if "--limit" in options else 2)


def test_broken_images_are_named_and_the_rest_done(tmp_path, weights, photos, capsys):
    (tmp_path / "photos" / "broken.jpg").write_bytes(images.samples()[0].read_bytes()[:3000])
    assert erf(photos, "--weights", weights["vim_micro"], "--out", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.err.count("skipped: ") == 1
    assert "broken.jpg: the image is damaged" in captured.err
    with np.load(tmp_path / "out" / "erf.npz") as arrays:
        assert arrays["images"] == 2


def test_a_collection_is_averaged_image_by_image(tmp_path, weights, capsys):
    """Of a folder in classes and of a part of a zip; not square; a fair sample; what is broken is named."""
    folder = class_folders(tmp_path / "photos", 2)
    boxes_zip(tmp_path / "a.zip")
    (folder / "red" / "broken.png").write_bytes(b"no image")
    options = ["--weights", weights["vim_micro"], "--size", "24,56"]
    assert erf("--data", folder, *options, "--out", tmp_path / "all") == 1
    assert capsys.readouterr().err.count("red/broken.png: this is not an image") == 1
    data, transform = open_data(str(folder)), transform_of("vim_micro", (24, 56))
    good = [number for number in data.chosen() if "broken" not in data.items[number].key]
    model = loading.load("vim_micro", weights["vim_micro"]).model
    each = [
        receptive_field(model, normalise(data.load(number, transform).pixels[None]), reach=False) for number in good
    ]
    with np.load(tmp_path / "all" / "erf.npz") as arrays:
        assert arrays["images"] == 6
        expected = np.mean([one.gradient for one in each], axis=0)
        assert np.abs(arrays["erf"] - expected).max() <= 1e-6 * expected.max()
        assert arrays["row.layers.1.mixer"].shape == (3, 7)
    assert erf("--data", f"{tmp_path / 'a.zip'}:boxes", "--limit", 4, *options, "--out", tmp_path / "four") == 0
    with np.load(tmp_path / "four" / "erf.npz") as arrays:
        assert arrays["images"] == 4


@pytest.mark.parametrize("data", [True, False])
def test_what_is_measured_serves_another_limit_as_long_as_the_image_stays(tmp_path, weights, photos, monkeypatch, data):
    """Of a collection and of files: one that comes or changes is measured, the others are not measured again."""
    measured = []
    monkeypatch.setattr(FieldSum, "add", lambda self, image, add=FieldSum.add: measured.append(1) or add(self, image))
    call = [*(["--data"] if data else []), photos, "--weights", weights["vim_micro"], "--out", tmp_path / "out"]
    counts = []
    for limit in (1, 2, 2, 1):
        assert erf(*call, "--limit", limit) == 0
        counts.append(len(measured))
    assert counts == [1, 2, 2, 2]
    (question,) = (tmp_path / "out" / "measured").iterdir()
    assert len([*question.iterdir()]) == 2
    first = open_data(photos).items[0].key if data else "0.jpg"
    photo(Path(photos), first, 3)
    assert erf(*call) == 0
    assert len(measured) == 4
    assert len([*question.iterdir()]) == 1  # nothing is left of the image that was


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--size", "24,x"], "--size 24,x: expected ROWS,COLUMNS in pixels"),
        (["--size", "0,24"], "--size 0,24: expected ROWS,COLUMNS"),
        (["--query", "a,b"], "--query a,b: expected ROW,COLUMN in pixels, or class"),
        (["--query", "900,1"], "outside the image of 32 x 32 pixels"),
        (["--layer", "7"], "--layer 7: no such layer; vim_micro has 2 layers, 0..1."),
        (["--limit", "0"], "--limit 0: expected a number from 1 on"),
        (["--model", "vim_mikro"], "no such model"),
        (["--data", "nowhere.zip"], "--data nowhere.zip: no such file or folder 'nowhere.zip'"),
        (["a.jpg", "--data", "photos"], "--data photos: give a collection or IMAGE (a.jpg), not both."),
        (["nowhere.jpg"], "there is no file or folder 'nowhere.jpg'"),
    ],
)
def test_refusals(tmp_path, weights, capsys, options, sentence):
    assert sentence in refused(capsys, "--weights", weights["vim_micro"], "--out", tmp_path, *options)


def test_a_vit_has_one_size(tmp_path, weights, capsys):
    options = ["--model", "vit_micro", "--weights", weights["vit_micro"], "--size", "32,64", "--out", tmp_path]
    assert "vit_micro takes only images of 32,32 pixels" in refused(capsys, *options)


def test_no_good_images_and_missing_packages(tmp_path, weights, capsys, monkeypatch):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    options = ["--weights", weights["vim_micro"], "--out", tmp_path / "out"]
    assert erf(tmp_path / "broken.jpg", *options) == 2
    said = capsys.readouterr().err.splitlines()
    assert any("skipped: " in line and "broken.jpg: this is not an image" in line for line in said)
    assert said[-1] == "mamba-attn erf: receptive_field(images): expected at least one image, got none."
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["measured"]
    monkeypatch.setitem(command._NEEDED, "no_such_module", "no-such-package")
    assert "no-such-package not installed: pip install 'mamba_attn[explain]'" in refused(capsys)


def test_the_page_says_what_is_seen_and_needs_no_network(tmp_path, weights, photos):
    assert erf(photos, "--weights", weights["vim_micro"], "--untrained", "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "erf.html").read_text()
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for said in (
        "vim_micro beside untrained: receptive field of the patch in the middle",
        "How far, by layer",
        "20%",
        "How to reproduce this page",
    ):
        assert said in text
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="?http', page)
    assert page.count('<img src="data:image/png;base64,') == 4  # gradient and rollout of two models
    assert page.count("<polyline") == page.count("<span class=key>") == 8
    assert len(page) < 300_000
