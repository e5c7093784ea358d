"""Features and pixels of the first images alone: statistics are of all, and no bit depends on who makes the parts."""

import json

import numpy as np
import pytest

from mamba_attn.analytics import AttentionStore, collect, merge_stores
from mamba_attn.analytics.planning import plan
from mamba_attn.analytics.request import FEATURES
from mamba_attn.analytics.store import NotStoredError
from mamba_attn.commands import cli
from mamba_attn.distributed import Ranks
from mamba_attn.errors import StoreError
from mamba_attn.findings.controls import counted, report
from mamba_attn.viewer.page import described
from mamba_attn.viewer.points import Scatter
from mamba_attn.viewer.report.content import make
from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import Pane
from tests.analytics import cases
from tests.explanations.cases import VIM, save

FIRST = 5  # of twelve, within the second of three parts


def asked(selector, features=FIRST, **options):
    return cases.request(selector, **{"keep": 2, "layers": ["*.1.*"], "features": features, **options})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    selector = cases.folder_of(folder, 4)
    collect(asked(selector), folder / "some")
    collect(asked(selector, "all"), folder / "all")
    return selector, folder / "some", folder / "all"


def content(folder):
    """Every number of a store, as ``cases.content`` but of the images that have them."""
    store = AttentionStore.open(folder)
    found = {"keys": [image.key for image in store.images], "featured": list(store.featured)}
    for layer in store.layers:
        for route in ("sum", *range(layer.routes)):
            found[f"mean {route}"], found[f"variance {route}"] = store.mean(layer, route), store.variance(layer, route)
            found |= {f"matrix {row} {route}": store.matrix(layer, row, route) for row in range(2)}
        found["features"], found["moments"] = store.features(layer), np.stack(store.state_moments(layer))
    return found | {f"pixels {row}": store.pixels(row) for row in store.featured}


def test_statistics_are_of_all_images_and_features_of_the_first(place):
    some, whole = content(place[1]), content(place[2])
    assert (some["featured"], whole["featured"]) == (list(range(FIRST)), list(range(12)))
    assert np.array_equal(some.pop("features"), whole["features"][:FIRST])
    some.pop("featured")
    assert all(np.array_equal(each, whole[name]) for name, each in some.items())
    assert not list(place[1].glob("parts/000002-*/rows/pixels"))  # nothing is written for a part without any


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_change_no_bit(place, tmp_path, world):
    for rank in reversed(range(world)):
        collect(asked(place[0]), tmp_path / "store", ranks=Ranks(rank, world, launcher="a job array"))
    assert cases.same(content(tmp_path / "store"), content(place[1]))


def test_more_images_later_change_nothing_of_the_first(place, tmp_path):
    for limit in (3, 6, 12):
        collect(asked(place[0], limit=limit), tmp_path / "store")
        assert list(AttentionStore.open(tmp_path / "store").featured) == list(range(min(limit, FIRST)))
    collect(asked(place[0], None), tmp_path / "store")  # as the store says
    found, whole = content(tmp_path / "store"), content(place[1])
    assert found["featured"] == whole["featured"]
    assert all(np.array_equal(found[f"pixels {row}"], whole[f"pixels {row}"]) for row in range(FIRST))
    np.testing.assert_allclose(found["mean sum"], whole["mean sum"], atol=1e-12)
    with pytest.raises(StoreError, match=r"this store is of features=5, not features=4; nothing was changed"):
        collect(asked(place[0], 4), tmp_path / "store")
    with pytest.raises(StoreError, match=r"features=5, not features='all'"):
        collect(asked(place[0], "all"), tmp_path / "store")


def test_unreadable_images_count_among_the_first(tmp_path):
    selector = cases.folder_of(tmp_path, 4)
    keys = [item.key for item in asked(selector).data.items]
    for number in (1, 4):
        (tmp_path / "photos" / keys[number]).write_bytes(b"no image")
    collect(asked(selector, keep=0), tmp_path / "store")
    store = AttentionStore.open(tmp_path / "store")
    assert [store.images[row].key for row in store.featured] == [keys[0], keys[2], keys[3]]
    assert len(store.images) == 10
    assert store.features(0).shape[0] == 3


