"""Whole runs of tiny models: resuming, workers, and images and methods that fail."""

import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mamba_attn.attribution import catalogue
from mamba_attn.errors import ModelBuildError
from mamba_attn.evaluation import measures, plan, scheduler
from mamba_attn.evaluation.plan import Plan
from mamba_attn.evaluation.scheduler import run
from mamba_attn.evaluation.specs import Model, Options, build, choose_methods
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.summary import summarise
from mamba_attn.evaluation.tables import as_csv
from tests.evaluation import cases

METHODS = ("raw_attention", "mamba_attribution")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    texts = cases.weights(tmp_path_factory.mktemp("weights")).split(",")
    return [Model.parse(text) for text in texts]


@pytest.fixture
def boxes(tmp_path):
    return f"{cases.boxes_zip(tmp_path / 'a.zip')}:boxes"


def small(models, *selectors, **options):
    return Plan(models, selectors, METHODS, **{"sanity_images": 2, "pictures": 1, "pixel_images": 1, **options})


def done(plan, path, **options):
    store = Store(path)
    run(plan, store, **options)
    return store


def without_time(tables):
    lines = as_csv(tables).splitlines()
    return [line for line in lines if ",seconds," not in line]


def test_all_measures_of_all_fitting_methods(models, boxes, tmp_path):
    wanted = small(models, boxes)
    wanted.check()
    store = done(wanted, tmp_path / "s.jsonl")
    assert not [line for _, line in store.items() if "error" in line]
    vim, vit = summarise(wanted, store)
    assert (set(vim.methods), vit.methods) == (set(METHODS), ["raw_attention"])
    assert vim.images == 6
    assert vim.figures["positive_auc_top"]["raw_attention"].images == 6
    assert vim.figures["map"]["raw_attention"].images == 5  # the sixth has no boxes
    assert vim.figures["randomised_all"]["mamba_attribution"].images == 2
    assert vim.figures["pixel_ranked_gap_top"]["mamba_attribution"].images == 1
    assert vim.figures["again"]["mamba_attribution"].interval.value == 0
    assert vim.figures["alone"]["mamba_attribution"].interval.value < 1e-4
    assert vim.figures["other_class"]["raw_attention"].interval.value == 1  # it does not see the class
    assert vim.figures["peak_megabytes"]["raw_attention"].interval.value > 0.01
    assert 0 <= vim.accuracy <= 1
    assert "1 of 6 images have no boxes and no mask and are left out of the localisation." in vim.flags
    assert any("is made of softmax attention; use transformer_attribution" in note for note in wanted.notes)


def test_a_second_run_does_nothing_and_a_killed_one_goes_on(models, boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 2)
    options = {"measures": ("perturbation", "localisation")}
    whole = done(small(models, boxes, **options), tmp_path / "whole.jsonl")
    assert list(small(models, boxes, **options).tasks(whole)) == []

    class Killed(BaseException):
        pass

    store, added = Store(tmp_path / "cut.jsonl"), Store.add

    def add(self, records):
        if len(self) > 10:
            raise Killed
        added(self, records)

    monkeypatch.setattr(Store, "add", add)
    with pytest.raises(Killed):
        run(small(models, boxes, **options), store)
    monkeypatch.setattr(Store, "add", added)
    kept = Store(tmp_path / "cut.jsonl")
    assert 10 < len(kept) < len(whole)
    wanted = small(models, boxes, **options)
    run(wanted, kept)
    again = Store(tmp_path / "cut.jsonl")
    assert dict(again.items()) == dict(Store(tmp_path / "whole.jsonl").items())
    assert len((tmp_path / "cut.jsonl").read_text().splitlines()) == len(whole)
    assert without_time(summarise(wanted, again)) == without_time(summarise(wanted, whole))


def test_more_images_keep_those_that_are_done(models, boxes, tmp_path):
    store = done(small(models[:1], boxes, limit=2, measures=("perturbation",)), tmp_path / "s.jsonl")
    before = len(store)
    tasks = list(small(models[:1], boxes, limit=5, measures=("perturbation",)).tasks(store))
    assert sum(task.records for task in tasks) == 5 * 2 - before == 3 * 2
    other = small(models[:1], boxes, limit=2, measures=("perturbation",), options=Options(fill="mean"))
    assert sum(task.records for task in other.tasks(store)) == 4


