"""`compare` and `findings` as images grow: planning, resampling, memory, and figures that ranks measure twice."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.measure import peak_memory
from benchmarks.report import Figure, figure
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.datasets import Data, Item, open_data
from mamba_attn.datasets.loading import load
from mamba_attn.evaluation.intervals import Resampler, mean
from mamba_attn.evaluation.intervals import bootstrap as resampled
from mamba_attn.evaluation.plan import Plan
from mamba_attn.evaluation.specs import Model, choose_methods
from mamba_attn.evaluation.store import Store
from mamba_attn.findings.measure import Measuring

MODEL = "vmamba_micro"
VALIDATION = 50_000  # images, as many as ImageNet's
METHODS = 15
COLUMNS = 18  # of a metric's lines: accuracies at nine shares, of two signs
FEW, MANY = 500, 5000  # images of findings


class Listed(Data):
    """Names of images alone."""

    def _picture(self, item: Item, range: tuple[float, float] | None) -> Any:
        raise NotImplementedError

    def _regions(self, item: Item, picture: Any, transform: Any) -> Any:
        raise NotImplementedError


def planning(images: int) -> float:
    """Seconds to list all that a comparison of 15 methods lacks, before its first image."""
    model = Model.parse(MODEL)
    fitting = [name for name in choose_methods(["all"])[0] if model.misfit(name) is None][:METHODS]
    plan = Plan([model], ["images"], fitting)
    items = [Item(f"n{at // 50:08d}/ILSVRC2012_val_{at:08d}.JPEG", at // 50) for at in range(images)]
    listed = Listed("images", "sha256:none", items, classes=[f"class {at}" for at in range(1 + images // 50)])
    vars(plan)["data"] = {"images": listed}
    if len(plan.fitting(model)) != METHODS or model.identity is None:
        raise RuntimeError(f"{len(fitting)} methods fit {MODEL}, not {METHODS}")
    began = time.process_time()
    tasks = list(plan.tasks(Store(Path("nowhere.jsonl"))))
    took = time.process_time() - began
    if sum(len(its) for task in tasks for its in task.needs.values()) != METHODS * images:
        raise RuntimeError("the plan leaves images out")
    return took


def bootstrap(images: int) -> Callable[[], Any]:
    """A call that resamples the figures of two methods, as a table does."""
    random = np.random.default_rng(0)
    columns = [random.normal(size=(images, COLUMNS)) for _ in range(2)]
    valid = np.ones(images, dtype=bool)

    def call() -> Any:
        resampler = Resampler(images)
        return [resampler.means(each, valid) for each in columns], resampled(mean, columns[0][:, 0])

    return call


def findings(store: str, images: int) -> Callable[[], Any]:
    """A call that measures a store's model on so many images: those of the store again and again."""
    opened = AttentionStore.open(store)
    there = len(opened.images)
    many = SimpleNamespace(
        layers=opened.layers,
        index=opened.index,
        transform=opened.transform,
        image=lambda number: SimpleNamespace(key=str(number)),
        featured=range(images),
        pixels=lambda number: opened.pixels(number % there),
    )
    subject = opened.subject

    def call() -> Any:
        with TemporaryDirectory() as folder:
            return Measuring(many, images, Path(folder)).model(subject, shuffled=True)  # type: ignore[arg-type]

    return call


def compared(data: str, images: int, folder: Path, seconds: Callable[[Any], float]) -> tuple[int, int]:
    """Figures that two ranks measured more than once, and those that differ from one process's."""
    asked = ["-m", "mamba_attn", "compare", "--models", MODEL, "--methods", "raw_attention,attention_rollout", "--data",
             data, "--measures", "perturbation,sanity", "--limit", str(images)]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seconds([sys.executable, *asked, "--out", str(folder / "one")])
    seconds([sys.executable, *torchrun, *asked, "--out", str(folder / "two")])
    parts = [path.read_text().splitlines() for path in (folder / "two" / "measured.parts").iterdir()]
    keys = [tuple(json.loads(line)["key"]) for lines in parts for line in lines]
    one, two = (dict(Store(folder / name / "measured.jsonl").items()) for name in ("one", "two"))
    return len(keys) - len(set(keys)), len(one.keys() ^ two.keys()) + sum(two.get(key) != one[key] for key in one)


def run_images(data: str, quick: bool, seconds: Callable[[Any], float]) -> list[Figure]:
    """All rows about many images.

    Args:
        data: images for ``compare``.
        quick: a few images alone.
        seconds: runs a command, and returns its wall seconds.
    """
    images, few, many = (2000, 20, 40) if quick else (VALIDATION, FEW, MANY)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        twice, differ = compared(data, 12 if quick else 48, folder, seconds)
        request = Request(load("vim_digits", "demo"), open_data(data), 16)
        collect(request, folder / "store")
        memory = [
            peak_memory("benchmarks.many_images:findings", store=str(folder / "store"), images=count)
            for count in (few, many)
        ]
    return [
        figure("scale compare twice", "2 ranks", twice),
        figure("scale compare equal", "2 ranks / 1 process", differ),
        figure("scale planning", f"{images:,} images, {METHODS} methods", planning(images)),
        figure("scale bootstrap", f"{images:,} images",
               peak_memory("benchmarks.many_images:bootstrap", images=images) / 1e6),
        figure("scale findings memory", f"{many:,} images less {few}", (memory[1] - memory[0]) / 1e6),
    ]  # fmt: skip
