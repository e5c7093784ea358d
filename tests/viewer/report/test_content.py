"""What goes into a report, and what is left out when it does not fit."""

import base64
import importlib
import json
import re
import shutil

import numpy as np
import pytest

from mamba_attn.viewer.page import as_json
from mamba_attn.viewer.report.budget import ReportError
from mamba_attn.viewer.report.quantised import ERROR
from tests.viewer.report import cases


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return cases.stored(tmp_path_factory.mktemp("vmamba"))


@pytest.fixture(scope="module")
def vim(tmp_path_factory):
    return cases.stored(tmp_path_factory.mktemp("vim"), "vim_micro", keep=1)


def about(page):
    return json.loads(re.search(r'<script type="application/json" id="about">(.*?)</script>', page, re.DOTALL)[1])


def held(page, layer, key):
    """A matrix of the page, patches first."""
    number = layer["matrices"][key]
    text = re.search(rf'<script type="text/plain" id="matrix-{number}">(.*?)</script>', page)[1]
    return cases.unpacked(base64.b64decode(text), layer["tokens"], layer["tokens"])


def close(found, matrix):
    return bool((np.abs(found - matrix) <= 1.01 * ERROR * np.abs(matrix).max(1, keepdims=True)).all())


def test_all_matrices_are_there_and_right(store):
    page, content = cases.report(store)
    (its_store,) = about(page)["stores"]
    assert content.notes == []
    for layer, its in zip(store.layers, its_store["layers"], strict=True):
        wanted = {f"{what}/{r}" for what in ("mean", 0, 1) for r in ("sum", 0, 1, 2, 3)}
        assert set(its["matrices"]) == wanted | {"spread/sum"}
        assert close(held(page, its, "spread/sum"), np.sqrt(store.variance(layer)))
        assert close(held(page, its, "mean/sum"), store.mean(layer))
        assert close(held(page, its, "mean/2"), store.mean(layer, 2))
        assert close(held(page, its, "1/sum"), store.matrix(layer, 1))
        assert close(held(page, its, "0/3"), store.matrix(layer, 0, 3))
    stages = {f"stage{stage}/pca" for stage in (0, 1)}
    patches = {f"{n}/{r}/{d}/pca" for n in range(3) for r in ("sum", 0, 1, 2, 3) for d in ("row", "column")}
    assert set(its_store["points"]) == stages | patches


def test_the_class_token_comes_last(vim):
    page, _ = cases.report(vim)
    its = about(page)["stores"][0]["layers"][0]
    layout = vim.layers[0].layout
    order = [*layout.patches.tolist(), *layout.class_tokens]
    assert close(held(page, its, "mean/sum"), vim.mean(0)[np.ix_(order, order)])
    assert [order[cell] for cell in its["orders"][1]] == vim.layers[0].orders[1].tolist()
    assert its["classes"] == 1


def test_points_are_the_store_s_and_are_remembered_there(store, monkeypatch):
    cases.report(store)
    methods = importlib.import_module("mamba_attn.analytics.embed")._METHODS
    monkeypatch.setitem(methods, "pca", None)  # whoever calls it fails
    cases.report(store)


def test_a_store_that_cannot_be_written_is_shown_too(tmp_path, monkeypatch):
    def no(*_):
        raise PermissionError("read-only")

    store = cases.stored(tmp_path, images=2)
    whole = about(cases.report(store)[0])["stores"][0]["points"]
    shutil.rmtree(store.folder / "embeddings")
    monkeypatch.setattr(type(store), "save_embedding", no)
    assert about(cases.report(store)[0])["stores"][0]["points"] == whole
    assert not (store.folder / "embeddings").exists()


def test_a_page_is_never_larger_than_it_may_be_and_says_what_is_missing(store, vim):
    whole = len(cases.report(store, vim)[0].encode())
    sizes = []
    for limit in (whole + 20_000, whole - 100_000, whole // 2):
        page, content = cases.report(store, vim, limit=limit)
        assert len(page.encode()) <= limit
        assert bool(content.notes) == (limit < whole)
        sizes.append(len(content.matrices))
        for its in about(page)["stores"]:
            assert all("mean/sum" in layer["matrices"] for layer in its["layers"])
    assert sizes[0] > sizes[1] > sizes[2] > 0
    note = re.search(r"left out to stay within size=[\d.]+ \((\d) of 2 images can be shown in every block\); size="
                     r"(\d+) holds all", content.notes[0])  # fmt: skip
    assert int(note[1]) < 2
    assert cases.report(store, limit=int(note[2]) * 10**6)[1].notes == []
    few = cases.report(store, images=1)[1]
    assert few.notes == ["vmamba_micro: 1 of 2 images kept in full are not on this page; images=2 adds them."]
    with pytest.raises(ReportError, match=r"the mean of .* does not fit|names and orders alone need"):
        cases.report(store, limit=60_000)


def test_fewer_images_and_routes(store, tmp_path):
    page, _ = cases.report(store, images=1)
    assert not any(key.startswith("1/") for key in about(page)["stores"][0]["layers"][0]["matrices"])
    alone = cases.stored(tmp_path, keep=0, routes="sum", images=2)
    page, _ = cases.report(alone)
    assert [set(its["matrices"]) for its in about(page)["stores"][0]["layers"]] == [{"mean/sum", "spread/sum"}] * 3
    assert len(about(page)["stores"][0]["photos"]) == 1


def test_softmax_attention_has_no_path(tmp_path):
    page, _ = cases.report(cases.stored(tmp_path, "vit_micro", images=2, keep=1))
    assert [its["orders"] for its in about(page)["stores"][0]["layers"]] == [[], []]


def test_grids_that_are_too_large_are_left_to_the_explorer(store, monkeypatch):
    from mamba_attn.viewer.report import stored

    monkeypatch.setattr(stored, "CELLS", 24)
    page, made = cases.report(store)
    (its_store,) = about(page)["stores"]
    assert [its["number"] for its in its_store["layers"]] == [1, 2]
    assert "1 layer of more than 24 patches (8x12) is left out. mamba-attn explore store shows them" in made.notes[0]
    monkeypatch.setattr(stored, "CELLS", 4)
    with pytest.raises(ReportError, match=r"grids of more than 4 patches\. mamba-attn explore store .*linear time"):
        cases.report(store)


def test_names_cannot_end_the_script_that_they_stand_in(store):
    text = as_json({"a": "</script><!--<script>&amp;\u2028"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"a": "</script><!--<script>&amp;\u2028"}
    page, _ = cases.report(store)
    assert cases.HOSTILE not in page
    assert any(cases.HOSTILE in image[0] for image in about(page)["stores"][0]["images"])


def test_the_page_may_load_nothing(store):
    page, _ = cases.report(store)
    assert "default-src 'none'; script-src 'sha256-" in page
    assert not re.search(r'(src|href)="?https?:', page)
