"""The findings of the demo models, of models trained in other orders, and of random weights; docs/findings.md.

    python benchmarks/run.py findings --data FOLDER [--runs FOLDER]
    python benchmarks/findings.py              derives the verdicts of results/findings.json from its numbers again, and
                                               writes the tables of docs/findings.md

``--runs`` holds what benchmarks/train.py wrote: class_token_first/ and class_token_middle/vim_micro.safetensors with
their cards, digits/<order>_<seed>/*.safetensors, and those of benchmarks/series.py: orders/<order>_<seed>/ and
seeds/<name>/*.safetensors, trainings that differ in their seed alone and tell what training does, and
depths/<blocks>/vmamba_micro.safetensors. Models of the last two kinds are added to those of the results. A part whose
runs are all missing there is taken from the results as they are, without the numbers whose formula has changed since;
the page says how it was measured. ``--data`` holds imagenette128.zip and localise.zip. Stores, and what was measured
of them, lie in ``--work``; a killed run resumes from there.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import numpy as np
import torch

from benchmarks.findings_page import PICTURES, update
from benchmarks.findings_tables import digits as in_digits
from benchmarks.findings_verdicts import PARTS, derive
from benchmarks.report import Figure, figure, show, written
from mamba_attn import images, orders
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets import Data, class_indices, open_data
from mamba_attn.datasets.loading import load
from mamba_attn.figures import png
from mamba_attn.figures.colours import limits
from mamba_attn.findings.accuracy import known_accuracy, over_orders
from mamba_attn.findings.controls import Report, report
from mamba_attn.findings.intervals import Estimate, difference
from mamba_attn.findings.page import matrices_rgb
from mamba_attn.findings.registry import VERSION
from mamba_attn.findings.tables import as_json, side_by_side

DEMOS = ("vim_micro", "vmamba_micro", "vit_micro")
CLASS_TOKENS = ("class_token_first", "class_token_middle")
OBJECTS, DIGITS = "imagenette128.zip", "localise.zip:digits64"
RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "findings.json"
IMAGES, SEEDS = 64, 20
CHANGED = {  # since version 1 of the formulas
    *("block_silhouette", "block_neighbours", "block_correlation", "image_share", "image_share_by_depth"),
}
FIRST = {"formulas": 1, "images": 200, "seeds": 5}  # of results that do not say how they were measured
APART = ("trained seeds", "depths")  # whose models may be measured in several runs
_BATCH = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenette128.zip and localise.zip")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of trained models; default: ./runs")
    parser.add_argument("--work", type=Path, default=Path("findings_work"), help="default: ./findings_work")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"of each store; default: {IMAGES}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"models with random weights; default: {SEEDS}")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--answers", type=int, default=500, help="images that reordered models classify; default: 500")
    parser.add_argument("--earlier", type=Path, default=FILE, help="results that missing parts are taken from")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return (args.images, args.seeds, args.answers) != (IMAGES, SEEDS, 500)


def missing(runs: Path) -> list[str]:
    """What the folder of runs should hold and does not: five orders, both class tokens, five orders of digits."""
    found = []
    if len(trained_orders(runs)) < 5:
        found.append(f"{5 - len(trained_orders(runs))} orders of vmamba_micro")
    found += [name for name in CLASS_TOKENS if not weights_in(runs / name)]
    digits = {path.parent.name.rpartition("_")[0] for path in runs.glob("digits/*/*.safetensors")}
    return found + ([f"{5 - len(digits)} orders of digits"] if len(digits) < 5 else [])


def trained_orders(runs: Path) -> dict[str, list[Path]]:
    """Weights of all seeds by the order that they were trained in."""
    found = {name: map(weights_in, sorted(runs.glob(f"orders/{name}_*"))) for name in orders.ORDERS}
    finished = {name: [path for path in paths if path is not None] for name, paths in found.items()}
    return {name: paths for name, paths in finished.items() if paths}


def trained_seeds(runs: Path) -> dict[str, list[Path]]:
    """Finished trainings that differ in their seed alone, by model."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(runs.glob("seeds/*")):
        if (path := weights_in(folder)) is not None:
            found.setdefault(path.stem, []).append(path)
    return found


def trained_depths(runs: Path) -> dict[str, Path]:
    """Weights of VMambas by their blocks, "2-2-4-2", the fewest first."""
    found = {folder.name: path for folder in runs.glob("depths/*") if (path := weights_in(folder)) is not None}
    blocks = {name: [int(count) for count in name.split("-")] for name in found}
    return {name: found[name] for name in sorted(found, key=lambda name: (len(blocks[name]), blocks[name]))}


def weights_in(folder: Path) -> Path | None:
    """The weights in the folder of a run, once it is finished: the card is written last."""
    return next((path for path in sorted(folder.glob("*.safetensors")) if path.with_suffix(".json").is_file()), None)


def recipe(weights: Path) -> dict[str, Any]:
    """How weights were trained, from their card; empty where it does not say."""
    card = json.loads(weights.with_suffix(".json").read_text())
    return {key: card[key] for key in ("pixels", "epochs", "seed", "training_images", "command") if key in card}


def run_findings(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Collect stores, measure their findings and report them."""
    if args.quick:
        args.images, args.seeds, args.answers = 8, 2, 16
    started, data, runs = time.perf_counter(), args.data.expanduser(), args.runs.expanduser()
    orders_found = trained_orders(runs)
    objects = {f"order {name}": (paths[0].stem, str(paths[0])) for name, paths in orders_found.items()}
    tokens = {name: (path.stem, str(path)) for name in CLASS_TOKENS if (path := weights_in(runs / name)) is not None}
    digits = {
        f"digits {path.parent.name}": (path.stem, str(path))
        for path in sorted(runs.glob("digits/*/*.safetensors"))
        if path.with_suffix(".json").is_file()
    }
    depths = {f"depths {name}": ("vmamba_micro", str(path)) for name, path in trained_depths(runs).items()}
    seeds = {f"seeds {name}": (name, str(files[0])) for name, files in trained_seeds(runs).items()}
    parts = {
        "models": ({name: (name, "demo") for name in DEMOS}, OBJECTS), "orders": (objects, OBJECTS),
        "class tokens": (tokens, OBJECTS), "digits": (digits, DIGITS),
        "trained seeds": (seeds, OBJECTS), "depths": (depths, OBJECTS),
    }  # fmt: skip
    details: dict[str, Any] = {"how": __doc__, "missing": missing(runs)}
    before = earlier(args.earlier) if args.earlier.is_file() and not args.quick else {}
    every: list[Report] = []
    for part, (models, selector) in parts.items():
        if not models and part in before:
            details[part] = before[part]
            if part == "class tokens":
                details["class token rows"] = before["class token rows"]
            continue
        reports = measured(args, models, str(data / selector))
        stores = {name: AttentionStore.open(folder_of(args, name, *its)) for name, its in models.items()}
        every += reports
        details[part] = brief(as_json(reports, over_orders(reports), {}), part != "models")
        setting = {"formulas": VERSION, "images": args.images, "seeds": args.seeds}
        details[part] |= {"title": part, **setting}
        if part in APART and setting.items() <= before.get(part, {}).items():
            details[part]["stores"] = merged(before[part]["stores"], details[part]["stores"])
        if reports:
            show(*side_by_side(reports))
        if part == "models" and stores:
            draw(args, "findings_matrices.png", matrices_rgb(stores, 160))
        if part == "class tokens":
            details["class token rows"] = class_token_rows(args, stores)
    derive(details)
    every_run = {name: Path(path) for name, (_, path) in {**tokens, **digits, **depths}.items()}
    for kind, runs_of in (("order", orders_found), ("seeds", trained_seeds(runs))):
        every_run |= {f"{kind} {path.parent.name}": path for paths in runs_of.values() for path in paths}
    trained = {name: recipe(path) for name, path in every_run.items()}
    details["training"] = {**before.get("training", {}), **trained}
    own = orders_found or "reordered" not in before
    details["reordered"] = reordered(orders_found, data / OBJECTS, args.answers) if own else before["reordered"]
    # accuracies of models that are gone: they are only handed on
    details["older orders"] = before.get("older orders", {"orders": [], "top1": [], "images": 0})
    details["wall seconds"] = time.perf_counter() - started
    families = {each.model.partition("_")[0] for each in every if each.order}
    count = len({store["order"] for store in details["orders"]["stores"]})
    return [figure("findings orders", "vmamba_micro", count), figure("findings families", "", len(families))], details


