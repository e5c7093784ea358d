"""Stores that are not what they should be, and names that they do not hold: said, and nothing overwritten."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from mamba_attn.analytics import AttentionStore, NotStoredError, collect
from mamba_attn.analytics.arrays import Arrays
from mamba_attn.analytics.index import place_of
from mamba_attn.analytics.places import LocalPlace
from mamba_attn.errors import StoreError, WeightsError
from tests.analytics import cases


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    selector = cases.folder_of(folder, 1)
    collect(cases.request(selector, keep=1), folder / "store")
    return folder, selector


@pytest.fixture
def copy(place, tmp_path):
    """A store that may be damaged."""
    return shutil.copytree(place[0] / "store", tmp_path / "store")


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed(folder, **values):
    index = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**index, **values}))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, "this store is of model vim_micro with weights .*, not vim_micro with weights "),
        ({"name": "vit_micro"}, "this store is of model vim_micro .*, not vit_micro"),
        ({"keep": 2}, "this store is of keep=1, not keep=2"),
        ({"routes": "sum"}, "this store is of routes='each', not routes='sum'"),
        ({"layers": ["*.0.*"]}, "this store is of other layers, orders or grids"),
        ({"model_options": {"class_token": "first"}}, "this store is of other layers, orders or grids"),
    ],
)
def test_another_model_or_request_overwrites_nothing(place, copy, options, sentence):
    before = digest(copy)
    with pytest.raises(StoreError, match=rf"{sentence}.*nothing was changed\. Choose another folder\."):
        collect(cases.request(place[1], **{"keep": 1, **options}), copy)
    assert digest(copy) == before


def test_other_images_overwrite_nothing(copy, tmp_path):
    before = digest(copy)
    (tmp_path / "elsewhere").mkdir()
    for name, sentence in (
        ("other", "is of images photos, not other"),
        ("elsewhere/photos", "does not hold the files"),
    ):
        with pytest.raises(StoreError, match=sentence):
            collect(cases.request(cases.folder_of(tmp_path, 1 + (name != "other"), name), keep=1), copy)
    assert digest(copy) == before


def test_the_same_files_elsewhere_are_the_same_images(place, copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = cases.folder_of(tmp_path, 1, "elsewhere/photos")
    assert collect(cases.request(moved, keep=1), copy).new == 0


def test_another_version_is_refused_by_reading_and_by_writing(place, copy):
    changed(copy, format=7, package="9.9")
    before = digest(copy)
    sentence = r"a store of format 7, and mamba_attn .* reads formats 1 to 2; .* the version that wrote it \(9\.9\)"
    with pytest.raises(StoreError, match=sentence):
        AttentionStore.open(copy)
    with pytest.raises(StoreError, match=sentence):
        collect(cases.request(place[1], keep=1), copy)
    assert digest(copy) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 1}', "[" * 5000])
def test_an_index_that_is_none(copy, text):
    (copy / "store.json").write_text(text)
    with pytest.raises(StoreError, match=r"this is not JSON|it is damaged|a store of format None"):
        AttentionStore.open(copy)


@pytest.mark.parametrize(
    "values",
    [
        {"part": 0}, {"part": "all"}, {"wanted": [3, 3]}, {"wanted": "all"}, {"layers": [{}]}, {"extra": 1},
        {"model": None}, {"format": 1, "images": [["a"]]}, {"format": 1, "images": [], "statistics": "../etc"},
    ],
)  # fmt: skip
def test_an_index_with_other_values_than_ours(copy, values):
    changed(copy, **values)
    with pytest.raises(StoreError, match="it is damaged"):
        AttentionStore.open(copy)


def test_orders_outside_the_grid_are_damage(copy):
    index = json.loads((copy / "store.json").read_text())
    index["layers"][0]["orders"][0][0] = 999
    changed(copy, layers=index["layers"])
    with pytest.raises(StoreError, match=r"it is damaged .*orders of layers\.0\.mixer"):
        AttentionStore.open(copy)


def test_folders_that_are_no_stores(place, tmp_path):
    with pytest.raises(StoreError, match="there is no such folder; make a store with mamba-attn collect"):
        AttentionStore.open(tmp_path / "absent")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match=r"this folder is not a store of mamba-attn collect"):
        AttentionStore.open(tmp_path / "mine")
    with pytest.raises(StoreError, match=r"this folder holds 'thesis\.tex' and no store; nothing was written"):
        collect(cases.request(place[1]), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="cannot write this folder"):
        collect(cases.request(place[1]), tmp_path / "file")


def test_missing_and_damaged_numbers_are_never_zeros(copy):
    chunks = [path for path in copy.glob("merged/000001-*/000/mean/sum/c/**/*") if path.is_file()]
    store = AttentionStore.open(copy)
    whole = chunks[0].read_bytes()
    for damage in (whole[:-3], whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], b""):
        chunks[0].write_bytes(damage)
        with pytest.raises(StoreError, match=r"array '000/mean/sum' is missing or damaged"):
            store.mean(0)
    chunks[0].unlink()
    with pytest.raises(StoreError, match=r"'000/mean/sum' is missing or damaged \(numbers are missing\)"):
        store.mean(0)
    (rows,) = copy.glob("parts/*/rows")
    shutil.rmtree(rows / "features")
    with pytest.raises(StoreError, match=r"array 'features/001' is missing or damaged"):
        AttentionStore.open(copy).features(1)
    shutil.rmtree(rows)
    with pytest.raises(StoreError, match="what should hold its arrays is missing or damaged"):
        AttentionStore.open(copy).pixels(0)


def test_lost_pixels_are_an_error_and_black_ones_are_not(copy, tmp_path):
    where = LocalPlace(tmp_path)
    arrays = Arrays(where, "arrays", writable=True)
    arrays.create_rows("pixels", 20, (4, 5, 3), "u1")
    arrays.write("pixels", np.ones((2, 4, 5, 3), np.uint8), 0)
    again = Arrays(where, "arrays", writable=True)
    again.write("pixels", np.zeros((20, 4, 5, 3), np.uint8), 0)
    assert not Arrays(where, "arrays").read("pixels", 17).any()
    before = AttentionStore.open(copy).pixels(0)
    (pixels,) = copy.glob("parts/*/rows/pixels")
    (pixels / "c" / "0" / "0" / "0" / "0").unlink()
    with pytest.raises(StoreError, match=r"array 'pixels' is missing or damaged \(chunk 0 is lost\)"):
        AttentionStore.open(copy).pixels(0)
    # older stores did not write chunks of black images: they read as they did
    about = pixels / "zarr.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "attributes": {}}))
    np.testing.assert_array_equal(AttentionStore.open(copy).pixels(0), np.zeros_like(before))


def test_names_that_it_does_not_hold(place):
    store = AttentionStore.open(place[0] / "store")
    key = store.images[0].key
    with pytest.raises(KeyError, match=r"it holds no layer 'layers\.0\.mixr'\. Did you mean 'layers\.0\.mixer'"):
        store.mean("layers.0.mixr")
    with pytest.raises(KeyError, match="it holds no layer 2"):
        store.mean(2)
    with pytest.raises(KeyError, match=r"no route 2; expected 'sum' or 0\.\.1"):
        store.mean(0, 2)
    with pytest.raises(KeyError, match="no route 'all'"):
        store.variance(0, "all")
    with pytest.raises(KeyError, match=rf"it holds no image '{key}x' of 3\. Did you mean '{key}'"):
        store.pixels(f"{key}x")
    with pytest.raises(KeyError, match="it holds no image -1 of 3"):
        store.pixels(-1)
    with pytest.raises(NotStoredError, match=r"no matrices are stored for this image, only for 1 others; .*keep="):
        store.matrix(0, 1)
    with pytest.raises(IndexError, match=r"token 16: expected the index of a token, 0\.\.15"):
        store.mean_row(0, 16)


def test_the_only_route_is_the_sum(tmp_path):
    collect(cases.request(cases.folder_of(tmp_path, 1), "vit_micro"), tmp_path / "store")
    store = AttentionStore.open(tmp_path / "store")
    assert np.array_equal(store.mean(0, 0), store.mean(0))
    assert store.mean(0).sum(1) == pytest.approx(1)


def test_a_model_made_in_memory_does_not_come_back(place):
    with pytest.raises(StoreError, match="made in memory, whose weights are in no file; trace that model itself"):
        AttentionStore.open(place[0] / "store").model()


def test_other_weights_in_the_model_s_file(copy, tmp_path):
    from tests.explanations.cases import save

    weights = save(tmp_path / "weights", "vim_micro", cases.OPTIONS["vim_micro"])
    index = json.loads((copy / "store.json").read_text())
    changed(copy, model={**index["model"], "weights": weights, "fingerprint": "0" * 12})
    with pytest.raises(StoreError, match=r"collected with weights 000000000000, and '.*' now holds"):
        AttentionStore.open(copy).model()
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(WeightsError, match="no such file"):
        AttentionStore.open(copy).model()


def test_embeddings_are_of_these_images(place, copy, tmp_path):
    store = AttentionStore.open(copy)
    assert store.embedding("pca") is None
    points = np.arange(6.0).reshape(3, 2)
    store.save_embedding("pca", points, {"seconds": 1.5})
    array, about = AttentionStore.open(copy).embedding("pca")
    assert np.array_equal(array, points)
    assert about == {"seconds": 1.5}
    assert store.embedding("../pca") is None
    collect(cases.request(place[1], keep=1, limit=2), tmp_path / "fewer")
    shutil.copytree(copy / "embeddings", tmp_path / "fewer" / "embeddings")
    assert AttentionStore.open(tmp_path / "fewer").embedding("pca") is None
    (file,) = (copy / "embeddings").iterdir()
    for damage in (b"", b"PK\x03\x04", file.read_bytes()[:-40]):
        file.write_bytes(damage)
        with pytest.raises(StoreError, match=r"it is damaged .*; delete this file"):
            store.embedding("pca")


@pytest.mark.parametrize(
    ("names", "grids", "places"),
    [
        (["layers.0.mixer", "layers.1.mixer"], [(4, 4)] * 2, [(0, 0), (0, 1)]),
        (["layers.0.blocks.0.op", "layers.1.blocks.1.op"], [(4, 4), (2, 2)], [(0, 0), (1, 1)]),
        (
            ["net.layers.0.blocks.0.op", "net.layers.1.blocks.0.op", "net.up.0.blocks.0.op", "net.up.0.blocks.1.op"],
            [(4, 4), (2, 2), (2, 2), (2, 2)],
            [(0, 0), (1, 0), (2, 0), (2, 1)],
        ),
        (["down.0.op", "down.1.op", "up.0.op"], [(4, 4), (2, 2), (4, 4)], [(0, 0), (0, 1), (1, 0)]),
        (["layers.0.op", "layers.0.op#2", "layers.1.op"], [(4, 4)] * 3, [(0, 0), (0, 1), (0, 2)]),
        (["", ""], [(4, 4), (2, 2)], [(0, 0), (1, 0)]),
        (["a.0.1.2", "a.0.1.3", "b.0"], [(4, 4), (4, 4), (2, 2)], [(0, 0), (0, 1), (1, 0)]),
    ],
)
def test_stages_and_blocks(names, grids, places):
    assert place_of(names, grids) == places
