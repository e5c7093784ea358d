"""What the image-dependent part of attention is worth: models whose matrices are those of another image, or of none.

    python benchmarks/run.py content --data FOLDER [--runs FOLDER]
    python benchmarks/content.py               writes the tables of docs/findings.md from results/content.json

``--data`` holds imagenette128.zip and clothing128.zip. In one layer, or in all, the matrices of the scans are
replaced, or entries of them removed; all else (projections, convolutions, gates, D u, MLPs) stays the image's own:

- mean: by their mean over training images;
- another: by those of another image; a batch of images shares its donor, and batches are the units of the intervals;
- none: by zero, so that a scan hands on D u alone;
- within k: entries more than k steps apart in a route's own order are removed;
- own tap: the mixers' depthwise convolutions keep the tap of the token itself alone (a causal one's last, else the
  middle), so that tokens meet in the scans and nowhere else.

With ``--runs``, a folder of benchmarks/series.py, its models of several patch orders and of several seeds are measured
instead, orders/<order>_<seed>/ and seeds/<model>_<seed>/; seeds are the units. Answers lie in ``--work``, batch by
batch, and a killed run resumes from there; ``--minutes`` ends it after a batch.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial as bound
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import findings_page
from benchmarks.content_page import EVERY, FILE
from benchmarks.findings import FILE as FINDINGS
from benchmarks.findings import labelled, trained_orders, trained_seeds
from benchmarks.report import Figure, show
from mamba_attn import knockout, replace_attention, trace
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets import open_data
from mamba_attn.datasets.loading import load
from mamba_attn.findings.intervals import difference, mean

MODELS = ("vmamba_micro", "vim_micro")
COLLECTIONS = ("imagenette128.zip", "clothing128.zip")
STEPS = (0, 1, 4, 16, 64)
IMAGES, MEANS, BATCH = 240, 32, 8
Matrices = dict[str, Tensor]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--data", type=Path, required=True, help="folder with both collections")
    parser.add_argument("--work", type=Path, default=Path("content_work"), help="default: ./content_work")
    parser.add_argument("--models", nargs="+", default=MODELS, help="names; the others' results stay")
    parser.add_argument("--runs", type=Path, help="folder of trained models, which are measured instead")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"of the joint validation split; default: {IMAGES}")
    parser.add_argument("--minutes", type=float, help="of each model: stop after the batch, and report what there is")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return False  # the file names models and counts of images


def run_content(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Measure what the work folder lacks, and report."""
    images = 16 if args.quick else args.images
    before = json.loads(FILE.read_text())["details"] if FILE.is_file() and not args.quick else {}
    found = {part: before.get(part, {}) for part in ("models", "orders", "seeds")}
    args.work.mkdir(parents=True, exist_ok=True)

    def measured(name: str, weights: str) -> dict[str, Any]:
        subject = load(name, weights)
        store = Answers(args.work / f"{name}_{subject.fingerprint}.jsonl")
        deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        measure(subject, args.data, store, images, 2 if args.quick else MEANS, deadline)
        return {"weights": subject.fingerprint, **summary(store)}

    for name in args.models if args.runs is None else ():
        found["models"][name] = its = measured(name, "demo")
        rows = [(what, where, f"{each['top1']:.1f}", str(each["change"])) for what, where, each in listed(its)]
        show(f"{name}, {its['images']} images", ("matrices", "layers", "top-1, %", "change, points"), rows)
    runs = {} if args.runs is None else {"orders": trained_orders(args.runs), "seeds": trained_seeds(args.runs)}
    for part, models in runs.items():
        for name, paths in models.items():
            found[part][name] = over_seeds([measured(path.stem, str(path)) for path in paths])
            changed = [(what, str(change)) for what, change in found[part][name]["changed"].items()]
            show(f"{name}, {len(paths)} seeds", ("matrices of all layers", "change of top-1, points"), changed)
    return [], {"how": __doc__, "means": MEANS, "batch": BATCH, **found}


class Answers:
    """What models answered, by batch: a line of a file each.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.batches: dict[int, dict[str, Any]] = {}
        for line in map(json.loads, lines):
            self.batches[line["batch"]] = line

    def add(self, line: dict[str, Any]) -> None:
        """Keep a batch."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.batches[line["batch"]] = line


def sample(data: Path, subject: LoadedModel, count: int, part: str = "") -> tuple[Tensor, Tensor]:
    """Images of both collections in proportion to their sizes, in a drawn order, and their classes.

    Args:
        data: the folder.
        subject: the model.
        count: how many.
        part: of the collections; none: validation.
    """
    opened = [open_data(f"{data / name}{part}") for name in COLLECTIONS]
    whole, pairs = sum(map(len, opened)), []
    for each in opened:
        pairs += labelled(each, subject, round(count * len(each) / whole))
    pixels, labels = (torch.cat(its) for its in zip(*pairs, strict=True))
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pixels[drawn], labels[drawn]


@torch.no_grad()
def matrices(model: nn.Module, pixels: Tensor) -> Matrices:
    """Return every layer's matrices, (1, routes, channels, tokens, tokens), meaned over images."""
    found: Matrices = {}
    for number, image in enumerate(pixels, 1):
        with trace(model) as record:
            model(image[None])
        for name, layer in record.items():
            own = layer.attention("each", routes="each")
            found[name] = own if number == 1 else found[name].lerp_(own, 1 / number)
    return found


