"""Two digits in one image, and maps of either class: does a map turn to the digit that it is asked about?

An image of digits64 gets the strokes of a second digit from another image, where the two do not touch. Each method is
asked for the class of either. Its score is the area under the ROC curve between the two digits' pixels, the asked one
against the other, averaged over both questions: 50 for every map that is the same for both classes, wherever the digits
stand, 100 for one that turns completely. Images count where the model's two most likely classes are the two digits.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.comparison import DIGITS
from benchmarks.report import Figure, show
from mamba_attn.attribution import catalogue
from mamba_attn.datasets.class_names import class_indices
from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.loading import load
from mamba_attn.datasets.made_of import made_of
from mamba_attn.evaluation.intervals import bootstrap, mean
from mamba_attn.evaluation.localisation import HALF, area_between
from mamba_attn.evaluation.specs import build

METHODS = (
    "mamba_lrp",
    "frozen_contribution",
    "keep_and_remove_lrp",
    "relevance_attention_ranks",
    "mamba_attribution",
    "implicit_attention",
    "raw_attention",
    "attention_rollout",
    "controllability",
    "attn_lrp",
    "libra_grad",
    "transformer_attribution",
    "grad_cam",
    "input_x_gradient",
    "random",
    "centre",
)
IMAGES = 300
_BATCH = 10


class Pair(NamedTuple):
    """An image with two digits.

    Args:
        pixels: (rows, columns, 3) uint8.
        labels: of the first and the second digit.
        places: (rows, columns) of bool, their pixels.
    """

    pixels: np.ndarray
    labels: tuple[int, int]
    places: tuple[np.ndarray, np.ndarray]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--data", type=Path, required=True, help="folder with localise.zip")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--models", nargs="+", default=DIGITS, help="names, or NAME=WEIGHTS")
    parser.add_argument("--images", type=int, default=IMAGES, help="with two digits, before the model is asked")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return (tuple(args.methods), tuple(args.models), args.images) != (METHODS, DIGITS, IMAGES)


def run_two_digits(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Make the images, ask every model and method, and report."""
    data = open_data(str(args.data / "localise.zip:digits64"))
    details: dict[str, Any] = {"how": __doc__, "models": {}}
    for text in args.models:
        name, _, weights = text.partition("=")
        subject = load(name, weights or "demo")
        found = list(pairs(data, subject, 4 if args.quick else args.images))
        details["models"][name] = its = scores(subject, found, args.methods)
        rows = [(method, "{:.1f} [{:.1f}, {:.1f}]".format(*each)) for method, each in its["scores"].items()]
        show(f"{name}: {its['images']} of {its['asked']} images", ("method", "asked digit above the other"), rows)
    return [], details


def pairs(data: Any, subject: Any, count: int) -> Iterator[Pair]:
    """Yield images with two digits of different classes, the first of the collection with a partner further on.

    Args:
        data: digits64.
        subject: a model, for its size and classes.
        count: how many.
    """
    known, waiting = class_indices(data, subject), []
    for index in data.chosen():
        if not count:
            return
        sample = data.load(index, subject.transform)
        place, label = sample.inside.numpy() >= HALF, known[sample.label]
        partner = next((at for at, each in enumerate(waiting) if each[1] != label and not _touch(each[2], place)), None)
        if partner is None:
            waiting.append((sample.pixels, label, place))
            continue
        count -= 1
        yield combined(*waiting.pop(partner), sample.pixels, label, place)


def combined(
    pixels: np.ndarray, label: int, place: np.ndarray, others: np.ndarray, its_label: int, its_place: np.ndarray
) -> Pair:
    """Return an image with the strokes of another's digit in it.

    Args:
        pixels: of the image.
        label: of its digit.
        place: of its digit.
        others: pixels of the other image.
        its_label: of the other digit.
        its_place: of the other digit.
    """
    return Pair(np.where(its_place[..., None], others, pixels), (label, its_label), (place, its_place))


def scores(subject: Any, found: Sequence[Pair], methods: Sequence[str]) -> dict[str, Any]:
    """Return of how many images the model sees both digits, and every fitting method's score with its interval.

    Args:
        subject: a model.
        found: the images.
        methods: by name.
    """
    images = subject.transform.normalise(np.stack([each.pixels for each in found])).to(subject.device)
    with torch.no_grad():
        seen = subject.model(images).topk(2).indices.sort(1).values.tolist()
    kept = [at for at, each in enumerate(found) if seen[at] == sorted(each.labels)]
    measured = {}
    for method in methods:
        name = method.partition(":")[0]
        if not kept or catalogue.refusal(name, subject.model, kinds=made_of(subject)) is not None:
            continue
        explain = build(method, subject.model, subject.layout)
        areas = []
        for start in range(0, len(kept), _BATCH):
            part = kept[start : start + _BATCH]
            both = [
                explain.attribute(images[part], target=[found[at].labels[which] for at in part])[:, 0].cpu().numpy()
                for which in (0, 1)
            ]
            for number, at in enumerate(part):
                first, second = found[at].places
                turned = area_between(both[0][number], first, second), area_between(both[1][number], second, first)
                areas.append(100 * float(np.mean([0.5 if area is None else area for area in turned])))
        its = bootstrap(mean, np.array(areas))
        measured[method] = [round(each, 2) for each in (its.value, its.low, its.high)]
    ordered = dict(sorted(measured.items(), key=lambda item: -item[1][0]))
    return {"images": len(kept), "asked": len(found), "scores": ordered}


def _touch(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the boxes around two places share a pixel, or either is empty."""
    boxes = []
    for place in (one, other):
        rows, columns = np.nonzero(place)
        if not len(rows):
            return True
        boxes.append((rows.min(), rows.max(), columns.min(), columns.max()))
    (top, bottom, left, right), (t, b, l, r) = boxes  # noqa: E741
    return bool(top <= b and t <= bottom and left <= r and l <= right)
