"""A kill at any moment: what was counted stays, nothing counts twice, and the same command gives the same numbers."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mamba_attn.analytics import AttentionStore, collect, collect_part, missing_parts
from mamba_attn.analytics.arrays import Arrays
from mamba_attn.analytics.collecting import Collection
from mamba_attn.analytics.part_writer import PartWriter
from mamba_attn.analytics.places import LocalPlace
from mamba_attn.errors import StoreError
from tests.analytics import cases
from tests.analytics.cases import content, same
from tests.explanations.cases import VIM, save

OPTIONS = {"layers": ["*.1.*"], "keep": 3, "part": 3}  # one layer: few writes


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

    changes = [(Arrays, name) for name in ("write", "create", "cut")]
    changes += [(LocalPlace, name) for name in ("create", "replace", "remove")]
    for owner, name in changes:
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    monkeypatch.setattr(PartWriter, "discard", lambda self: None)  # the dead tidy nothing up
    monkeypatch.setattr(Collection, "discard", lambda self: None)
    return seen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    selector = cases.folder_of(folder, 2)  # six images, and a broken one: three parts
    (folder / "photos" / "red" / "broken.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        seen = kill_at(patch, -1)
        collect(cases.request(selector, **OPTIONS), folder / "whole")
    return selector, content(folder / "whole"), len(seen)


def images_of(folder):
    """The images of every counted part."""
    return [each["images"] for each in parts_of(folder).values()]


def parts_of(folder):
    """Every counted part, by its number."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "parts").glob("*.json"))}
    return {int(number): part for number, part in found.items()}


@pytest.mark.parametrize("part", range(12))
def test_a_kill_at_any_change_of_the_disk(place, tmp_path, part):
    selector, whole, changes = place
    moment = 1 + part * (changes - 1) // 11  # the first and the last too
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, moment)
        with pytest.raises(KilledError):
            collect(cases.request(selector, **OPTIONS), tmp_path / "store")
    before = {}
    if (tmp_path / "store" / "store.json").exists():
        (tmp_path / "store" / "store.json.0.new").write_text("{half of an ind")
        before = parts_of(tmp_path / "store")
        counted = sum(map(len, images_of(tmp_path / "store")))
        if len(before) < 3:
            with pytest.raises(StoreError, match=f"half written: {counted} of 7"):
                AttentionStore.open(tmp_path / "store")
        if before:  # what is counted is whole, and the statistics are of exactly these images
            store = AttentionStore.open(tmp_path / "store", unfinished=True)
            assert len(store.images) == counted
            images = store.features(0).astype(np.float64)
            assert np.abs(images.mean(0) - store.mean(0).reshape(-1)).max() <= 2.0**-11 * np.abs(images).max()
    collect(cases.request(selector, **OPTIONS), tmp_path / "store")
    assert same(content(tmp_path / "store"), whole)
    after = parts_of(tmp_path / "store")
    assert {number: after[number] for number in before} == before  # nothing counted was made again
    folders = {path.name for path in (tmp_path / "store" / "parts").iterdir() if path.is_dir()}
    assert folders == {each["rows"].split("/")[1] for each in after.values()}  # and nothing else was left
    assert not list((tmp_path / "store" / "parts").glob("*/statistics"))
    assert len([path for path in (tmp_path / "store" / "merged").iterdir() if path.suffix == ".json"]) == 1


def test_a_process_that_is_killed(tmp_path, place):
    selector, _, _ = place
    weights = save(tmp_path / "weights", "vim_micro", VIM, cases.CLASSES)
    call = ["collect", "--model", "vim_micro", "--weights", weights, "--data", selector, "--out",
            str(tmp_path / "store"), "--batch", "1", "--part", "1"]  # fmt: skip
    slow = f"""
import time
from mamba_attn.analytics import part_run
from mamba_attn.commands.cli import main
count = part_run.PartRun._count

def slowly(self, samples):
    count(self, samples)
    time.sleep(0.3)

part_run.PartRun._count = slowly
main({call!r})
"""
    child = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not any(map(len, images_of(tmp_path / "store"))):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    counted = sum(map(len, images_of(tmp_path / "store")))
    assert 0 < counted < 6
    result = subprocess.run([sys.executable, "-m", "mamba_attn", *call], capture_output=True, text=True)
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


def test_two_writers_of_one_part_and_no_lock(tmp_path, place):
    """The second one makes the same numbers, is not counted, and leaves nothing behind."""
    selector, whole, _ = place
    asked = cases.request(selector, **OPTIONS)
    missing_parts(asked, tmp_path / "store")
    mine = Collection.open(asked, tmp_path / "store")
    others, real = [], PartWriter.commit

    def late(self, *args):
        patch.setattr(PartWriter, "commit", real)  # the other one is in time
        others.append(collect_part(cases.request(selector, **OPTIONS), 1, tmp_path / "store"))
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartWriter, "commit", late)
        assert mine.part(1) is None
    assert [part.number for part in others] == [1]
    assert collect(asked, tmp_path / "store").counted == 6
    assert same(content(tmp_path / "store"), whole)


def test_a_smaller_limit_settles_a_store_that_was_killed(place, tmp_path):
    selector, _, _ = place
    assert missing_parts(cases.request(selector, **OPTIONS), tmp_path / "store") == [0, 1, 2]
    collect_part(cases.request(selector, **OPTIONS), 0, tmp_path / "store")
    counted = sum(map(len, images_of(tmp_path / "store")))
    assert 0 < counted < 6
    assert collect(cases.request(selector, **OPTIONS, limit=1), tmp_path / "store").counted == counted
    assert len(AttentionStore.open(tmp_path / "store").images) == counted