def changes(model: nn.Module, average: Matrices, donor: Matrices) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Yield every intervention: what, in which layer, and the block in which it holds.

    Args:
        model: the model.
        average: of training images.
        donor: of another image.
    """
    for names in ([name] for name in average):
        yield f"mean|{names[0]}", replace_attention(model, matrix={names[0]: average[names[0]]})
        yield f"another|{names[0]}", replace_attention(model, matrix={names[0]: donor[names[0]]})
        yield f"none|{names[0]}", knockout(model, layers=names)
    yield f"mean|{EVERY}", replace_attention(model, matrix=average)
    yield f"another|{EVERY}", replace_attention(model, matrix=donor)
    yield f"none|{EVERY}", knockout(model)
    for steps in STEPS:
        yield f"within {steps}|{EVERY}", knockout(model, beyond=steps)
    yield f"own tap|{EVERY}", own_tap(model)


@contextmanager
def own_tap(model: nn.Module) -> Iterator[None]:
    """Let depthwise convolutions read each token alone; their weights are put back at the end of the block."""
    before = {}
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels > 1:
            before[module] = module.weight.data
            causal = isinstance(module, nn.Conv1d)
            kept = (-1,) if causal else tuple(size // 2 for size in module.kernel_size)
            module.weight.data = torch.zeros_like(before[module])
            module.weight.data[(..., *kept)] = before[module][(..., *kept)]
    try:
        yield
    finally:
        for module, weight in before.items():
            module.weight.data = weight


@torch.no_grad()
def measure(
    subject: LoadedModel, data: Path, store: Answers, images: int, means: int, deadline: float | None = None
) -> None:
    """Let a model answer under every intervention, batch by batch, as far as the store lacks them.

    Args:
        subject: the model.
        data: folder of the collections.
        store: of its answers.
        images: of the validation splits.
        means: training images that the mean matrices are of.
        deadline: of ``time.monotonic``.
    """
    pixels, labels = sample(data, subject, images)
    whole = [number for number in range(len(labels) // BATCH) if number not in store.batches]
    if not whole:
        return
    average = matrices(subject.model, sample(data, subject, means, ":train")[0])
    for number in whole:
        if deadline is not None and time.monotonic() > deadline:
            return
        own = slice(number * BATCH, (number + 1) * BATCH)
        other = (number + 1) * BATCH % len(labels)  # the first image of the next batch
        donor = matrices(subject.model, pixels[other : other + 1])
        plain = subject.model(pixels[own])
        with replace_attention(subject.model, matrix=donor):
            again = subject.model(pixels[other : other + 1])
        control = float((again - subject.model(pixels[other : other + 1])).abs().max() / plain.abs().max())
        line = {"batch": number, "labels": labels[own].tolist(), "donor": int(labels[other]), "control": control}
        line["own"] = plain.argmax(1).tolist()
        for what, block in changes(subject.model, average, donor):
            with block:
                line[what] = subject.model(pixels[own]).argmax(1).tolist()
        store.add(line)
        print(f"{subject.name}: {len(store.batches)} of {len(labels) // BATCH} batches", flush=True)


def summary(store: Answers) -> dict[str, Any]:
    """Return top-1 under every intervention and its difference from the model's own, in points, with the interval.

    And the part of the images that are taken for their donor's class, among those of other classes.
    """
    lines = [store.batches[number] for number in sorted(store.batches)]
    labels = np.array([line["labels"] for line in lines])
    donors = np.array([line["donor"] for line in lines])[:, None].repeat(labels.shape[1], 1)
    plain = np.array([line["own"] for line in lines])
    found: dict[str, Any] = {
        "images": labels.size,
        "control": max(line["control"] for line in lines),
        "own": _points(mean, (plain == labels).mean(1)),
        "changed": {},
    }
    for key in (key for key in lines[0] if "|" in key):
        what, _, where = key.partition("|")
        answers = np.array([line[key] for line in lines])
        right = (answers == labels).mean(1)
        top1, change = _points(mean, right), _points(bound(difference, other=(plain == labels).mean(1)), right)
        its: dict[str, Any] = {"top1": top1[0], "change": change}
        if what == "another":
            other = labels != donors
            its["as the donor"] = round(100 * float((answers == donors)[other].mean()), 2)
            its["as the donor, own matrices"] = round(100 * float((plain == donors)[other].mean()), 2)
        found["changed"].setdefault(what, {})[where] = its
    return found


def over_seeds(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean change of top-1 under every intervention in all layers, with its interval over seeds.

    Args:
        summaries: of models that differ in their seed alone.
    """
    found: dict[str, Any] = {
        "weights": [each["weights"] for each in summaries],
        "images": summaries[0]["images"],
        "own": _points(mean, np.array([each["own"][0] / 100 for each in summaries])),
        "changed": {},
    }
    for what in summaries[0]["changed"]:
        each = np.array([its["changed"][what][EVERY]["change"][0] / 100 for its in summaries])
        found["changed"][what] = _points(mean, each)
    return found


def listed(model: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the rows of a model: what, where, figures."""
    return [(what, where, its) for what, places in model["changed"].items() for where, its in places.items()]


def _points(estimate: Any, values: np.ndarray) -> list[float | None]:
    found = estimate(values)
    return [None if each is None else round(100 * each, 2) for each in (found.value, found.low, found.high)]


if __name__ == "__main__":
    findings_page.update(json.loads(FINDINGS.read_text()))