def merged(stores: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return stores of an earlier run with those of this one, which replace what has their names.

    Args:
        stores: of the earlier run.
        others: of this one.
    """
    return list({store["name"]: store for store in [*stores, *others]}.values())


def earlier(path: Path) -> dict[str, Any]:
    """Results as they are, every part with how it was measured, without the numbers whose formula has changed.

    Args:
        path: of the file.
    """
    details: dict[str, Any] = json.loads(path.read_text())["details"]
    for name in PARTS:
        part = details.get(name)
        if part is None or part.setdefault("formulas", FIRST["formulas"]) == VERSION:
            continue
        part.update({key: details.get(key, value) for key, value in FIRST.items() if key not in part})
        for store in part["stores"]:
            store["rows"] = [row for row in store["rows"] if row["finding"] not in CHANGED]
    return details


def measured(args: argparse.Namespace, models: dict[str, tuple[str, str]], selector: str) -> list[Report]:
    """Return the findings of models and their controls, some models at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, torch.set_num_threads, (1,)) as pool:
        jobs = [pool.submit(measure, args, name, *its, selector) for name, its in models.items()]
        return [job.result() for job in jobs]


def measure(args: argparse.Namespace, name: str, model: str, weights: str, selector: str) -> Report:
    """Collect a model's store as far as it is not there yet, and measure it."""
    folder = folder_of(args, name, model, weights)
    collect(Request(load(model, weights), open_data(selector), args.images), folder)
    print(f"{name}: {folder} is collected", flush=True)
    store = AttentionStore.open(folder)
    kind, _, which = name.partition(" ")
    repeated = {"seeds": trained_seeds, "order": trained_orders}
    others = repeated[kind](args.runs.expanduser())[which][1:] if kind in repeated else ()
    found = report(name, store, args.work / "measured", seeds=args.seeds, weights=others)
    found.accuracy = known_accuracy(store)
    cards = [known_accuracy(store, path) for path in others]
    found.other_accuracies = [accuracy for accuracy in cards if accuracy is not None]
    print(f"{name}: measured", flush=True)
    return found


