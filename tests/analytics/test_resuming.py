"""A kill at any moment: what was counted stays, nothing counts twice, and the same command gives the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mamba_attn.analytics import AttentionStore, collect, collecting
from mamba_attn.analytics.index import Index
from mamba_attn.analytics.storage import Arrays, locked
from mamba_attn.errors import StoreError
from tests.analytics import cases
from tests.explanations.cases import VIM, save

OPTIONS = {"layers": ["*.1.*"], "keep": 3}  # one layer: few writes


class KilledError(BaseException):
    """Nothing of ours catches it, as nothing catches a kill."""


def kill_at(monkeypatch, moment):
    """Let the process 'die' before its so-manieth change on the disk; returns the changes seen so far."""
    seen = []

    def counting(real):
        def change(*args, **kwargs):
            seen.append(real.__qualname__)
            if len(seen) == moment:
                raise KilledError
            return real(*args, **kwargs)

        return change

    for owner, name in ((Arrays, "write"), (Arrays, "create"), (Arrays, "grow"), (Index, "write")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    monkeypatch.setattr(collecting, "_CHECKPOINT_SHARE", 0)  # a checkpoint after every batch, however long it takes
    monkeypatch.setattr(collecting, "discard", lambda folder: None)  # the dead tidy nothing up
    return seen


def content(folder):
    """Every number of a store, by name."""
    store = AttentionStore.open(folder)
    found = {"keys": np.array([image.key for image in store.images])}
    for layer in store.layers:
        for route in ("sum", 0, 1):
            found[f"mean {route}"] = store.mean(layer, route)
            found[f"variance {route}"] = store.variance(layer, route)
            found |= {f"{image.key} {route}": store.matrix(layer, image, route) for image in store.images[:3]}
        found["moments"] = np.stack(store.state_moments(layer))
        found["features"] = store.features(layer)
    found |= {f"{image.key} pixels": store.pixels(image) for image in store.images}
    return found


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    selector = cases.folder_of(folder, 2)  # six images, three batches
    (folder / "photos" / "red" / "broken.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        seen = kill_at(patch, -1)
        collect(cases.request(selector, **OPTIONS), folder / "whole")
    return selector, content(folder / "whole"), len(seen)


@pytest.mark.parametrize("part", range(12))
def test_a_kill_at_any_change_of_the_disk(place, tmp_path, part):
    selector, whole, changes = place
    moment = 1 + part * (changes - 1) // 11  # the first and the last too
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, moment)
        with pytest.raises(KilledError):
            collect(cases.request(selector, **OPTIONS), tmp_path / "store")
    if (tmp_path / "store" / "store.json").exists():
        (tmp_path / "store" / "store.json.new").write_text("{half of an ind")
        index = Index.read(tmp_path / "store")
        if index.finished:  # nothing but tidying up was left
            assert len(index.images) == 6
        else:
            with pytest.raises(StoreError, match=f"half written: {len(index.images)} of 7"):
                AttentionStore.open(tmp_path / "store")
        if index.images:  # what is counted is whole, and there are exactly its statistics
            store = AttentionStore.open(tmp_path / "store", unfinished=True)
            images = np.stack([store.features(0)[image.row] for image in store.images]).astype(np.float64)
            assert np.abs(images.mean(0) - store.mean(0).reshape(-1)).max() <= 2.0**-11 * np.abs(images).max()
    collect(cases.request(selector, **OPTIONS), tmp_path / "store")
    assert same(content(tmp_path / "store"), whole)
    assert len(list((tmp_path / "store").glob("statistics-*"))) == 1


def test_a_process_that_is_killed(tmp_path, place):
    selector, _, _ = place
    weights = save(tmp_path / "weights", "vim_micro", VIM, cases.CLASSES)
    call = [sys.executable, "-m", "mamba_attn.commands.cli", "collect", "--model", "vim_micro", "--weights", weights,
            "--data", selector, "--out", str(tmp_path / "store"), "--batch", "1"]  # fmt: skip
    slow = f"""
import time
from mamba_attn.analytics import collecting, command
from mamba_attn.commands.cli import main
made, count = command._request, collecting.Run._count

def request(*args):
    asked = made(*args)
    object.__setattr__(asked, "interval", 0.0)
    return asked

def slowly(self, samples):
    count(self, samples)
    time.sleep(0.3)

command._request, collecting.Run._count, collecting._CHECKPOINT_SHARE = request, slowly, 0
main({call[3:]!r})
"""
    child = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE)
    index = tmp_path / "store" / "store.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (index.exists() and json.loads(index.read_text())["images"]):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    counted = len(json.loads(index.read_text())["images"])
    assert 0 < counted < 6
    result = subprocess.run(call, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr  # one image is broken
    assert f"{6 - counted} images added, 6 in" in result.stdout
    store = AttentionStore.open(tmp_path / "store")
    assert len({image.key for image in store.images}) == 6
    features = store.features(0).astype(np.float64)
    assert np.abs(features.mean(0) - store.mean(0).reshape(-1)).max() <= 2.0**-11 * np.abs(features).max()


def test_nothing_is_done_twice(place, tmp_path):
    selector, _, _ = place
    asked = cases.request(selector, **OPTIONS, limit=4)
    first = collect(asked, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.json")}
    again = collect(asked, tmp_path / "store")
    assert (again.new, again.counted) == (0, first.counted)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.json")}


def test_a_larger_limit_adds_images(place, tmp_path):
    selector, whole, _ = place
    collect(cases.request(selector, **OPTIONS, limit=4), tmp_path / "store")
    found = collect(cases.request(selector, **OPTIONS), tmp_path / "store")
    assert found.counted == 6
    assert list(found.unreadable) == ["red/broken.png"]
    grown = content(tmp_path / "store")
    assert grown.keys() == whole.keys()
    for name, values in grown.items():
        assert name == "keys" or np.allclose(values, whole[name], rtol=1e-4, atol=1e-6)
    assert np.array_equal(grown["keys"], whole["keys"])


def test_one_process_at_a_time(tmp_path, place):
    selector, _, _ = place
    (tmp_path / "store").mkdir()
    with locked(tmp_path / "store"):
        with pytest.raises(StoreError, match="another mamba-attn collect is writing this store"):
            collect(cases.request(selector, **OPTIONS), tmp_path / "store")
        assert os.listdir(tmp_path / "store") == [".lock"]
    assert os.listdir(tmp_path / "store") == []
    assert collect(cases.request(selector, **OPTIONS), tmp_path / "store").counted == 6


def test_a_smaller_limit_settles_a_store_that_was_killed(place, tmp_path):
    selector, _, changes = place
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, changes - 1)
        with pytest.raises(KilledError):
            collect(cases.request(selector, **OPTIONS), tmp_path / "store")
    counted = len(Index.read(tmp_path / "store").images)
    assert collect(cases.request(selector, **OPTIONS, limit=1), tmp_path / "store").counted == counted
    assert len(AttentionStore.open(tmp_path / "store").images) == counted
