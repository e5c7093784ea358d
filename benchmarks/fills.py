"""Methods judged under several fills of removed cells: what a lead owes to the method, and what to the fill.

Every map is made once and judged under all fills, image by image; results are kept in ``--runs`` in the format of
``mamba-attn compare``, and a killed or smaller run resumes from there. Images are the first of the half that chose no
options, those of results/compare.json. Models answer in bfloat16 when they are perturbed; maps are of float32.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import EXPLAINED
from benchmarks.report import Figure, show

FILLS = ("black", "mean", "drop", "road")
MODELS = (*EXPLAINED, "vit_micro")
METHODS = (
    "mamba_lrp",
    "keep_and_remove_lrp",
    "mask_refinement",
    "random",
    "relevance_attention_ranks",
    "transformer_attribution",
    "frozen_contribution",
    "attn_lrp",
    "attn_lrp:gamma_layers=*,gamma=0.05",
    "libra_grad",
    "mamba_attribution",
    "controllability",
    "controllability_gramian",
    "latim",
    "centre",
    "mask_refinement:start=none",
    "igos_plus_plus:path=5",
)
RIVALS = ("mamba_lrp", "attn_lrp")  # published, that others are compared with: the first that fits a model
AIMS = ("positive_auc_top", "negative_auc_top", "gap_top")
COLLECTION = "imagenette128.zip"
IMAGES = 300
CHUNK = 4  # images per batch of maps


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenette128.zip")
    parser.add_argument("--runs", type=Path, default=Path("compare_runs"), help="folder of what is measured")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="in the order in which they are measured")
    parser.add_argument("--fills", nargs="+", default=FILLS)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names, or NAME=WEIGHTS")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--minutes", type=float, help="stop measuring after this time, and report what there is")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return False  # the file names fills, methods and counts of images


def run_fills(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Measure what the runs lack, and report."""
    from mamba_attn.evaluation.store import Store

    images = 4 if args.quick else args.images
    plans = {fill: plan(args.models, args.data, args.methods, fill, images) for fill in args.fills}
    args.runs.mkdir(parents=True, exist_ok=True)
    store = Store(args.runs / "measured.jsonl")
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    measure(plans, store, deadline)
    found = {"how": __doc__, "images": images, "fills": list(args.fills), "models": summary(plans, store)}
    for model, tables in found["models"].items():
        header = ("method", *(f"{fill}: pos / neg" for fill in tables["figures"]))
        rows = [(method, *_cells(tables, method)) for method in order(tables)]
        show(f"{model}, {images} images", header, rows)
    return [], found


def plan(models: Sequence[str], data: Path, methods: Sequence[str], fill: str, images: int) -> Any:
    """What ``mamba-attn compare`` would make of a command line with this fill.

    Args:
        models: as there.
        data: folder with imagenette128.zip.
        methods: as there.
        fill: as there.
        images: how many.
    """
    from mamba_attn.evaluation.plan import Plan
    from mamba_attn.evaluation.specs import Model, Options, choose_methods

    keys, most, _ = choose_methods(methods)
    options = Options(precision="bfloat16", fill=fill)
    return Plan([Model.parse(name) for name in models], [str(data / COLLECTION)], keys, ("perturbation",),
                most=most, unasked=set(keys), options=options, half="report", limit=images)  # fmt: skip


