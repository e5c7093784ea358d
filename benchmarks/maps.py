"""How good the maps are: energy inside the objects' boxes, and what deleting the highest cells costs the model.

Every method and its variants explain the predicted class of the micro models; two maps without a model (random
cells, a Gaussian in the centre) and every image's map on another image serve as controls.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks import boxes, images, scores
from benchmarks.cases import TARGETS
from benchmarks.measure import Spread, wall_seconds
from benchmarks.methods import DEFAULTS, MODELS, Setting, setting
from benchmarks.report import Figure, figure, show
from benchmarks.scores import energy_inside
from mamba_attn.evaluation.intervals import DRAWS, Interval, bootstrap, mean, ratio_of_means

T = TypeVar("T")
PARTS = ("energy", "deletion", "time")
IMAGES = 500  # for deletion
RANDOM = 3  # random deletions per image
BATCH = 25
EXPLAIN = [sys.executable, "-m", "mamba_attn.commands.cli", "explain", "--out", "{folder}"]
NOTES = {
    "energy": "energy of the map's positive part inside the boxes / their area, images with boxes below half of the "
    "image; 'ratio' (the headline): mean over images of the ratio, 'ratio of means': mean share of the energy / mean "
    "area, which small boxes move less; 'another image': the ratio with the map of another image, which is what the "
    "objects' liking for the centre gives",
    "deletion": f"mean drop of the predicted class's probability when the {scores.FRACTION:.0%} highest cells of "
    f"{scores.CELL} pixels become the mean colour ('drop') / the same for {RANDOM} random choices per image; "
    "'another image': the ratio with the cells of the next image's map, as scattered as its own and mostly of the same "
    "class; 'ceiling': the ratio if no probability were left",
    "intervals": f"{DRAWS} resamplings of the images: low and high are 2.5 and 97.5 %; the quartiles of the "
    "figures are theirs too",
    "explain": "first: nothing compiled yet; seconds: the runs after it",
    "headline": "the best of the methods' defaults per model, chosen on these images; all of them and their variants "
    "are in the details",
    "target": "the predicted class",
}


def maps_of(make: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
    """All images' maps: (images, rows, columns) float32."""
    return torch.cat([make(batch).detach().float() for batch in batches])


