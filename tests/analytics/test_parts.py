"""A store is a list of parts: who makes them, how many processes and in which order changes no bit."""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

from mamba_attn.analytics import AttentionStore, collect, collect_part, folding, missing_parts
from mamba_attn.analytics.folding import Merged
from mamba_attn.analytics.places import LocalPlace
from mamba_attn.distributed import Ranks
from mamba_attn.errors import StoreError
from tests.analytics import cases
from tests.analytics.cases import content, same
from tests.explanations.cases import VIM, save

PARTS = {"layers": ["*.1.*"], "keep": 3, "part": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    selector = cases.folder_of(folder, 3)  # nine images: five parts
    collect(cases.request(selector, **PARTS), folder / "whole")
    return selector, content(folder / "whole")


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (3, 1, 0, 2)])
def test_ranks_and_their_order_change_no_bit(place, tmp_path, order):
    selector, whole = place
    for at, rank in enumerate(order):
        ranks = Ranks(rank, len(order), launcher="a job array")
        found = collect(cases.request(selector, **PARTS), tmp_path / "store", ranks=ranks)
        mine = [json.loads(path.read_text()) for path in (tmp_path / "store" / "parts").glob("*.json")]
        assert {each["writer"]["rank"] for each in mine} == set(order[: at + 1])
        assert all(each["number"] % len(order) == each["writer"]["rank"] for each in mine)
        assert found.left == 5 - len(mine)
        assert (found.left > 0) == (at < len(order) - 1)  # the last one merges
    assert found.counted == 9
    assert same(content(tmp_path / "store"), whole)


def test_parts_in_any_order_by_any_scheduler(place, tmp_path):
    selector, whole = place
    asked = pickle.loads(pickle.dumps(cases.request(selector, **PARTS)))  # as another process gets it
    numbers = missing_parts(asked, tmp_path / "store")
    assert numbers == [0, 1, 2, 3, 4]
    random.Random(0).shuffle(numbers)
    for number in numbers:
        assert collect_part(asked, number, tmp_path / "store").number == number
    assert collect_part(asked, 2, tmp_path / "store") is None
    with pytest.raises(StoreError, match=r"it has parts 0\.\.4, and no part 5"):
        collect_part(asked, 5, tmp_path / "store")
    assert (tmp_path / "store" / "merged").exists() is False
    lazily = content(tmp_path / "store")  # parts merged as they are read
    assert same(lazily, whole)
    assert collect(asked, tmp_path / "store").new == 0
    assert Merged.latest(LocalPlace(tmp_path / "store")).parts == 5
    assert same(content(tmp_path / "store"), whole)


def test_merging_meanwhile_changes_no_bit(place, tmp_path, monkeypatch):
    selector, whole = place
    monkeypatch.setattr("mamba_attn.analytics.collecting._MERGE_EVERY", 2)
    merged, real = [], Merged.write

    def write(self, where):
        merged.append(self.parts)
        return real(self, where)

    monkeypatch.setattr(Merged, "write", write)
    collect(cases.request(selector, **PARTS), tmp_path / "store")
    assert merged == [2, 4, 5]
    assert same(content(tmp_path / "store"), whole)
    assert not list((tmp_path / "store").glob("parts/*/statistics"))
    assert len(list((tmp_path / "store" / "merged").glob("*.json"))) == 1


def merging(monkeypatch, where, others):
    """Merge a store as a rank that finds no share left, while other ranks do what ``others`` does."""
    index = AttentionStore.open(where).index
    monkeypatch.setattr(Ranks, "shares", lambda *_: iter(()))
    monkeypatch.setattr(folding, "wait", lambda: others(LocalPlace(where), index))
    return index, folding.fold(LocalPlace(where), index, Ranks(1, 2, launcher="torchrun", counters=object()), 5)


@pytest.fixture
def unmerged(place, tmp_path):
    asked = cases.request(place[0], **PARTS)
    for number in range(5):
        collect_part(asked, number, tmp_path / "store")
    return tmp_path / "store"


def test_what_another_rank_is_still_merging_is_waited_for(place, unmerged, monkeypatch):
    steps = []

    def others(where, index):
        steps.append(len(steps))
        tasks = folding.units(index)
        for layer, route in tasks[:-1] if len(steps) == 1 else tasks[-1:]:
            folding._fold_unit(where, index, layer, route, 5, "merged/000005-other")
        half = unmerged / "merged" / "000005" / f"{folding.unit(*tasks[-1])}.json.12345678.new"
        half.touch() if len(steps) == 1 else half.unlink()

    index, found = merging(monkeypatch, unmerged, others)
    assert steps == [0, 1]
    assert set(found.folders) == {folding.unit(*task) for task in folding.units(index)}
    assert same(content(unmerged), place[1])


