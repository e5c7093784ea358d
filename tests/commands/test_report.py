"""mamba-attn report as a stranger meets it."""

import json
import shutil

import pytest

from mamba_attn.commands import cli
from mamba_attn.viewer.report import stored
from tests.viewer.report import cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.stored(tmp_path_factory.mktemp("place"), images=2).folder


def refused(capsys, *arguments):
    assert cli.main(["report", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mamba-attn report: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_page_of_two_stores(folder, tmp_path, capsys):
    out = tmp_path / "report.html"
    out.write_text("old")
    assert cli.main(["report", str(folder), str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out.stat().st_size / 1e6:.1f} MB, ")
    assert f"open {out}" in said
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_is_left_out_is_said(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stored, "CELLS", 24)
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "a.html"), "--size", "0.5"]) == 0
    captured = capsys.readouterr()
    assert (tmp_path / "a.html").stat().st_size <= 500_000
    assert captured.err.strip().startswith("vmamba_micro: 1 layer of more than 24 patches (8x12) is left out.")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nowhere", "--out", "a.html"], "nowhere: there is no such folder; make a store with mamba-attn collect"),
        (["{store}", "--out", "no/a.html"], "--out no/a.html: there is no folder 'no'"),
        (["{store}", "--out", "."], "--out .: this is a folder; give a file, e.g. report.html"),
        (["{store}", "--out", "a.html", "--size", "0"], "--size 0: expected 10^6 bytes, from 0.5 to 1000"),
        (["{store}", "--out", "a.html", "--size", "nan"], "--size nan: expected 10^6 bytes"),
        (["{store}", "--out", "a.html", "--images", "-1"], "--images -1: expected a number from 0 on"),
        (["empty", "--out", "a.html"], "empty: this folder is not a store of mamba-attn collect"),
    ],
)
def test_refusals(folder, tmp_path, capsys, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert sentence in refused(capsys, *(option.format(store=folder) for option in options))
    assert not list(tmp_path.glob("*.html"))


def test_a_store_half_written_or_of_another_version(folder, tmp_path, capsys):
    for changed, sentence in (
        ({"wanted": [2, 99]}, "half written: 2 of 99 images"),
        ({"format": 7}, "a store of format 7"),
    ):
        copy = shutil.copytree(folder, tmp_path / next(iter(changed)))
        index = json.loads((copy / "store.json").read_text())
        (copy / "store.json").write_text(json.dumps({**index, **changed}))
        assert sentence in refused(capsys, copy, "--out", tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_an_older_page_stays_when_a_new_one_cannot_be_made(folder, tmp_path, capsys, monkeypatch):
    import importlib.util

    (tmp_path / "a.html").write_text("old")
    refused(capsys, tmp_path / "nowhere", "--out", tmp_path / "a.html")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zarr" else real(name))
    assert "zarr not installed: pip install 'mamba_attn[analytics]'" in refused(
        capsys, folder, "--out", tmp_path / "a.html"
    )
    assert (tmp_path / "a.html").read_text() == "old"