def test_a_budget_stops_in_good_order_and_the_same_call_resumes(models, boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 2)
    whole = done(small(models[:1], boxes, measures=("perturbation", "localisation")), tmp_path / "whole.jsonl")
    wanted = small(models[:1], boxes, measures=("perturbation", "localisation"))
    store, told = Store(tmp_path / "s.jsonl"), []
    run(wanted, store, budget=1e-9, tell=told.append)
    assert len(store) == 1  # one image, method and measure, however small the budget
    assert re.fullmatch(r"about \d+ s from here on: \w+ \d+ s; not timed within the budget: \w+", told[0])
    assert wanted.notes[-1].startswith("stopped within the budget of 1.67e-11 minutes: ")
    assert wanted.notes[-1].endswith(" do not have all images yet; the same command resumes.")
    run(small(models[:1], boxes, measures=("perturbation", "localisation")), store, budget=3600)
    assert dict(store.items()) == dict(whole.items())


def test_the_cheapest_method_comes_first(models, boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 2)
    order, cost = [], {"raw_attention": 3.0, "mamba_attribution": 1.0}

    def work(worker, task):
        order.append([(method, len(its)) for method, its in task.needs.items()])
        clock[0] += sum(cost[method] * len(its) for method, its in task.needs.items())
        return []

    clock = [0.0]
    monkeypatch.setattr(scheduler.Worker, "work", work)
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: clock[0])
    told = []
    wanted = small(models[:1], boxes, measures=("perturbation",))
    run(wanted, Store(tmp_path / "s.jsonl"), budget=4 + 5 + 3 + 6 + 1, tell=told.append)
    assert told == ["about 20 s from here on: raw_attention 15 s, mamba_attribution 5 s"]
    first, rest = order[:2], order[2:]
    assert sorted(first) == [[("mamba_attribution", 1)], [("raw_attention", 1)]]
    cheap, dear = "mamba_attribution", "raw_attention"
    assert rest == [[(cheap, 1)], [(cheap, 2)], [(cheap, 2)], [(dear, 1)], [(dear, 2)]]
    assert "raw_attention does not have all images yet" in wanted.notes[-1]


@pytest.mark.full
def test_two_processes_find_what_one_does(models, boxes, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 3)
    wanted = small(models[:1], boxes, measures=("perturbation",))
    one, two = (done(wanted, tmp_path / f"{n}.jsonl", workers=n) for n in (1, 2))
    assert dict(one.items()) == dict(two.items())


def test_random_weights_are_the_same_in_every_process(tmp_path):
    (tmp_path / "net.py").write_text(
        "import os, torch\n"
        "from mamba_attn import models\n"
        "def build(other=False):\n"
        "    made = models.create('vit_micro', num_classes=3)\n"
        "    made.head.bias.data += int.from_bytes(os.urandom(2)) if other else 0\n"
        "    return made\n"
    )
    net = f"{tmp_path / 'net.py'}:build"
    first = Model(net, "", more=(("size", (128, 128)), ("mean", (0.5,)), ("std", (0.5,))))
    there = pickle.loads(pickle.dumps(first))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert there.identity == first.identity  # and nothing is said twice
    assert Model(net, "", more=first.more).identity == first.identity  # the next run resumes
    drawn = pickle.loads(pickle.dumps(Model(net, "", more=(*first.more, ("other", True)))))
    with pytest.raises(ModelBuildError, match="its weights differ between processes"):
        drawn.identity  # noqa: B018


def test_models_live_as_long_as_their_run(boxes, tmp_path):
    model = Model.parse(cases.weights(tmp_path / "w", ["vim_micro"]))
    wanted = small([model], boxes, measures=("perturbation",))
    done(wanted, tmp_path / "s.jsonl")
    loaded = weakref.ref(model.subject.model)
    text = pickle.dumps(model)
    assert len(text) < 1000  # a task carries the name, not the weights
    assert pickle.loads(text) == model
    del model, wanted
    gc.collect()
    assert loaded() is None


def test_a_run_leaves_the_callers_random_numbers_alone(models, boxes, tmp_path):
    found = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        wanted = Plan(models[:1], [boxes], ["random"], ("perturbation", "sanity"), sanity_images=2)
        found.append(dict(done(wanted, tmp_path / f"{seed}.jsonl").items()))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]  # and they do not change it