def test_a_rank_that_lists_what_is_merged_as_another_tidies_up(place, unmerged, monkeypatch):
    read = LocalPlace.read

    def others(where, index):
        for layer, route in folding.units(index):
            folding._fold_unit(where, index, layer, route, 5, "merged/000005-other")

    def late(self, name):
        if name.startswith("merged/000005/"):
            monkeypatch.setattr(LocalPlace, "read", read)
            folding.fold(self, AttentionStore.open(unmerged).index, Ranks(), 5)
        return read(self, name)

    monkeypatch.setattr(LocalPlace, "read", late)
    assert merging(monkeypatch, unmerged, others)[1].parts == 5
    assert not (unmerged / "merged" / "000005").exists()
    assert same(content(unmerged), place[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of DataLoader, from Python 3.12 on
def test_processes_that_decode_change_no_bit(place, tmp_path):
    selector, whole = place
    collect(cases.request(selector, **{**PARTS, "part": 9, "workers": 0}), tmp_path / "none")
    collect(cases.request(selector, **{**PARTS, "part": 9, "workers": 2}), tmp_path / "two")
    assert same(content(tmp_path / "none"), content(tmp_path / "two"))
    for name, values in content(tmp_path / "two").items():
        if values.dtype.kind == "f":  # one part, not five: the last digits
            assert np.abs(values - whole[name]).max() <= 1e-14 * max(1, np.abs(values).max()), name


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create")
def test_a_zip_is_read_by_several_processes(tmp_path):
    selector = Path(cases.folder_of(tmp_path, 7))
    shutil.make_archive(str(tmp_path / "zipped"), "zip", selector)
    for name, data in (("folder", str(selector)), ("zip", str(tmp_path / "zipped.zip"))):
        collect(cases.request(data, layers=["*.1.*"], part=21, workers=2), tmp_path / name)
    assert same(content(tmp_path / "folder"), content(tmp_path / "zip"))
    identities = [AttentionStore.open(tmp_path / name).index.data[0]["identity"] for name in ("folder", "zip")]
    assert identities[0] == identities[1]


def test_the_same_images_under_two_mounts_count_once(place, tmp_path):
    from mamba_attn.analytics import merge_stores

    selector, _ = place
    shutil.copytree(selector, tmp_path / "mounted")
    for name, data in (("one", selector), ("two", str(tmp_path / "mounted"))):
        collect(cases.request(data, **PARTS), tmp_path / name)
    with pytest.raises(StoreError, match=r"both count '.*' and 8 others; each image counts once, so they are not"):
        merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "both")


def test_a_store_of_another_part_or_batch(place, tmp_path):
    selector, _ = place
    collect(cases.request(selector, **PARTS, limit=4), tmp_path / "store")
    for options, sentence in (({"part": 3}, "part=2, not part=3"), ({"batch": 3}, "batch=2, not batch=3")):
        with pytest.raises(StoreError, match=sentence):
            collect(cases.request(selector, **{**PARTS, **options}), tmp_path / "store")
    found = collect(cases.request(selector, **{**PARTS, "part": None, "batch": None}, limit=4), tmp_path / "store")
    assert (found.new, found.counted) == (0, 4)


def test_a_store_of_the_first_format_opens_and_is_copied_into_today_s(tmp_path):
    from mamba_attn.analytics import merge_stores

    old = tmp_path / "old"
    shutil.unpack_archive(Path(__file__).with_name("first_format.zip"), old)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    selector = Path(cases.folder_of(tmp_path, 1))
    (selector / "red" / "broken.png").write_bytes(b"no image")
    asked = cases.request(str(selector), keep=4, layers=["*.1.*"])
    with pytest.raises(StoreError, match=r"a store of format 1, which opens, and is not added to; merge_stores\("):
        collect(asked, old)
    assert merge_stores([old], tmp_path / "new") == 3
    assert same(content(old), content(tmp_path / "new"))
    assert list(AttentionStore.open(tmp_path / "new").unreadable) == ["red/broken.png"]
    collect(asked, tmp_path / "again")
    now = content(tmp_path / "again")
    for name, values in content(old).items():
        assert now[name].shape == values.shape
        if values.dtype.kind == "f" and Version(torch.__version__) >= Version("2.6"):  # 2.5 draws other random weights
            np.testing.assert_allclose(now[name], values, rtol=0, atol=1e-3 * np.abs(values).max(), err_msg=name)
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}


