"""``mamba-attn collect`` as a stranger meets it."""

import json
import re

import numpy as np
import pytest

from mamba_attn.analytics import AttentionStore
from mamba_attn.commands import cli
from tests.analytics import cases
from tests.datasets.cases import boxes_zip
from tests.explanations.cases import VMAMBA, save


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights"), "vmamba_micro", VMAMBA, cases.CLASSES)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases.folder_of(tmp_path, 1)
    boxes_zip(tmp_path / "a.zip")
    return tmp_path


def collected(weights, *arguments):
    return cli.main(["collect", "--model", "vmamba_micro", "--weights", weights, *arguments])


def refused(capsys, *arguments):
    assert cli.main(["collect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("mamba-attn collect: ")
    return last


def test_a_folder_and_a_part_of_a_zip_and_both(place, weights, capsys):
    assert collected(weights, "--data", "photos", "--out", "one", "--keep", "1") == 0
    assert collected(weights, "--data", "a.zip:boxes", "--limit", "4", "--out", "two") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "3 images added, 3 in one; next: mamba-attn explore one",
        "4 images added, 4 in two; next: mamba-attn explore two",
    ]
    assert "collecting" in said.err
    assert cli.main(["collect", "--merge", "one", "two", "--out", "both"]) == 0
    assert capsys.readouterr().out == "7 images in both; next: mamba-attn explore both\n"
    store = AttentionStore.open("both")
    assert len(store.images) == 7
    assert store.model()(store.subject.transform("photos/red/0.png")[None]).shape == (1, 3)
    index = json.loads((place / "one/store.json").read_text())
    assert index["command"].startswith("mamba-attn collect --model vmamba_micro --weights ")


def test_unreadable_images_are_listed_and_skipped_and_counted_once(place, weights, capsys):
    (place / "photos" / "red" / "no.png").write_bytes(b"no image")
    for new in (3, 0):
        assert collected(weights, "--data", "photos", "--out", "store") == 1
        said = capsys.readouterr()
        assert said.out == f"{new} images added, 3 in store, 1 skipped; next: mamba-attn explore store\n"
        assert said.err.count("skipped: photos: red/no.png: this is not an image") == 1
    assert list(AttentionStore.open("store").unreadable) == ["red/no.png"]


def test_images_of_which_none_can_be_read(place, weights, capsys):
    (place / "bad").mkdir()
    for name in "ab":
        (place / "bad" / f"{name}.png").write_bytes(b"no image")
    arguments = ("--model", "vmamba_micro", "--weights", weights, "--data", "bad", "--out", "store")
    sentence = "none of the 2 images of bad could be used; first reason: bad: "
    assert sentence in refused(capsys, *arguments)
    assert not (place / "store").exists()
    (place / "store").mkdir()  # what was there stays there
    assert sentence in refused(capsys, *arguments)  # and not that there is something else
    assert list((place / "store").iterdir()) == []
    (place / "bad" / "c.png").write_bytes((place / "photos" / "red" / "0.png").read_bytes())
    assert collected(weights, "--data", "bad", "--out", "store") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "empty"], "--data empty: it holds no images."),
        (["--data", "absent"], "no such file or folder 'absent'"),
        (["--data", "a.zip"], "it has several parts; choose one"),
        (["--data", "photos", "--limit", "0"], "--limit 0: expected a number from 1 on"),
        (["--data", "photos", "--keep", "-1"], "--keep -1: expected a number from 0 on"),
        (["--data", "photos", "--batch", "0"], "--batch 0: expected a number from 1 on"),
        (["--data", "photos", "--part", "0"], "--part 0: expected a number from 1 on"),
        (["--data", "photos", "--workers", "-1"], "--workers -1: expected a number from 0 on"),
        (["--merge", "a", "b", "--plan"], "--plan: it is about images, and --merge has none"),
        (["--data", "photos", "--layer", "x*"], "'x*' fits no layer"),
        (["--data", "photos", "--model", "vim_mcro"], "no such model. Did you mean 'vim_micro'"),
        (["--data", "photos", "--weights", "no.pt"], "no such file; expected"),
        (["--merge", "a", "b"], "a: there is no such folder; make a store with mamba-attn collect."),
    ],
)
def test_calls_that_are_refused(place, capsys, arguments, sentence):
    (place / "empty").mkdir()
    assert sentence in refused(capsys, "--out", "store", *arguments)
    assert not (place / "store").exists()