def folder_of(args: argparse.Namespace, name: str, model: str, weights: str) -> Path:
    """The folder of a store: other weights, or other numbers of images, have another."""
    folder: Path = args.work / "stores" / f"{name.replace(' ', '_')}_{load(model, weights).fingerprint}_{args.images}"
    return folder


def brief(results: dict[str, Any], summary: bool) -> dict[str, Any]:
    """The results in five digits; of many models only what stands for the whole model."""
    for store in results["stores"]:
        store["rows"] = [row for row in store["rows"] if not summary or row["place"] in ("all", "model")]
    return in_digits(results)


def reordered(weights: dict[str, list[Path]], selector: Path, count: int) -> dict[str, Any]:
    """Accuracy, in percent, of models trained in one order (row) whose scans follow another (column) at inference.

    And how far each is from the models in their own order, in points, with the paired interval over models; over images
    where there is one model.
    """
    if not weights:
        return {"orders": [], "top1": [], "gained": [], "images": 0}
    from mamba_attn import models

    data, names = open_data(str(selector)), list(weights)
    table, gained = [], []
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, paths in weights.items():
        hits: dict[str, Any] = {order: [] for order in names}
        for path in paths:
            subject = load(path.stem, str(path))
            batches = batches or list(labelled(data, subject, count))
            for order in names:
                model = models.create(path.stem, weights=str(path), **{**subject.options, "order": order})
                hits[order].append(answers(model, batches))
        top1 = {order: np.stack(its).mean(1) if len(paths) > 1 else its[0] for order, its in hits.items()}
        table.append([round(100 * float(its.mean()), 2) for its in top1.values()])
        gained.append([_points(difference(its, top1[name])) for its in top1.values()])
        print(f"reordered: {len(table)} of {len(names)}", flush=True)
    return {"orders": names, "top1": table, "gained": gained, "images": sum(len(labels) for _, labels in batches)}


