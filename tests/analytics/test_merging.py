"""Two stores as one: the same as one pass over all images."""

import numpy as np
import pytest

from mamba_attn.analytics import AttentionStore, collect, merge_stores
from mamba_attn.errors import StoreError
from tests.analytics import cases


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for name, count in (("first", 1), ("second", 2)):
        collect(
            cases.request(cases.folder_of(folder, count, name), "vmamba_micro", keep=count), folder / f"{name}.store"
        )
    return folder


def test_the_merged_store_is_that_of_all_images(place, tmp_path):
    assert merge_stores([place / "first.store", place / "second.store"], tmp_path / "both") == 9
    first, second, both = (
        AttentionStore.open(path) for path in (place / "first.store", place / "second.store", tmp_path / "both")
    )
    assert [image.key for image in both.images[:3]] == [image.key for image in first.images]
    assert len({image.key for image in both.images}) == 9
    assert [image.row for image in both.images if image.kept] == [0, 3, 4]
    names = {f"second: {image.key}" for image in first.images}  # in both collections, of the same name
    assert names <= {image.key for image in both.images}
    for layer in both.layers:
        features = np.concatenate([first.features(layer.name), second.features(layer.name)])
        assert np.allclose(both.features(layer), features, rtol=0, atol=2.0**-11 * np.abs(features).max())
        for route in ("sum", 0, 3):
            means = [store.mean(layer.name, route) for store in (first, second)]
            mean = (3 * means[0] + 6 * means[1]) / 9
            assert np.allclose(both.mean(layer, route), mean, rtol=1e-12, atol=1e-15)
            variances = [store.variance(layer.name, route) for store in (first, second)]
            within = (3 * variances[0] + 6 * variances[1]) / 9
            between = (3 * (means[0] - mean) ** 2 + 6 * (means[1] - mean) ** 2) / 9
            assert np.allclose(both.variance(layer, route), within + between, rtol=1e-9, atol=1e-18)
            assert np.array_equal(both.matrix(layer, 4, route), second.matrix(layer.name, 1, route))
    for row in range(9):
        store, own = (first, row) if row < 3 else (second, row - 3)
        assert np.array_equal(both.pixels(row), store.pixels(own))
    with pytest.raises(KeyError, match="no matrices are stored"):
        both.matrix(0, 1)


def test_what_does_not_belong_together(place, tmp_path):
    folder = cases.folder_of(tmp_path, 1)
    collect(cases.request(folder, "vmamba_micro", seed=1), tmp_path / "seed")
    collect(cases.request(folder, "vmamba_micro", routes="sum"), tmp_path / "sum")
    collect(cases.request(folder, "vmamba_micro", layers=["*.0.*.0.*"]), tmp_path / "layer")
    first = place / "first.store"
    for name, sentence in (("seed", "differ in models"), ("sum", "differ in routes"), ("layer", "differ in layers")):
        with pytest.raises(StoreError, match=sentence):
            merge_stores([first, tmp_path / name], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    with pytest.raises(StoreError, match=r"both count '.*' and 2 others; each image counts once, so they are not"):
        merge_stores([first, first], tmp_path / "both")
    with pytest.raises(StoreError, match="already holds a store; nothing was changed"):
        merge_stores([first, place / "second.store"], tmp_path / "seed")


def test_a_merged_store_is_not_gone_on_with(place, tmp_path):
    merge_stores([place / "first.store", place / "second.store"], tmp_path / "both")
    index = AttentionStore.open(tmp_path / "both").index
    asked = cases.request(str(place / "first"), "vmamba_micro", keep=index.keep, part=index.part)
    with pytest.raises(StoreError, match="this store is of images first and second, not first"):
        collect(asked, tmp_path / "both")
