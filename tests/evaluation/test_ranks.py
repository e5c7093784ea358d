"""`compare` by several processes: no figure is measured twice, and all are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mamba_attn.datasets.samples import Data, Item
from mamba_attn.distributed import Ranks
from mamba_attn.evaluation import plan as planning
from mamba_attn.evaluation.intervals import DRAWS, Resampler, bootstrap, drawn_counts, mean
from mamba_attn.evaluation.plan import Plan
from mamba_attn.evaluation.scheduler import run, run_shared
from mamba_attn.evaluation.specs import Model
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.texts import TextPlan, measure_texts
from mamba_attn.evaluation.worker import Worker
from tests.evaluation import cases

METHODS = ("raw_attention", "mamba_attribution")
MEASURES = ("perturbation", "localisation", "sanity")


@pytest.fixture
def wanted(tmp_path, monkeypatch):
    """Six images in shares of two, and the first one by itself."""
    monkeypatch.setattr(planning, "CHUNK", 2)
    monkeypatch.setattr("mamba_attn.evaluation.scheduler.CHUNK", 2)
    models = [Model.parse(cases.weights(tmp_path / "w", ["vim_micro"]))]
    boxes = f"{cases.boxes_zip(tmp_path / 'a.zip')}:boxes"
    return lambda **options: Plan(models, [boxes], METHODS, MEASURES, sanity_images=2, **options)


def array(rank, world):
    return Ranks(rank, world, launcher="a job array")


def lines(folder):
    return [
        json.loads(line)["key"] for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().split("\n")[:-1]
    ]


@pytest.mark.parametrize("order", [(0, 1), (2, 0, 1)])
def test_ranks_measure_each_figure_once_and_as_one_process_does(wanted, tmp_path, monkeypatch, order):
    alone = Store(tmp_path / "alone.jsonl")
    run(wanted(), alone, tell=lambda sentence: None)  # as the command does
    measured, work = [], Worker.work

    def noted(worker, task):
        measured.extend(plan.keys(task))
        return work(worker, task)

    monkeypatch.setattr(Worker, "work", noted)
    left = []
    for rank in order:
        plan = wanted()
        left.append(run_shared(plan, Store(tmp_path / "all.jsonl", shared=True), array(rank, len(order))))
    assert left[-1] == 0 < min(left[:-1])
    assert len(measured) == len(set(measured)) == len(alone)
    alone = Store(tmp_path / "alone.jsonl")  # as it is read
    assert dict(Store(tmp_path / "all.jsonl").items()) == dict(alone.items())
    found = lines(tmp_path / "all.parts")
    assert len(found) == len(alone) == len({tuple(key) for key in found})
    assert list(wanted().tasks(Store(tmp_path / "all.jsonl"))) == []


def test_a_share_that_another_process_wrote_meanwhile_is_not_measured(wanted, tmp_path, monkeypatch):
    late = Store(tmp_path / "s.jsonl", shared=True)  # of a job that waits before it begins
    run_shared(wanted(), Store(tmp_path / "s.jsonl", shared=True), array(0, 1))
    before = {path: path.read_bytes() for path in (tmp_path / "s.parts").iterdir()}
    monkeypatch.setattr(Worker, "work", None)
    assert run_shared(wanted(), late, array(0, 1)) == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "s.parts").iterdir()}


def test_a_killed_rank_goes_on_and_errors_are_tried_again(wanted, tmp_path, monkeypatch):
    work, calls = Worker.work, []

    def sometimes(worker, task):
        calls.append(task)
        if len(calls) == 9:
            raise KeyboardInterrupt
        found = work(worker, task)
        return [(key, {"error": "no memory"}) for key, _ in found] if len(calls) == 8 else found

    monkeypatch.setattr(Worker, "work", sometimes)
    with pytest.raises(KeyboardInterrupt):
        run_shared(wanted(), Store(tmp_path / "s.jsonl", shared=True), array(0, 1))
    monkeypatch.setattr(Worker, "work", work)
    before = dict(Store(tmp_path / "s.jsonl").items())
    assert any("error" in line for line in before.values())
    assert run_shared(wanted(), Store(tmp_path / "s.jsonl", shared=True), array(0, 1)) == 0
    alone = Store(tmp_path / "alone.jsonl")
    run(wanted(), alone, tell=lambda sentence: None)
    assert dict(Store(tmp_path / "s.jsonl").items()) == dict(Store(tmp_path / "alone.jsonl").items())
    assert not list((tmp_path / "s.parts").glob("*.new"))


def test_several_processes_leave_a_file_that_was_cut_alone(tmp_path):
    whole = b'{"protocol": 1, "key": ["d", "i", "m", "a", "cost", "o"], "seconds": 1}\n'
    (tmp_path / "s.jsonl").write_bytes(whole + whole[:20])
    store = Store(tmp_path / "s.jsonl", shared=True)  # each of them would cut it, one after another
    assert (len(store), store.damaged) == (1, 1)
    assert (tmp_path / "s.jsonl").read_bytes() == whole + whole[:20]
    Store(tmp_path / "s.jsonl")
    assert (tmp_path / "s.jsonl").read_bytes() == whole


def test_texts_over_ranks(tmp_path):
    from mamba_attn.commands.compare_texts import text_plan

    def plan() -> TextPlan:
        return text_plan([Model("mamba_copy")], None, ["random", "raw_attention"], set(), None, limit=12)

    alone, shared = Store(tmp_path / "alone.jsonl"), tmp_path / "all.jsonl"
    measure_texts(plan(), alone)
    left = []
    for rank in (1, 0):
        its, store = plan(), Store(shared, shared=True)
        measure_texts(its, store, ranks=array(rank, 2))
        left.append(its.left)
    assert left[0] > 0 == left[1]
    values = [{key: line for key, line in each.items() if key.measure != "time"} for each in (alone, Store(shared))]
    assert values[0] == values[1]
    found = lines(tmp_path / "all.parts")
    assert len(found) == len({tuple(key) for key in found}) == len(alone)


class Listed(Data):
    """Names of images alone."""

    def _picture(self, item, range):
        raise NotImplementedError

    def _regions(self, item, picture, transform):
        raise NotImplementedError


def test_planning_looks_once_at_every_figure(monkeypatch):
    """Its time is measured by benchmarks.many_ranks."""
    looked, counted = [], []

    class Looked(Store):
        def __len__(self):
            return 1

        def __contains__(self, key):
            looked.append(key)
            return False

    chosen = Data.chosen
    monkeypatch.setattr(Data, "chosen", lambda *arguments: counted.append(1) or chosen(*arguments))
    model = Model.parse("vit_micro")
    monkeypatch.setattr(Model, "misfit", lambda *arguments: None)
    plan = Plan([model], ["photos"], [f"m{number}" for number in range(5)], ("perturbation", "sanity"))
    vars(plan)["data"] = {"photos": Listed("photos", "id", [Item(f"{number}.png") for number in range(200)])}
    tasks = list(plan.tasks(Looked(Path("nowhere.jsonl"))))
    assert len(tasks) == 25
    assert sum(task.records for task in tasks) == 5 * (200 + 8) == len(looked)
    assert len(counted) == 1


@pytest.mark.parametrize("block", [1, 64, 2**20])
def test_draws_in_blocks_are_those_of_all_at_once(monkeypatch, block):
    monkeypatch.setattr("mamba_attn.evaluation.intervals._BLOCK", block)
    chosen = np.random.default_rng(3).integers(0, 23, (DRAWS, 23))
    counts = np.stack([np.bincount(row, minlength=23) for row in chosen])
    assert np.array_equal(np.concatenate([*drawn_counts(23, 3)]), counts)
    values = np.random.default_rng(0).normal(size=(23, 2))
    assert bootstrap(mean, values[:, 0], seed=3).low == np.percentile(values[:, 0][chosen].mean(1), 2.5)
    valid = np.arange(23) % 5 > 0
    expected = counts[:, valid] @ values[valid] / counts[:, valid].sum(1, keepdims=True)
    for kept in (2**27, 0):
        monkeypatch.setattr("mamba_attn.evaluation.intervals._KEPT", kept)
        found = Resampler(23, 3).means(values, valid)
        assert np.allclose(found[0], values[valid].mean(0), rtol=1e-14)
        assert np.allclose(found[1:], expected, rtol=1e-12)


@pytest.mark.timeout(900)
def test_torchrun_with_two_ranks(tmp_path):
    """The command of docs/how-to/large_runs.md."""
    from mamba_attn.commands import cli

    boxes = f"{cases.boxes_zip(tmp_path / 'a.zip')}:boxes"
    asked = ["compare", "--models", cases.weights(tmp_path / "w", ["vim_micro"]), "--methods", "raw_attention",
             "--data", boxes, "--measures", "perturbation,localisation"]  # fmt: skip
    assert cli.main([*asked, "--out", str(tmp_path / "alone")]) == 0
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mamba_attn"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*call, *asked, "--out", str(tmp_path / "two")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("open ") == 1
    tables = [json.loads((tmp_path / name / "compare.json").read_text())["tables"] for name in ("alone", "two")]
    assert tables[0] == tables[1]
    found = lines(tmp_path / "two" / "measured.parts")
    assert len(found) == len({tuple(key) for key in found}) == 2 * 6 * 2
    assert not (tmp_path / "two" / "measured.jsonl").exists()
    before = (tmp_path / "two" / "compare.csv").read_bytes()
    assert cli.main([*asked, "--out", str(tmp_path / "two")]) == 0  # alone, and nothing is left to measure
    assert not (tmp_path / "two" / "measured.jsonl").exists()
    assert (tmp_path / "two" / "compare.csv").read_bytes() == before
