"""``mamba-attn compare`` as a stranger meets it."""

import csv
import json
import re
import shutil

import pytest
import torch

from mamba_attn.commands import cli
from tests.datasets import cases as datasets
from tests.evaluation import cases
from tests.explanations.cases import photo


@pytest.fixture(autouse=True)
def _threads():
    """The command sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return cases.weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases.boxes_zip(tmp_path / "a.zip")
    cases.segments_zip(tmp_path / "s.zip")
    cases.class_folders(tmp_path / "photos", 2)
    cases.class_folders(tmp_path / "boats", 1, ["boat"])
    return tmp_path


def refused(capsys, *arguments):
    assert cli.main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("mamba-attn compare: ")
    assert "Traceback" not in captured.err
    return last


def test_everything_that_is_written(place, models, capsys):
    call = ["compare", "--models", models, "--methods", "Raw_Attention,mamba_attribution", "--data", "a.zip:boxes",
            "--data", "photos@perturbation,picture", "--limit", "4", "--sanity-images", "1", "--pictures", "2",
            "--out", "out"]  # fmt: skip
    assert cli.main(call) == 0
    said = capsys.readouterr().out
    assert "vim_micro on a.zip:boxes: perturbation, 4 images" in said
    assert "open out/compare.html" in said
    assert "note: mamba_attribution is left out: vit_micro is made of softmax attention" in said
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {"compare.txt", "compare.csv", "compare.json", "compare.html", "measured.jsonl"}
    page = (place / "out/compare.html").read_text()
    assert not re.search(r"(src|href)=.?https?:|@import|<script", page)
    assert page.count(" class=next") == 2 * 2
    assert page.count("class=heat") == (3 + 2) * 4  # methods that fit, and random, on two images of two collections
    assert page.count("<polyline") == 2 * (3 + 2) * 4  # two signs, against prediction and label
    assert "Published figures are of Vim-S with the official weights" in page
    found = json.loads((place / "out/compare.json").read_text())
    assert [(each["model"], each["data"]) for each in found["tables"]] == [
        ("vim_micro", "a.zip:boxes"), ("vit_micro", "a.zip:boxes"), ("vim_micro", "photos"), ("vit_micro", "photos")
    ]  # fmt: skip
    assert set(found["halves"]) == {"choose", "report"}
    assert "map" not in found["tables"][2]["figures"]
    rows = list(csv.DictReader((place / "out/compare.csv").read_text().splitlines()))
    one = found["tables"][0]["figures"]["miou"]["raw_attention"]
    same = [
        row for row in rows if (row["metric"], row["method"], row["model"]) == ("miou", "raw_attention", "vim_micro")
    ]
    assert float(same[0]["value"]) == one["value"]
    before = (place / "out/measured.jsonl").read_bytes()
    assert cli.main(call) == 0
    assert (place / "out/measured.jsonl").read_bytes() == before
    assert capsys.readouterr().out == said


def test_bad_images_and_damaged_lines_are_named_and_the_rest_done(place, models, capsys):
    (place / "photos/red/0.png").write_bytes(b"no image")
    (place / "out").mkdir()
    (place / "out/measured.jsonl").write_text("garbage\n")
    call = ["compare", "--models", models, "--data", "photos", "--out", "out", "--measures", "perturbation",
            "--methods", "raw_attention,mamba_lrp,random"]  # fmt: skip
    assert cli.main(call) == 1
    said = capsys.readouterr().out
    assert "red/0.png: this is not an image" in said
    assert "measured.jsonl: 1 damaged lines were left out" in said
    assert "perturbation, 5 images" in said


def test_a_bad_box_loses_neither_the_run_nor_the_page(place, models, capsys):
    (place / "boxed").mkdir()
    rows = [{"file": f"{index}.png", "label": 0, "name": "red", "boxes_xyxy": its}
            for index, its in enumerate(("[[4, 8, 20, 24]]", "[[1, 2, 3]]", "[[NaN, 2, 3, 9]]", "[]"))]  # fmt: skip
    for index in range(4):
        (place / f"boxed/{index}.png").write_bytes(cases.encoded(cases.picture(index)))
    (place / "boxed/boxes.csv").write_text(datasets.table(rows))
    call = ["compare", "--models", models, "--data", "boxed", "--out", "out", "--methods", "raw_attention,random",
            "--measures", "localisation,picture"]  # fmt: skip
    assert cli.main(call) == 1
    said = capsys.readouterr().out
    assert "boxed: localisation, 1 image\n" in said
    assert "1 of 2 images have no boxes and no mask and are left out of the localisation." in said
    notes = [line for line in said.splitlines() if "figures missing" in line]
    assert len(notes) == 2 * 2  # a line for all methods, per model and image
    assert all(", all methods: 4 figures missing: " in line for line in notes)
    assert "1.png: expected boxes [x0, y0, x1, y1]" in (place / "out/compare.html").read_text()


def test_photos_without_labels(place, models, capsys):
    photo(place / "mine")
    shutil.copyfile(place / "mine/a.jpg", place / "mine/[red]b.jpg")
    call = ["compare", "--models", models, "--data", "mine", "--out", "out", "--measures", "perturbation,localisation",
            "--methods", "raw_attention,mamba_lrp,random"]  # fmt: skip
    assert cli.main(call) == 0
    said = capsys.readouterr().out
    assert "mine has no boxes and no masks: no localisation." in said
    assert "AUC target" not in said
    assert "accuracy" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", ""], "--data '': give a folder of images, ZIP, ZIP:PART"),
        (["--data", "none"], "--data none: no such file or folder 'none'; give a folder of images, ZIP, ZIP:PART"),
        (["--data", "a.zip:box"], "it has no folder 'box'. Its parts: boxes."),
        (["--data", "photos", "--methods", "raw_atention"], "no such method. Did you mean 'raw_attention'"),
        (["--data", "photos", "--methods", ","], "--methods ,: expected 'all' or names."),
        (["--data", "photos", "--measures", "sanitty"], "there is no measure 'sanitty'. Did you mean 'sanity'?"),
        (["--data", "photos@sanitty"], "--data photos@sanitty: there is no measure 'sanitty'."),
        (["--data", "photos", "--limit", "0"], "--limit 0: expected a number from 1 on."),
        (["--data", "photos", "--workers", "-1"], "--workers -1: expected a number from 1 on."),
        (["--data", "photos", "--target", "hatt"], "--target hatt: no such class; vim_micro knows 3 classes, 0..2."),
        (["--data", "photos", "--target", "3"], "--target 3: no such class; vim_micro knows 3 classes, 0..2."),
        (["--data", "s.zip:masks", "--target", "label"], "--target label: s.zip:masks: it has no labels"),
        (["--data", "boats", "--target", "label"], "boats: the model has none of its classes"),
        (["--data", "photos", "--models", "vim_micor"], "no such model. Did you mean 'vim_micro'"),
        (["--data", "photos", "--models", "vim_micro=none.pth"], "no such file; expected"),
        (["--data", "photos", "--models", ","], "--models: expected names of models"),
        (["--data", "photos", "--models", "vim_micro="], "--models vim_micro=: expected demo, official or a file"),
        (["--data", "photos", "--methods", "occlusion:strides=99"], "Stride dimension (3, 99, 99) cannot be larger"),
        (["--data", "photos", "--methods", "integrated_gradients:n_steps=0"], "number of steps has to be larger than"),
        (["--data", "photos", "--out", "photos/red/0.png/x"], "cannot write this folder"),
    ],
)
def test_what_is_refused(place, models, capsys, arguments, message):
    given = arguments if "--models" in arguments else ["--models", models, *arguments]
    assert message in refused(capsys, "--out", "out", *given)
    assert not (place / "out").exists()


def test_a_method_that_fits_no_model(place, models, capsys):
    vit = models.split(",")[1]
    arguments = ["--models", vit, "--data", "photos", "--methods", "mamba_attribution"]
    expected = "--methods mamba_attribution: vit_micro is made of softmax attention; use transformer_attribution."
    assert expected in refused(capsys, *arguments)


def test_all_are_those_that_fit(place, models, capsys):
    vit = models.split(",")[1]
    call = ["compare", "--models", vit, "--data", "photos", "--limit", "1", "--measures", "cost", "--out", "out"]
    assert cli.main([*call, "--methods", "all", "integrated_gradients:n_steps=2"]) == 0
    said = capsys.readouterr().out
    assert "note: mamba_attribution is left out: vit_micro is made of softmax attention" in said
    assert "integrated_gradients:n_steps=2  " in said


def test_stopping_is_no_accident(place, models, capsys, monkeypatch):
    from mamba_attn.evaluation import scheduler

    def stop(worker, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler.Worker, "work", stop)
    assert cli.main(["compare", "--models", models, "--data", "photos", "--out", "out"]) == 130
    assert "stopped; the same command resumes here." in capsys.readouterr().err
