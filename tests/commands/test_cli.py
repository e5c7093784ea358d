import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mamba_attn import images, models
from mamba_attn.commands import cli
from mamba_attn.datasets.class_names import names_for
from mamba_attn.explanations.explaining import Names
from tests.explanations.cases import VIM, VIT, VMAMBA, photo, save

ROOT = Path(__file__).parents[2]
SUFFIXES = (".html", ".png", ".npz")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights"), "vim_micro", VIM)


@pytest.fixture
def photos(tmp_path):
    """Two good images of the same name, in two folders, and one that is truncated."""
    for which, folder in enumerate(("one", "two")):
        photo(tmp_path / folder, which=which)
    (tmp_path / "one" / "broken.jpg").write_bytes(images.samples()[0].read_bytes()[:3000])
    return tmp_path


def run(cwd, *arguments):
    explain = [sys.executable, "-m", "mamba_attn", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    result = subprocess.run(explain, cwd=cwd, env=environment, capture_output=True, text=True)
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


@pytest.mark.full  # .ci/run calls this command itself
def test_defaults_explain_the_images_of_the_package(tmp_path):
    result = run(tmp_path, "explain")
    assert result.returncode == 0, result.stderr
    assert "6 of 6 images explained; open mamba_attn_explain/index.html" in result.stdout
    assert result.stdout.count("%") == 6 * 5 * 3  # VMamba, Vim and a ViT
    folder = tmp_path / "mamba_attn_explain"
    files = {f"{path.stem}{suffix}" for path in images.samples() for suffix in SUFFIXES}
    assert {path.name for path in folder.iterdir()} == {*files, "index.html", "explained.jsonl"}
    with np.load(folder / "clothing_hat_1.npz") as arrays:
        assert {"raw_attention", "attention_rollout", "mamba_attribution"} <= set(arrays)
        assert {"vit_micro.raw_attention", "vit_micro.transformer_attribution", "vim_micro.mamba_lrp"} <= set(arrays)
        assert sum(name.startswith("attention.") for name in arrays) == 3


def test_a_broken_image_is_named_and_the_rest_done(photos, weights):
    (photos / "text.png").write_text("hello")
    result = run(
        photos, "explain", "one", "two", "text.png", "--model", "vim_micro", "--weights", weights, "--out", "out/here"
    )
    assert result.returncode == 1
    assert "skipped: one/broken.jpg: the image is damaged or incomplete" in result.stderr
    assert "skipped: text.png: this is not an image" in result.stderr
    assert "2 of 4 images explained; open out/here/index.html" in result.stdout
    assert "[red]not markup[/red]" in result.stdout
    out = photos / "out/here"
    files = {f"{name}{suffix}" for name in ("one/a", "two/a") for suffix in SUFFIXES}
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {*files, "index.html", "explained.jsonl"}
    assert (photos / "out/here/index.html").read_text().count("<a ") == 2
    first, second = (np.load(photos / "out/here" / name) for name in ("one/a.npz", "two/a.npz"))
    assert not np.array_equal(first["image"], second["image"])


def test_usage_errors_end_with_two_and_one_sentence(tmp_path):
    result = run(tmp_path, "explain", "--model", "vim_micor")
    assert result.returncode == 2
    assert result.stderr.startswith("mamba-attn explain: --model vim_micor: no such model. Did you mean 'vim_micro'")
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite_are_an_error_of_the_image(photos, tmp_path, capsys):
    path = save(tmp_path / "nan", "vim_micro", VIM)
    state = models.create("vim_micro", weights=path, **VIM).state_dict()
    state["layers.1.mixer.in_proj.weight"][:] = torch.nan
    save_file(state, path)
    arguments = [str(photos / "two"), "--model", "vim_micro", "--weights", path, "--out", str(photos / "out")]
    assert cli.main(["explain", *arguments]) == 1
    captured = capsys.readouterr()
    assert "skipped: layers.1.mixer:" in captured.err
    assert "NaN or Inf" in captured.err
    assert "0 of 1 images explained" in captured.out


def test_every_option_at_once(photos, tmp_path, capsys):
    path = save(tmp_path / "vmamba", "vmamba_micro", VMAMBA)
    beside = save(tmp_path / "vit", "vit_micro", VIT)
    assert Path(beside).is_file()
    arguments = ["explain", str(photos / "*" / "a.jpg"), "--model", "vmamba_micro", "--weights", path]
    arguments += ["--method", "raw_attention", "attention_rollout:signed", "--method", "mamba_attribution:rule=paper"]
    arguments += ["--target", "HAT", "--box", "2,3,30,20", "--layer", "1", "layers.2.*", "--beside", "none"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(photos / "out")]) == 0
    with np.load(photos / "out" / "two" / "a.npz") as arrays:
        assert int(arrays["explained"]) == 1
        maps = ("raw_attention", "attention_rollout:signed=true", "mamba_attribution:rule=paper")
        assert [arrays[name].shape for name in maps] == [(64, 32)] * 3
        assert [name for name in arrays if name.startswith("row.")] == [f"row.{name}" for name in arrays["layers"][1:]]
        assert [arrays[f"attention.{name}"].shape for name in arrays["layers"][1:]] == [(32, 32), (8, 8)]
    page = (photos / "out" / "one" / "a.html").read_text()
    assert "rule=paper" in page.partition("<code>")[2]
    assert "5 of 5" not in capsys.readouterr().out