def test_a_part_that_is_damaged_or_of_another_plan(place, tmp_path):
    selector, _ = place
    collect(cases.request(selector, **PARTS), tmp_path / "store")
    path = tmp_path / "store" / "parts" / "000001.json"
    found = json.loads(path.read_text())
    for broken in ("", "[]", json.dumps({**found, "images": [["a"]]}), json.dumps({**found, "extra": 1})):
        path.write_text(broken)
        with pytest.raises(StoreError, match=r"000001\.json: it is missing or damaged"):
            list(AttentionStore.open(tmp_path / "store").images)
    path.write_text(json.dumps({**found, "stop": 5}))
    with pytest.raises(StoreError, match="two calls with other limits wrote at once"):
        list(AttentionStore.open(tmp_path / "store").images)
    store = AttentionStore.open(tmp_path / "store")
    assert store.image(8).row == 8  # other parts are not looked at


def launched(arguments, ranks, restarts=3):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", str(restarts), "-m", "mamba_attn", "collect", *arguments]  # fmt: skip
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(each) for each in path.read_text().split()] if path.exists() else []


def arguments_of(folder, selector, out):
    weights = save(folder / "weights", "vim_micro", VIM, cases.CLASSES)
    return ["--model", "vim_micro", "--weights", weights, "--data", selector, "--out", str(out), "--batch", "2",
            "--part", "2", "--keep", "3"]  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks of torchrun in /proc, which Linux alone has")
def test_torchrun_with_two_ranks_one_of_which_is_killed(tmp_path):
    """The command of docs/how-to/large_runs.md."""
    from mamba_attn.commands import cli

    selector = cases.folder_of(tmp_path, 8)  # 24 images, and a broken one: 13 parts
    (Path(selector) / "red" / "broken.png").write_bytes(b"no image")
    assert cli.main(["collect", *arguments_of(tmp_path, selector, tmp_path / "alone")]) == 1
    parts = tmp_path / "store" / "parts"
    process = launched(arguments_of(tmp_path, selector, tmp_path / "store"), 2)
    try:
        deadline = time.monotonic() + 800
        while not list(parts.glob("*.json")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        ranks = children(process)
        before = {path.name: path.read_bytes() for path in parts.glob("*.json")}
        if len(before) < 13 and ranks:
            os.kill(ranks[0], signal.SIGKILL)
        output, _ = process.communicate(timeout=deadline - time.monotonic())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert f"24 in {tmp_path / 'store'}, 1 skipped; next: mamba-attn explore" in output
    assert same(content(tmp_path / "store"), content(tmp_path / "alone"))
    assert before == {name: (parts / name).read_bytes() for name in before}  # what was counted is not made again
    ranks_of_parts = {json.loads(path.read_text())["writer"]["rank"] for path in parts.glob("*.json")}
    assert ranks_of_parts == {0, 1}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path):
    """Of ranks and of the agent, at random moments, merging included: the same bits, and no part is made twice."""
    from mamba_attn.commands import cli

    chance = random.Random(1)
    selector = cases.folder_of(tmp_path, 20)
    arguments = arguments_of(tmp_path, selector, tmp_path / "store")
    assert cli.main(["collect", *arguments_of(tmp_path, selector, tmp_path / "alone")]) == 0
    parts, whole = tmp_path / "store" / "parts", content(tmp_path / "alone")
    before, kills = {}, 0
    while kills < 20:
        process = launched(arguments, 2)
        began = len(list(parts.glob("*.json")))
        target = began + chance.randint(0, 3)
        while process.poll() is None and len(list(parts.glob("*.json"))) < min(30, target):
            time.sleep(0.01)
        time.sleep(chance.random())
        ranks = children(process)
        if process.poll() is None:
            before |= {path.name: path.read_bytes() for path in parts.glob("*.json")}
            folders = [path for path in parts.iterdir() if path.is_dir()] if parts.exists() else []
            assert len(folders) - len(before) <= 2 * (kills + 1)  # one part that was begun, of each rank
            if chance.random() < 0.5 and ranks:
                os.kill(chance.choice(ranks), signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)  # the agent; its ranks would end at their next part
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)
            kills += 1
        output, _ = process.communicate(timeout=1200)
        if process.returncode == 0:
            assert same(content(tmp_path / "store"), whole), output
            assert before == {name: (parts / name).read_bytes() for name in before}
            before = {}
            shutil.rmtree(tmp_path / "store")
    process = launched(arguments, 2)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    assert same(content(tmp_path / "store"), whole)