def measure(plans: Mapping[str, Any], store: Any, deadline: float | None = None) -> None:
    """Measure every image under all fills that it lacks, with one map per method.

    Args:
        plans: by fill, alike but for the fill.
        store: existing results; every image adds to it.
        deadline: of ``time.monotonic``.
    """
    from mamba_attn.datasets.class_names import class_indices
    from mamba_attn.evaluation.measures import JUDGES, Batch, answers, explainer
    from mamba_attn.evaluation.perturbation import clean_answers
    from mamba_attn.evaluation.plan import Task

    first = next(iter(plans.values()))
    for selector, chosen in (
        (selector, first.data[selector].chosen(first.half, first.limit)) for selector in first.data
    ):
        data = first.data[selector]
        wanted = {method: set(first.indices(selector, "perturbation", method)) for method in first.methods}
        for start in range(0, len(chosen), CHUNK):
            for method in first.methods:
                for model in (model for _, model in first.pairs if model.misfit(method) is None):
                    if deadline is not None and time.monotonic() > deadline:
                        return
                    indices = [index for index in chosen[start : start + CHUNK] if index in wanted[method]]
                    keys = {
                        (fill, index): its.key(data, index, model, method, "perturbation")
                        for fill, its in plans.items()
                        for index in indices
                    }
                    if all(key in store for key in keys.values()):
                        continue
                    samples = [data.load(index, model.subject.transform) for index in indices]
                    known = class_indices(data, model.subject)
                    labels = [None if sample.label is None else known[sample.label] for sample in samples]
                    images = model.subject.transform.normalise(_stacked(samples)).to(model.subject.device)
                    maps = None
                    for fill, its in plans.items():
                        if all(keys[fill, index] in store for index in indices):
                            continue
                        task = Task(selector, model, {}, its.options)
                        clean = clean_answers(answers(task), images, fill, None, model.subject)
                        batch = Batch(task, list(indices), samples, images, clean, labels, {})
                        maps = explainer(method, batch)(model.subject.model) if maps is None else maps
                        lines = JUDGES["perturbation"](batch, maps, method)
                        store.add((keys[fill, index], line) for index, line in zip(indices, lines, strict=True))


def summary(plans: Mapping[str, Any], store: Any) -> dict[str, Any]:
    """Return, by model: figures by fill, aim and method, and by how much each method is ahead of the model's rival.

    Args:
        plans: by fill.
        store: what was measured.
    """
    from mamba_attn.evaluation.metrics import METRICS
    from mamba_attn.evaluation.summary import compare

    found: dict[str, Any] = {}
    first = next(iter(plans.values()))
    for selector, model in first.pairs:
        data, methods = first.data[selector], [name for name in first.methods if model.misfit(name) is None]
        rival = next((name for name in RIVALS if name in methods), None)
        figures: dict[str, Any] = {}
        ahead: dict[str, Any] = {}
        for fill, its in plans.items():
            indices = its.indices(selector, "perturbation")
            lines = {
                name: {
                    index: line
                    for index in indices
                    if (line := store.get(its.key(data, index, model, name, "perturbation"))) and "error" not in line
                }
                for name in methods
            }
            figures[fill] = {
                aim: {
                    name: [*_numbers(each.interval), each.images]
                    for name, each in compare(METRICS[aim], lines, indices).items()
                }
                for aim in AIMS
            }
            ahead[fill] = {
                aim: {
                    name: _ahead(compare(METRICS[aim], {name: lines[name], rival: lines[rival]}, indices), name)
                    for name in methods
                    if rival and name != rival and lines[name] and lines[rival]
                }
                for aim in AIMS
            }
        found[model.name] = {"weights": model.identity, "rival": rival, "figures": figures, "ahead of the rival": ahead}
    return found


def order(tables: Mapping[str, Any]) -> list[str]:
    """Return the methods of a model, by the mean over the fills of negative less positive AUC, best first.

    Those of fewer images come last: other images are easier or harder.
    """
    means: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for aims in tables["figures"].values():
        for method, (value, _, _, images) in aims["gap_top"].items():
            means.setdefault(method, []).append(value)
            counts[method] = min(images, counts.get(method, images))
    most = max(counts.values(), default=0)
    return sorted(means, key=lambda method: (counts[method] < most, -sum(means[method]) / len(means[method])))


def _ahead(both: Mapping[str, Any], name: str) -> list[float | None]:
    """By how much a method is better than another on the images of both, and the paired interval."""
    (first, _), (_, second) = both.items()
    value, low, high = second.behind.value, second.behind.low, second.behind.high
    return [float(f"{each:.4g}") for each in ((value, low, high) if first == name else (-value, -high, -low))]


def _numbers(interval: Any) -> list[float]:
    return [float(f"{each:.4g}") for each in (interval.value, interval.low, interval.high)]


def _cells(tables: Mapping[str, Any], method: str) -> list[str]:
    cells = []
    for aims in tables["figures"].values():
        both = [aims[aim].get(method) for aim in AIMS[:2]]
        cells.append("" if None in both else " / ".join(f"{each[0]:.1f}" for each in both))
    return cells


def _stacked(samples: Sequence[Any]) -> Any:
    import numpy as np

    return np.stack([sample.pixels for sample in samples])