def _points(estimate: Estimate | None) -> list[float | None]:
    """Value and interval in points of percent."""
    if estimate is None:
        return [None] * 3
    ends = (estimate.value, estimate.low, estimate.high)
    return [None if end is None else round(100 * end, 2) for end in ends]


def labelled(data: Data, subject: LoadedModel, count: int) -> "list[tuple[torch.Tensor, torch.Tensor]]":
    """Images and the model's classes for them, in batches."""
    known = class_indices(data, subject)
    samples = [data.load(number, subject.transform) for number in data.chosen(limit=count)]
    fitting = [(each.pixels, known[each.label]) for each in samples if each.label is not None]
    pairs = [(pixels, label) for pixels, label in fitting if label is not None]
    return [
        (images.normalise(np.stack([pixels for pixels, _ in part])), torch.tensor([label for _, label in part]))
        for start in range(0, len(pairs), _BATCH)
        if (part := pairs[start : start + _BATCH])
    ]


@torch.no_grad()
def answers(model: torch.nn.Module, batches: "Sequence[tuple[torch.Tensor, torch.Tensor]]") -> np.ndarray:
    """Return of every image whether the model is right about it, 1 or 0."""
    right = torch.cat([model(pixels).argmax(1) == labels for pixels, labels in batches])
    return right.double().numpy()


def class_token_rows(args: argparse.Namespace, stores: dict[str, AttentionStore]) -> dict[str, Any]:
    """What the class token reads, on average: drawn side by side, and where its centre lies, in parts of the image."""
    panels, captions, found = [], [], {}
    for name, store in stores.items():
        rows = []
        for layer in store.layers:
            (token,) = layer.layout.class_tokens
            row = np.abs(store.mean_row(layer, token)[layer.layout.patches.numpy()]).reshape(layer.layout.grid)
            rows.append(row / (row.sum() or 1))
        mean = np.mean(rows, axis=0)
        for depth in (0.25, 0.5, 0.75, 1.0):
            panels.append(enlarged(rows[round(depth * (len(rows) - 1))]))
            captions.append(f"{name}, {depth:.0%}")
        panels.append(enlarged(mean))
        captions.append(f"{name}, mean")
        height = mean.shape[0]
        found[name] = {
            "upper third": float(mean[: height // 3].sum()), "lower third": float(mean[-(height // 3) :].sum()),
            "middle": float(mean[height // 3 : -(height // 3)].sum()),
            "entropy": float(-(mean[mean > 0] * np.log(mean[mean > 0])).sum() / np.log(mean.size)),
            "centre": [float((mean.sum(1) * (np.arange(height) + 0.5)).sum() / height),
                       float((mean.sum(0) * (np.arange(mean.shape[1]) + 0.5)).sum() / mean.shape[1])],
        }  # fmt: skip
    if panels:
        draw(args, "findings_class_token.png", png.side_by_side(panels, captions, columns=5))
    return found


def enlarged(row: np.ndarray) -> np.ndarray:
    """Enlarge a map by whole pixels."""
    rgb = png.matrix_rgb(row, **limits(row))
    times = max(1, 160 // max(rgb.shape[:2]))
    return rgb.repeat(times, 0).repeat(times, 1)


def draw(args: argparse.Namespace, name: str, rgb: np.ndarray) -> None:
    """Write a picture: next to the pages if nothing is left out, else next to the results."""
    folder = args.out or (args.work if args.quick or partial(args) else PICTURES)
    folder.mkdir(parents=True, exist_ok=True)
    png.save_png(folder / name, rgb)


if __name__ == "__main__":
    results = json.loads(FILE.read_text())
    results["details"] = earlier(FILE)
    derive(results["details"])
    FILE.write_text(written(results))
    update(results)