ORPHANS = """
import os, sys, time
from mamba_attn.evaluation import scheduler
if __name__ == "__main__":
    context = scheduler.multiprocessing.get_context("spawn")
    pool = scheduler.ProcessPoolExecutor(1, context, scheduler._prepare, (1,))
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_leaves_no_workers(tmp_path):
    (tmp_path / "run.py").write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, tmp_path / "run.py"], env=environment, capture_output=True, text=True)
    worker = int(said.stdout)
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the run")


def test_bad_images_cost_themselves_alone(models, tmp_path):
    path = cases.boxes_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in good.namelist():
            broken = good.read(name)[: 400 if name.endswith("2.png") else None]
            archive.writestr(name, broken)
    wanted = small(models[:1], f"{tmp_path / 'b.zip'}:boxes", measures=("perturbation", "localisation"))
    (table,) = summarise(wanted, done(wanted, tmp_path / "s.jsonl"))
    assert table.figures["positive_auc_top"]["raw_attention"].images == 5
    ((reason, count),) = table.failed["mamba_attribution"].items()
    assert "b.zip: boxes/images/2.png: the image is damaged" in reason
    assert count == 2


class Broken:
    """Raw attention, but for one image."""

    def __init__(self, model, fault):
        self.method, self.fault = build("raw_attention", model), fault

    def attribute(self, inputs, target=None):
        maps = self.method.attribute(inputs, target)
        for image, its in zip(inputs, maps, strict=True):
            if abs(float(image.mean()) - MARK[0]) < 1e-6:
                self.fault(its)
        return maps


MARK = [0.0]


def _raise(_):
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda values: values.fill_(torch.nan), "contain NaN or Inf and cannot be ranked"),
        (_raise, "out of luck"),
    ],
)
def test_bad_maps_cost_their_image_alone(models, boxes, tmp_path, monkeypatch, fault, message):
    wanted = small(models[:1], boxes, measures=("perturbation",))
    data, transform = wanted.data[boxes], models[0].subject.transform
    from mamba_attn import images

    MARK[0] = float(images.normalise(data.load(3, transform).pixels[None]).mean())
    monkeypatch.setattr(measures, "build", lambda name, model, layout: Broken(model, fault))
    (table,) = summarise(wanted, done(wanted, tmp_path / "s.jsonl"))
    assert table.figures["positive_auc_top"]["raw_attention"].images == 5
    ((reason, count),) = table.failed["raw_attention"].items()
    assert message in reason
    assert count == 1


def test_a_measure_that_fails_costs_itself_alone(models, boxes, tmp_path, monkeypatch):
    sane = measures.JUDGES["sanity"]

    def sometimes(batch, maps, method):
        if 0 in batch.indices:
            raise KeyError("no such block")
        return sane(batch, maps, method)

    def nothing(batch, maps, method):
        return [{"seconds": float("nan"), "peak_bytes": 0} for _ in batch.indices]

    monkeypatch.setitem(measures.JUDGES, "sanity", sometimes)
    monkeypatch.setitem(measures.JUDGES, "cost", nothing)
    wanted = small(models[:1], boxes, measures=("perturbation", "sanity", "cost"))
    (table,) = summarise(wanted, done(wanted, tmp_path / "s.jsonl"))
    assert table.figures["positive_auc_top"]["raw_attention"].images == 6
    assert table.figures["again"]["raw_attention"].images == 1
    assert "seconds" not in table.figures
    assert table.failed["raw_attention"] == {"'no such block'": 1, "cost: a figure is NaN or Inf.": 1}


def test_constant_maps_are_defined_and_flagged(models, boxes, tmp_path, monkeypatch):
    def constant(name, model, layout):
        return SimpleNamespace(attribute=lambda inputs, target: torch.ones(len(inputs), 1, *inputs.shape[2:]))

    monkeypatch.setattr(measures, "build", constant)
    wanted = small(models[:1], boxes, measures=("perturbation", "localisation"))
    (table,) = summarise(wanted, done(wanted, tmp_path / "s.jsonl"))
    assert table.figures["map"]["raw_attention"].interval.value == 50
    assert 0 <= table.figures["positive_auc_top"]["raw_attention"].interval.value <= 80
    assert "raw_attention, perturbation: 6 of 6 maps are constant; their cells are ranked at random." in table.flags


def test_labels_as_targets(models, tmp_path):
    folder = cases.class_folders(tmp_path / "photos", 2, ["red", "green", "boat"])
    wanted = small(models[:1], str(folder), measures=("perturbation",), options=Options(target="label"))
    wanted.check()
    assert "photos: 1 of its 3 classes is not among vim_micro's." in wanted.notes
    (table,) = summarise(wanted, done(wanted, tmp_path / "s.jsonl"))
    assert table.figures["deletion"]["raw_attention"].images == 4
    reasons = " ".join(table.failed["raw_attention"])
    assert "'boat' is no class of vim_micro, so there is no target." in reasons


def test_every_model_finds_its_collection(tmp_path):
    one, two = (cases.weights(tmp_path / name, ["vim_micro"], classes) for name, classes in
                (("w", cases.CLASSES), ("v", ["0", "1", "2"])))  # fmt: skip
    models = [Model.parse(one), Model.parse(two)]
    first = f"{cases.boxes_zip(tmp_path / 'a.zip')}:boxes"
    second = f"{cases.digits_zip(tmp_path / 'b.zip')}:digits"
    wanted = small(models, first, second)
    assert wanted.pairs == [(first, models[0]), (second, models[1])]
    assert "vim_micro is left out of b.zip:digits: it knows none of its classes." in wanted.notes
    assert small(models[:1], second).pairs == [(second, models[0])]  # alone, it is still asked


def test_digits_weigh_object_and_distractor(tmp_path):
    path = f"{cases.digits_zip(tmp_path / 'b.zip')}:digits"
    wanted = small([Model.parse(cases.weights(tmp_path / "w", ["vim_micro"]))], path, measures=("localisation",))
    (table,) = summarise(wanted, done(wanted, tmp_path / "s.jsonl"))
    assert 0 < table.figures["not_distractor"]["raw_attention"].interval.value < 100
    assert table.figures["distractor_energy"]["raw_attention"].images == 4


def test_some_methods_get_fewer_images_and_other_options(models, boxes, tmp_path):
    methods, most, unasked = choose_methods(["all", "integrated_gradients:n_steps=2@3", "occlusion@1"])
    assert unasked == set(catalogue.METHODS) - {"integrated_gradients", "occlusion"}
    assert "integrated_gradients" not in methods
    assert (set(catalogue.METHODS) ^ set(methods)) == {"integrated_gradients", "integrated_gradients:n_steps=2"}
    assert most == {"integrated_gradients:n_steps=2": 3, "occlusion": 1}
    keys = ["integrated_gradients:n_steps=2", "random"]
    wanted = Plan(models[:1], [boxes], keys, ("perturbation",), most=most)
    wanted.check()
    assert "integrated_gradients:n_steps=2 gets the first 3 images." in wanted.notes
    (table,) = summarise(wanted, done(wanted, tmp_path / "s.jsonl"))
    assert [table.figures["gap_top"][key].images for key in keys] == [3, 6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("occlusion@few", "methods='occlusion@few': expected a number of images after @."),
        ("occlusion:size=3", "methods='occlusion:size=3': occlusion has no option 'size'."),
        ("integrated_gradients:n_steps=many", "n_steps is a whole number, not 'many'"),
    ],
)
def test_methods_that_are_none(text, message):
    with pytest.raises(ValueError) as error:
        choose_methods([text])
    assert message in str(error.value)


def test_options_that_do_not_fit_are_found_before_the_run(models, boxes):
    with pytest.raises(ValueError, match=r"methods='raw_attention:convention=vmamba_analysis': .*this is VMamba's"):
        Plan(models, [boxes], ["raw_attention:convention=vmamba_analysis"]).check()
    published = Plan(models, [boxes], ["raw_attention:convention=hidden_mamba"])
    published.check()
    assert published.fitting(models[0]) == published.methods
    assert published.fitting(models[1]) == []


def test_answers_in_bfloat16(models, boxes, tmp_path):
    plans = [small(models[:1], boxes, measures=("perturbation",), options=Options(precision=each))
             for each in ("float32", "bfloat16")]  # fmt: skip
    store = Store(tmp_path / "s.jsonl")
    for wanted in plans:
        run(wanted, store)
    assert len(store) == 2 * 6 * 2
    full, half = (summarise(wanted, store)[0].figures["deletion"]["raw_attention"].interval.value for wanted in plans)
    assert full != half
    assert full == pytest.approx(half, rel=0.02)
