"""`mamba-attn explore` without a store: collected once, finished when half written, refused when it is another."""

import json

import pytest

from mamba_attn import images
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.commands import explore
from mamba_attn.commands.cli import main
from mamba_attn.datasets import loading, open_data
from mamba_attn.viewer import demo


def test_the_demo_is_collected_once_and_a_half_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path))
    data = open_data(str(demo.photos()))
    folder = demo.demo_folder()
    assert folder.parent == tmp_path
    collect(Request(loading.load(demo.MODEL, "demo"), data, limit=2, keep=6), folder)  # a kill after two images
    index = folder / "store.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "wanted": [2, 6]}))

    assert demo.demo_store() == folder
    store = AttentionStore.open(folder)
    assert sorted(image.key.split("/")[-1] for image in store.images) == sorted(path.name for path in images.samples())
    assert sum(image.correct for image in store.images) == 5  # the classes are known
    assert all(image.kept for image in store.images)

    monkeypatch.setattr(demo, "_collect", lambda *_: pytest.fail("collected again"))
    served = []
    monkeypatch.setattr(explore, "serve", lambda stores, host, port, ahead: served.extend(stores if ahead else ()))
    assert main(["explore"]) == 0
    assert [store.folder for store in served] == [folder]

    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    assert main(["explore"]) == 2
    said = capsys.readouterr().err
    assert "a store of format 99" in said
    assert f"delete {folder}" in said


def test_what_is_no_store_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAMBA_ATTN_CACHE", str(tmp_path))
    demo.demo_folder().mkdir()
    (demo.demo_folder() / "letter.txt").write_text("dear")
    assert main(["explore"]) == 2
    assert "holds 'letter.txt' and no store; nothing was written" in capsys.readouterr().err
    assert (demo.demo_folder() / "letter.txt").read_text() == "dear"


def test_stores_that_cannot_be_shown_are_sentences(tmp_path, capsys):
    assert main(["explore", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder; make a store with mamba-attn collect" in capsys.readouterr().err
    assert main(["explore", str(tmp_path)]) == 2
    assert "is not a store of mamba-attn collect" in capsys.readouterr().err
    content = {
        "format": 1, "model": {"name": "vim_micro"}, "classes": [], "transform": {}, "data": [], "routes": "sum",
        "keep": 0, "layers": [], "images": [], "wanted": 9,
    }  # fmt: skip
    (tmp_path / "store.json").write_text(json.dumps(content))
    assert main(["explore", str(tmp_path)]) == 2
    assert "this store is half written: 0 of 9 images are counted" in capsys.readouterr().err
    (tmp_path / "store.json").write_text(json.dumps({**content, "format": 3}))
    assert main(["explore", str(tmp_path)]) == 2
    assert "a store of format 3" in capsys.readouterr().err


def test_a_folder_without_images_is_a_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["collect", "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "store")]) == 2
    assert "no images" in capsys.readouterr().err
