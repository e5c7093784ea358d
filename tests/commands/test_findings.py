"""mamba-attn findings from end to end: what it writes, what it says, what it refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mamba_attn.analytics import collect
from mamba_attn.commands import cli
from mamba_attn.commands import findings as findings_command
from mamba_attn.findings import tables
from mamba_attn.findings.page import by_depth, matrices_rgb, pooled
from mamba_attn.findings.tables import number
from tests.analytics import cases
from tests.findings.test_findings import BIG, weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Stores of a Vim in two orders, and of a ViT."""
    from mamba_attn.analytics import Request
    from mamba_attn.datasets import loading, open_data

    folder = tmp_path_factory.mktemp("place")
    data = open_data(cases.folder_of(folder, 1))
    models = {"raster": ("vim_micro", BIG), "morton": ("vim_micro", {**BIG, "order": "morton"}),
              "vit": ("vit_micro", {**cases.OPTIONS["vit_micro"], "image_size": (32, 40)})}  # fmt: skip
    for name, (model, options) in models.items():
        file = weights(folder / f"{name}_weights", model, options)
        collect(Request(loading.load(model, file), data), folder / name)
    return folder


def findings(*arguments):
    return cli.main(["findings", *map(str, arguments)])


def refused(capsys, *arguments):
    assert findings(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.splitlines()[-1]
    assert said.startswith("mamba-attn findings: ")
    return said


def test_stores_side_by_side(place, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    accuracy = ["--accuracy", "raster=71.5", "--accuracy", "morton=70"]
    assert findings(place / "raster", place / "morton", place / "vit", "--seeds", 1, "--out", out, *accuracy) == 0
    captured = capsys.readouterr()
    assert "raster: vim_micro, raster order, 3 images, top-1 71.50 %" in captured.out
    assert "side by side: trained (untrained); ! outside the range expected of untrained models" in captured.out
    assert "vim_micro: top-1 of 2 models in 2 orders differs by 1.50 points." in captured.out
    assert f"open {out / 'findings.html'}" in captured.out
    assert {path.name for path in out.iterdir()} == {
        "findings.csv", "findings.html", "findings.json", "findings.txt", "matrices.png", "measured",
    }  # fmt: skip
    page = (out / "findings.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg class=plot") > 8
    for term in tables.TERMS:  # every column of the head row is explained
        assert f"<dt>{term}</dt>" in page
        assert f"\n{term}: " in (out / "findings.txt").read_text()
    assert '<table class="figures wrapped">' in page  # formulas are not cut
    with Image.open(out / "matrices.png") as picture:
        assert picture.height > 3 * 256
        assert picture.width > 6 * 256
    assert (out / "findings.txt").read_text().count("rows follow the scan") == 4
    assert page.count("low correlation of two blocks, of 3 pairs") == 2  # of the Vims
    assert page.count("low correlation of two blocks, of 1 pair<") == 1
    assert "10 % quantile over as many pairs as are named" in page
    assert "training makes" not in page


def test_csv_and_json_hold_the_same_numbers(place, tmp_path, capsys):
    assert findings(place / "vit", "--seeds", 2, "--out", tmp_path) == 0
    lines = list(csv.DictReader((tmp_path / "findings.csv").read_text().splitlines()))
    found = json.loads((tmp_path / "findings.json").read_text())
    (store,) = found["stores"]
    assert len(lines) == len(store["rows"]) > 20
    for line, row in zip(lines, store["rows"], strict=True):
        assert (line["finding"], line["place"], line["verdict"]) == (row["finding"], row["place"], row["verdict"])
        assert float(line["trained_value"]) == pytest.approx(row["trained"]["value"], rel=1e-4, abs=1e-12)
        assert float(line["random"]) == pytest.approx(row["random"], rel=1e-4, abs=1e-12)
        assert float(line["corrected"]) == pytest.approx(row["untrained"]["corrected"], rel=1e-4, abs=1e-12)
        assert line["verdict"] in ("above", "below", "inside")
    assert found["findings"]["entropy"]["formula"].startswith("-sum_j s_ij log s_ij / log n")
    assert found["command"].startswith("mamba-attn findings ")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seeds", -1], "--seeds -1: expected a number from 0 on."),
        (["--images", 0], "--images 0: expected a number from 1 on."),
        (["--accuracy", "rastr=70"], "there is no store 'rastr'. Did you mean 'raster'?"),
        (["--accuracy", "raster=700"], "expected NAME=VALUE, a number from 0 to 100"),
        (["--accuracy", "raster=good"], "expected NAME=VALUE"),
        (["--accuracy", "70"], "there is no store ''"),
        (["--trained", "rastr=w.safetensors"], "there is no store 'rastr'. Did you mean 'raster'?"),
        (["--trained", "raster="], "expected NAME=WEIGHTS, a file"),
    ],
)
def test_refusals(place, tmp_path, capsys, options, sentence):
    assert sentence in refused(capsys, place / "raster", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_stores_that_are_none(place, tmp_path, capsys, monkeypatch):
    assert "there is no such folder" in refused(capsys, tmp_path / "none", "--out", tmp_path / "out")
    twice = refused(capsys, place / "vit", place / ".." / place.name / "vit", "--out", tmp_path / "out")
    assert "this store is named twice" in twice
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "store.json").write_text(json.dumps({"format": 0, "package": "0.0"}))
    assert "a store of format 0" in refused(capsys, tmp_path / "old", "--out", tmp_path / "out")
    empty = json.loads((place / "vit" / "store.json").read_text())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "store.json").write_text(json.dumps(empty))
    assert "half written: 0 of 3 images" in refused(capsys, tmp_path / "empty", "--out", tmp_path / "out")
    monkeypatch.setitem(findings_command._NEEDED, "no_such_module", "no-such-package")
    assert "pip install 'mamba_attn[analytics]'" in refused(capsys, place / "vit")


def test_stores_of_one_name_are_told_apart(place, tmp_path):
    shutil.copytree(place / "vit", tmp_path / "copy" / "vit")
    names = list(findings_command.named([str(place / "vit"), str(tmp_path / "copy" / "vit")]))
    assert names == [f"{place.name}/vit", "copy/vit"]


def test_pictures_of_larger_matrices_are_shrunk(place):
    values = pooled(np.arange(36.0).reshape(6, 6), 3)
    assert values.tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5], [27.5, 29.5, 31.5]]
    stores = findings_command.named([str(place / "vit")])
    assert matrices_rgb(stores).shape[2] == 3
    assert "<svg" in by_depth([], "entropy")


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (-1e-9, "0"), (0.000499, "0"), (-0.25, "-0.25"), (12.3456, "12.3"), (1.0, "1")]
)
def test_numbers_as_text(value, text):
    assert number(value) == text