def test_a_vit(photos, tmp_path):
    path = save(tmp_path / "vit", "vit_micro", VIT)
    arguments = ["explain", str(photos / "two"), "--model", "vit_micro", "--weights", path]
    assert cli.main([*arguments, "--out", str(photos / "out")]) == 0
    with np.load(photos / "out" / "a.npz") as arrays:
        assert arrays["transformer_attribution"].shape == (32, 32)
        np.testing.assert_allclose(arrays["row.blocks.1.attn"].sum(), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "rollout"], "no such method. Did you mean 'attention_rollout'"),
        (["--target", "hatt"], "no such class; vim_micro knows 3 classes, 0..2. Did you mean 'hat'"),
        (["--layer", "7"], "no such layer; vim_micro has 2 layers, 0..1."),
        (["--query", "40,3"], "the pixel (row, column) is outside the image of 32 x 32 pixels"),
        (["--box", "1,2,3,40"], "--box 1,2,3,40: the box is empty or leaves the image"),
        (["--query", "here"], "expected ROW,COLUMN in pixels"),
        (["--beside", "vit_mircro"], "Did you mean 'vit_micro'"),
    ],
)
def test_questions_that_do_not_fit(capsys, photos, weights, arguments, message):
    given = [
        str(photos / "two"),
        "--model",
        "vim_micro",
        "--weights",
        weights,
        "--out",
        str(photos / "out"),
        *arguments,
    ]
    assert message in refused(capsys, *given)


def test_a_method_that_is_not_for_this_model_ends_the_run(capsys, photos, weights):
    arguments = ["--model", "vim_micro", "--weights", weights, "--method", "raw_attention:convention=vmamba_analysis"]
    assert cli.main(["explain", str(photos / "two"), *arguments, "--out", str(photos / "out")]) == 2
    assert "mamba-attn explain: RawAttention(convention='vmamba_analysis'): this is VMamba's" in capsys.readouterr().err
    assert list((photos / "out").iterdir()) == []


def test_imagenets_classes_have_names():
    names = names_for(1000)
    assert len(names) == 1000
    assert names[0] == "tench"


def test_files_of_the_same_name_get_numbers():
    names = Names()
    names.take("kept")
    titles = ("a.jpg", "a.png", "a-2.jpg", "a.jpg", "b.jpg", "index.jpg", "hat/a.jpg", "kept.png", "index-page-2.png",
              "//x/../a.jpg")  # fmt: skip
    assert [names.free(title) for title in titles] == [
        "a", "a-2", "a-2-2", "a-3", "b", "index-2", "hat/a", "kept-2", "index-page-2-2", "x/a"
    ]  # fmt: skip


def test_many_files_of_one_name_take_no_longer_each():
    names, looked = Names(), []

    class Seen(set):
        def __contains__(self, name):
            looked.append(name)
            return super().__contains__(name)

    names._taken = Seen()
    assert len({names.free("photos/image.png") for _ in range(1000)}) == 1000
    assert len(looked) <= 2 * 1000


def explained(photos, weights, *others):
    """Call explain, quickly, on the images of one folder; its exit code."""
    call = ["explain", str(photos / "one"), "--model", "vim_micro", "--weights", weights, "--method", "raw_attention"]
    return cli.main([*call, "--out", str(photos / "out"), *others])


@pytest.fixture
def asked(photos, monkeypatch):
    """Names of the files that the model is asked about, in order; the fourth time, somebody presses Ctrl+C."""
    from mamba_attn.explanations import answer

    names, real = [], answer.answer

    def asks(question, path):
        names.append(path.name)
        if len(names) == 4:
            raise KeyboardInterrupt
        return real(question, path)

    monkeypatch.setattr(answer, "answer", asks)
    (photos / "one" / "broken.jpg").unlink()
    return names


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_somebody_renamed_are_written_again(photos, weights, asked, suffix):
    out = photos / "out"
    assert explained(photos, weights) == explained(photos, weights) == 0
    assert asked == ["a.jpg"]
    (out / f"a{suffix}").rename(out / f"b{suffix}")
    assert explained(photos, weights) == 0
    assert asked == ["a.jpg"] * 2
    assert (out / f"a{suffix}").is_file()


def test_a_new_image_takes_no_name_of_a_kept_one(photos, weights, asked):
    (photos / "one" / "a.jpg").rename(photos / "one" / "a.png")
    assert explained(photos, weights) == 0
    before = (photos / "out" / "a.html").read_bytes()
    photo(photos / "one", "a.jpg", 1)  # comes first
    assert explained(photos, weights) == 0
    assert asked == ["a.png", "a.jpg"]
    assert (photos / "out" / "a.html").read_bytes() == before
    assert (photos / "out" / "a-2.html").read_bytes() != before
    assert explained(photos, weights) == 0
    assert asked == ["a.png", "a.jpg"]