def track(items: Iterable[T], description: str) -> Iterable[T]:
    """The items, with a progress bar where there is a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as bar

    found: Iterable[T] = bar(list(items), description, console=Console(stderr=True), transient=True)
    return found


def measure_energy(its: Setting, boxed: boxes.BoxedImages) -> dict[str, Any]:
    """Per method and control the energy inside the boxes."""
    area = boxed.inside.double().mean((1, 2)).numpy()
    shape = (len(boxed), *its.size)
    found = {"images": len(boxed), "mean area": float(area.mean()), "methods": {}, "controls": {}}

    def judge(maps: Tensor) -> dict[str, Any]:
        share, other = energy_inside(maps, boxed.inside), energy_inside(maps.roll(1, 0), boxed.inside)
        return {
            "ratio": bootstrap(mean, share / area),
            "ratio of means": bootstrap(ratio_of_means, share, area),
            "another image": bootstrap(mean, other / area),
        }

    for name, maps in (("random", scores.random_map(shape, 0)), ("centred Gaussian", scores.centred_map(shape))):
        found["controls"][name] = judge(maps)
    for method in its.methods:
        batches = track(boxed.batches(BATCH), f"{its.name} energy: {method}")
        found["methods"][str(method)] = judge(maps_of(method.build(its.model), batches))
    return found


def measure_deletion(its: Setting, split: images.Images) -> dict[str, Any]:
    """Measure per method and control the drop of the predicted class's probability, relative to random cells."""

    def batches() -> Iterator[Tensor]:
        return (x for x, _ in images.evaluation_batches(split, its.size[0], BATCH))

    whole = torch.cat([scores.probabilities(its.model, x) for x in batches()])
    classes, before = whole.argmax(1), whole.amax(1)

    def drop(make: Callable[[Tensor], Tensor], seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """By every image's own map, and by that of the next image of the batch."""
        after, other = [], []
        for index, (x, own) in enumerate(
            zip(track(batches(), f"{its.name} deletion: {what}"), classes.split(BATCH), strict=True)
        ):
            where = scores.top_cells(make(x), seed + index)
            after.append(scores.probabilities(its.model, scores.deleted(x, where), own))
            other.append(scores.probabilities(its.model, scores.deleted(x, where.roll(1, 0)), own))
        return tuple((before - torch.cat(each)).double().numpy() for each in (after, other))

    def constant(x: Tensor) -> Tensor:
        return torch.zeros(len(x), *its.size)

    draws = [drop(constant, 1000 * (1 + draw), "random")[0] for draw in range(RANDOM)]
    random = np.mean(draws, axis=0)

    def judge(dropped: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        return {
            "ratio": bootstrap(ratio_of_means, dropped, random),
            "drop": bootstrap(mean, dropped),
            "another image": bootstrap(ratio_of_means, other, random),
        }

    found = {
        "images": len(split),
        "random drop": bootstrap(mean, random),
        "mean probability": float(before.mean()),
        "ceiling": float(before.mean()) / float(random.mean()),
    }
    found["controls"] = {
        "another random choice": judge(*drop(constant, 0, "random")),
        "centred Gaussian": judge(*drop(lambda x: scores.centred_map((len(x), *its.size)), 0, "centre")),
    }
    found["methods"] = {str(method): judge(*drop(method.build(its.model), 0, str(method))) for method in its.methods}
    return found


def headline(target: str, found: dict[str, Any]) -> Figure | None:
    """The best default as a figure, if there is such a target; its quartiles are those of the bootstrap."""
    ratios: dict[str, Interval] = {
        str(method): found["methods"][str(method)]["ratio"] for method in DEFAULTS if str(method) in found["methods"]
    }
    if target not in TARGETS or not ratios:
        return None
    best = max(ratios, key=lambda name: ratios[name].value)
    return figure(target, best, Spread(ratios[best].value, *ratios[best].quartiles, found["images"]))


def measure_time(runs: int) -> tuple[Figure, dict[str, Any]]:
    """Wall time of ``mamba-attn explain`` with its defaults; the machine's load says what else it did meanwhile."""
    first, *seconds = wall_seconds(EXPLAIN, 1 + runs)
    details = {"first": first, "seconds": seconds, "load average": os.getloadavg()}
    return figure("explain", "", Spread.of(seconds)), details


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run.py maps``."""
    add = parser.add_argument
    add("--data", type=Path, help="folder with localise.zip, imagenette128.zip and clothing128.zip")
    add("--cache", type=Path, default=Path("cache"), help="folder of the decoded images; default: ./cache")
    add("--models", nargs="+", choices=MODELS, help="default: those with weights")
    add("--methods", nargs="+", default=["*"], metavar="PATTERN", help="of the methods' names, as in a shell")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--limit", type=int, help="images per measurement")
    add("--weights", type=Path, help="folder of NAME.safetensors and NAME.json; default: the demo weights")
    add("--runs", type=int, default=5, help="of the command; default: 5")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave more out than variants of methods, so that the result is not the committed one."""
    chosen = (args.limit, args.weights)
    left_out = [method for method in DEFAULTS if not any(fnmatchcase(str(method), text) for text in args.methods)]
    return any(option is not None for option in chosen) or bool(left_out) or len(set(args.parts) - {"time"}) == 1


def run_maps(args: argparse.Namespace) -> Iterator[tuple[str, list[Figure], dict[str, Any]]]:
    """All rows about maps: "explain", the time of the command, then "maps_<model>" for every model.

    Raises:
        SystemExit: images are needed and --data is not given.
    """
    limit = 3 if args.quick else args.limit
    if "time" in args.parts:
        found, timing = measure_time(1 if args.quick else args.runs)
        yield "explain", [found], {"how": NOTES["explain"], **timing}
    if set(args.parts) == {"time"}:
        return
    if args.data is None:
        raise SystemExit(f"run.py maps: --data FOLDER is missing, with {boxes.ARCHIVE} and the validation images.")
    for name in args.models or _available(args.weights):
        its = setting(name, args.weights, args.methods)
        figures: list[Figure] = []
        details: dict[str, Any] = {
            "how": NOTES,
            "weights": args.weights.name if args.weights else "demo",
            "top1": its.card["top1"],
            "pixels": list(its.size),
        }
        for part in [part for part in ("energy", "deletion") if part in args.parts]:
            details[part] = _measure(part, its, args.data, args.cache, limit)
            show_part(f"{name}: {part}", details[part])
            best = headline(f"{name} {part}", details[part])
            figures += [best] if best else []
        yield f"maps_{name}", figures, details


def _available(weights: Path | None) -> list[str]:
    from mamba_attn.models import registry

    there = registry.demos() if weights is None else [path.stem for path in weights.glob("*.safetensors")]
    return [name for name in MODELS if name in there]


def _measure(part: str, its: Setting, data: Path, cache: Path, limit: int | None) -> dict[str, Any]:
    if part == "energy":
        from mamba_attn import models

        return measure_energy(its, boxes.load(data, models.transform(its.name, its.size), limit))
    return measure_deletion(its, images.load(data, cache, "val", limit or IMAGES))


def show_part(title: str, found: dict[str, Any]) -> None:
    """All methods of a model, best first, then the controls."""
    methods = sorted(found["methods"].items(), key=lambda item: -item[1]["ratio"].value)
    rows = [*methods, *found["controls"].items()]
    columns = list(rows[0][1])
    show(
        f"{title}, {found['images']} images",
        ["method", *columns],
        [
            [name, *(f"{row[key].value:.3f} ({row[key].low:.3f} .. {row[key].high:.3f})" for key in columns)]
            for name, row in rows
        ],
    )
    sys.stdout.flush()  # the next part takes minutes