def test_named_images_are_kept(place, weights, capsys):
    (place / "photos" / "red" / "far").mkdir()
    (place / "photos" / "red" / "far" / "b.png").write_bytes((place / "photos" / "red" / "0.png").read_bytes())
    asked = ("--data", "photos", "--routes", "sum", "--out", "store", "--keep")
    named = "photos/red/0.png, far/b.png"  # with the folder's name; the end of a path
    assert collected(weights, *asked, named, "--limit", "4") == 0
    store = AttentionStore.open("store")
    assert sorted(image.key for image in store.images if image.kept) == ["red/0.png", "red/far/b.png"]
    for image in store.images:
        if image.kept:
            assert np.allclose(store.matrix(0, image).reshape(-1), store.features(0)[image.row], rtol=0.01, atol=1e-3)
    capsys.readouterr()
    assert collected(weights, *asked, "red/far/b.png,red/0.png,") == 0  # the same in another order: goes on
    assert "0 images added, 4 in store" in capsys.readouterr().out
    arguments = ("--model", "vmamba_micro", "--weights", weights, *asked)
    for keep, sentence in (
        ("red/9.png", "--keep red/9.png: photos has no such image. Did you mean 'red/0.png'"),
        ("0.png", "--keep 0.png: 3 images match, "),
        (" , ", "--keep ' , ': expected a number, or names of images between commas."),
        ("1", "this store is of --keep red/0.png,red/far/b.png, not --keep 1; nothing was changed"),
    ):
        said = refused(capsys, *arguments, keep)
        assert sentence in said
    last = next(image.key for image in store.images if image.row == 3)
    assert "is not among the first 3 of photos; --limit 4 includes it" in refused(
        capsys, *arguments, last, "--limit", "3"
    )


def test_what_is_refused_shows_no_bar_and_leaves_nothing(place, weights, capsys):
    assert collected(weights, "--data", "photos", "--out", "store", "--limit", "1") == 0
    (place / "taken").mkdir()
    (place / "taken" / "letter.txt").write_text("mine")
    for arguments in (("--out", "store", "--keep", "1"), ("--out", "taken"), ("--out", "new/deep", "--layer", "x")):
        capsys.readouterr()
        assert collected(weights, "--data", "photos", *arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in (place / "taken").iterdir()] == ["letter.txt"]
    assert not (place / "new").exists()
    assert cli.main(["collect", "--merge", "store", "store", "--out", "both"]) == 2
    assert not (place / "both").exists()


def test_the_missing_extra_is_named(place, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zarr" else real(name))
    said = refused(capsys, "--data", "photos", "--out", "store")
    assert said.endswith("zarr not installed: pip install 'mamba_attn[analytics]'")


def test_stopping_says_how_to_go_on(place, weights, capsys, monkeypatch):
    from mamba_attn.analytics import part_run

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(part_run.PartRun, "_count", stop)
    assert collected(weights, "--data", "photos", "--out", "store") == 130
    assert "stopped; the same command resumes at the last part" in capsys.readouterr().err


def test_the_plan_writes_nothing_and_counts_what_is_written(place, weights, capsys):
    asked = ("--data", "photos", "--out", "store", "--keep", "1", "--part", "2")
    assert collected(weights, *asked, "--plan") == 0
    images, featured, size, files, seconds = capsys.readouterr().out.splitlines()
    assert not (place / "store").exists()
    assert images == "images: 3 in 2 parts"
    assert featured == "features and pixels: of the first 3 images; all count in the statistics"
    assert re.fullmatch(r"seconds: about \d+ on 1 rank like this one", seconds)
    assert collected(weights, *asked) == 0
    written = [path for path in (place / "store").rglob("*") if path.is_file()]
    planned = int(re.fullmatch(r"files: about ([\d,]+)", files)[1].replace(",", ""))
    assert abs(len(written) - planned) <= 0.1 * planned
    rows, statistics, _ = (float(each) for each in re.findall(r"([\d.]+) MB", size))
    assert sum(path.stat().st_size for path in written if ".json" not in path.name) / 1e6 <= 1.1 * (rows + statistics)
    capsys.readouterr()
    assert collected(weights, *asked, "--plan") == 0
    assert capsys.readouterr().out.startswith("images: 0 in 0 parts, 3 are counted already\n")


def test_a_rank_of_a_job_array_says_what_is_left(place, weights, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    asked = ("--data", "photos", "--out", "store", "--part", "2")
    for rank, sentence in (
        (1, "1 images added, 1 in store; 1 part is left to other processes"),
        (0, "2 images added, 3 in store; next: mamba-attn explore store"),
    ):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
        assert collected(weights, *asked) == 0
        said = capsys.readouterr()
        assert sentence in said.out
        assert f"rank {rank} of 2 (a job array)" in said.err