def test_after_an_interruption_the_index_lists_what_is_kept(photos, weights, asked, capsys):
    photo(photos / "one", "b.jpg", 1)
    photo(photos / "one", "c.jpg", 2)
    assert explained(photos, weights) == 0
    (photos / "out" / "b.npz").unlink()
    assert explained(photos, weights) == 130
    assert asked[3:] == ["b.jpg"]
    index = (photos / "out" / "index.html").read_text()
    assert [f'href="{name}.html"' in index for name in "abc"] == [True, False, True]


def test_pages_of_a_longer_index_go(photos, weights, asked, monkeypatch):
    from mamba_attn.explanations import explaining

    monkeypatch.setattr(explaining, "_PER_INDEX", 1)
    photo(photos / "one", "b.jpg", 1)
    photo(photos / "one", "c.jpg", 2)
    assert explained(photos, weights) == 0
    other = photos / "out" / "index-page-of-mine.html"
    other.touch()
    (photos / "one" / "c.jpg").unlink()
    assert explained(photos, weights) == 0
    left = {path.name for path in (photos / "out").glob("index*")}
    assert left == {"index.html", "index-page-2.html", other.name}


def test_what_an_earlier_call_wrote_stays(photos, weights, capsys, monkeypatch):
    from mamba_attn.explanations import answer

    out, asked = photos / "out", []
    real = answer.answer
    monkeypatch.setattr(answer, "answer", lambda question, path: asked.append(path.parent.name) or real(question, path))
    (photos / "one" / "broken.jpg").unlink()
    call = ["explain", str(photos / "one"), str(photos / "two"), "--model", "vim_micro", "--weights", weights,
            "--out", str(out)]  # fmt: skip
    call += ["--method", "raw_attention"]
    assert cli.main([*call[:2], *call[3:]]) == 0
    assert asked == ["one"]
    (out / "explained.jsonl").write_bytes((out / "explained.jsonl").read_bytes() + b'\n{"of": "cut')
    assert cli.main(call) == 0
    first = capsys.readouterr().out
    assert asked == ["one", "one", "two"]
    assert "earlier call" not in first
    before = {path: path.read_bytes() for path in out.rglob("*") if path.name != "index.html" and path.is_file()}
    assert cli.main(call) == 0
    again = capsys.readouterr().out
    assert asked == ["one", "one", "two"]
    assert "2 of 2 images explained, 2 of them by an earlier call" in again
    shown = [[line for line in each.splitlines() if "%" in line] for each in (first, again)]
    assert shown[0][-len(shown[1]) :] == shown[1]  # the table too
    assert before == {path: path.read_bytes() for path in before}
    assert (out / "index.html").read_text().count("<a ") == 2
    (out / "two" / "a.png").unlink()
    assert cli.main(call) == 0
    assert asked[3:] == ["two"]
    assert cli.main([*call, "--target", "1"]) == 0  # another question
    assert asked[4:] == ["one", "two"]
    assert cli.main(call) == 0  # the first one's files are gone
    assert asked[6:] == ["one", "two"]


def test_images_that_are_not_there(capsys, tmp_path):
    assert "there is no file or folder 'none.png'" in refused(capsys, "none.png", "--out", str(tmp_path / "out"))
    assert "holds no images" in refused(capsys, str(tmp_path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there_or_do_not_fit(capsys, weights, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    assert "no bundled weights for this model" in refused(capsys, "--model", "vmamba_base_s1l20", *out)
    assert "no such file; expected" in refused(capsys, "--weights", str(tmp_path / "w.pth"), *out)
    assert "not of vim_tiny but of vim_micro" in refused(capsys, "--weights", weights, "--model", "vim_tiny", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("{", r"w.json: this card of the weights is not JSON"),
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
    said = refused(capsys, "--model", "vim_micro", "--weights", weights, "--out", str(tmp_path / "file" / "out"))
    assert "file/out: cannot write this folder (Not a directory); choose another." in said


def test_a_device_that_is_not_there(capsys, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(
        capsys, "--model", "vim_micro", "--weights", weights, "--device", "cuda", "--out", str(tmp_path / "out")
    )
    assert "--device cuda: PyTorch sees no CUDA device here; use --device cpu." in said


def test_missing_extras_are_named_with_the_remedy(capsys, monkeypatch):
    util, found = importlib.util, importlib.util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in ("PIL", "rich") else found(name))
    assert "pillow and rich not installed: pip install 'mamba_attn[explain]'" in refused(capsys)


def test_only_what_exists_is_offered(capsys):
    for arguments in (["explian"], ["findings"], ["explain", "--method"], ["explain", "--device", "tpu"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "explain" in shown
    assert "compare" in shown
    assert "findings" in shown
    assert cli.main([]) == 0
    assert capsys.readouterr().out == shown