def test_merged_stores_keep_what_each_has(place, tmp_path):
    other = cases.folder_of(tmp_path, 2, "others")
    collect(asked(other, 3), tmp_path / "other")
    assert merge_stores([place[1], tmp_path / "other"], tmp_path / "both") == 18
    both, second = AttentionStore.open(tmp_path / "both"), AttentionStore.open(tmp_path / "other")
    assert list(both.featured) == [*range(FIRST), *range(12, 15)]
    assert np.array_equal(both.features(0)[FIRST:], second.features(0))
    assert np.array_equal(both.pixels(13), second.pixels(1))
    with pytest.raises(NotStoredError):
        both.pixels(15)
    merge_stores([place[1]], tmp_path / "copy")
    assert cases.same(content(tmp_path / "copy"), content(place[1]))
    assert AttentionStore.open(tmp_path / "copy").index.features == FIRST  # more can be added to a copy


def test_stores_of_before_have_all(place, tmp_path):
    index = json.loads((place[2] / "store.json").read_text())
    del index["features"]
    for name in ("parts", "merged"):
        (tmp_path / name).symlink_to(place[2] / name)
    (tmp_path / "store.json").write_text(json.dumps(index))
    assert cases.same(content(tmp_path), content(place[2]))
    assert collect(asked(place[0], None), tmp_path).new == 0


def test_what_shows_images_shows_those_and_says_so(place, tmp_path):
    store = AttentionStore.open(place[1])
    with pytest.raises(NotStoredError, match=r"has features and pixels of 5 of 12 images, and not of this one"):
        store.pixels(FIRST)
    source = Source(store)
    assert (len(source.images), source.featured) == (FIRST, FIRST)
    assert (described(source)["collected"], described(source)["featured"]) == (12, FIRST)
    assert Scatter(source).points(Pane(mode="blocks")).shape == (FIRST, 2)
    assert "5 of 12" in make([source], ("pca",), 1, 8.0, "")[0]
    assert (counted(store), counted(store, 2), counted(store, 100)) == (FIRST, 2, FIRST)
    found = report("photos", store, tmp_path, seeds=0)
    assert found.images == FIRST
    assert "measured on 5 of 12 images: the store has features and pixels of no others." in found.notes


def test_a_store_without_any(place, tmp_path):
    collect(asked(place[0], 0, keep=0), tmp_path / "store")
    store = AttentionStore.open(tmp_path / "store")
    assert np.array_equal(store.mean(0), AttentionStore.open(place[1]).mean(0))
    assert store.features(0).shape[0] == len(store.featured) == 0
    assert "12" in store._repr_html_()
    with pytest.raises(StoreError, match="features and pixels of no image"):
        counted(store)


def test_the_plan_and_the_default(place, tmp_path):
    assert asked(place[0], None).featured == FEATURES == 10_000
    some, whole = (plan(asked(place[0], features), tmp_path / "new", Ranks()) for features in (FIRST, "all"))
    assert "features and pixels: of the first 5 images; all count in the statistics" in some.lines()
    assert some.rows < whole.rows
    for store, its in ((place[1], some), (place[2], whole)):
        there = sum(path.is_file() for path in store.rglob("*"))
        assert 0.8 * there < its.files <= there


def test_what_does_not_fit_is_refused(place, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"keep=6: it needs image 6, but .* only of the first 5; give features=6"):
        asked(place[0], keep=6)
    last = asked(place[0]).data.items[11].key
    with pytest.raises(ValueError, match=r"it needs image 12"):
        asked(place[0], keep=[last])
    for wrong in (-1, "some", True):
        with pytest.raises(ValueError, match=r"features=.*: expected a number from 0 on, or 'all'"):
            asked(place[0], wrong)
    weights = save(tmp_path / "weights", "vim_micro", VIM)
    call = ["collect", "--data", place[0], "--model", "vim_micro", "--weights", weights, "--out", str(tmp_path / "out")]
    assert cli.main([*call, "--features", "few"]) == 2
    assert "--features few: expected a number from 0 on, or all." in capsys.readouterr().err
    assert cli.main([*call, "--features", "3", "--plan"]) == 0
    assert "of the first 3 images" in capsys.readouterr().out
    assert cli.main([*call, "--features", "3"]) == 0
    assert len(AttentionStore.open(tmp_path / "out").featured) == 3
