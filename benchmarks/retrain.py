"""What models learn from images that have lost what a method marks: remove and retrain (ROAR, arXiv 1806.10758).

    python benchmarks/run.py retrain --data FOLDER

A narrow VMamba (1-1-2-1 blocks) is trained on the 20 classes at 64 pixels, from labels alone. For each method, the
cells of all images, of training and validation, are ranked by the map of the class that it answers; the highest are
filled, and new models are trained from other random weights on what is left. The further top-1 falls, the more of what
the class can be learnt from did the method find. The shape of what was filled may itself tell the class; a fill of the
blurred image, against which the shape shows less, is the control. Results lie in ``--work``, training by training; a
killed run resumes from there.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import images, train
from benchmarks.export import evaluate
from benchmarks.report import Figure, show
from mamba_attn.attribution import catalogue
from mamba_attn.core.blur import blurred

METHODS = ("random", "raw_attention", "mamba_attribution", "mamba_lrp")
FRACTIONS = (0.25, 0.5, 0.75)
SEEDS = (1, 2)  # of the retrained models; the model that is explained has seed 0
PIXELS, CELL, EPOCHS, BATCH = 64, 4, 6, 32
OPTIONS = {"depths": [1, 1, 2, 1], "dims": 24}
LEARNING = ("--optimizer", "muon", "--lr", "2e-3", "--drop-path", "0", "--mixup", "0.3", "--val-every", "99")


class Job(NamedTuple):
    """One training on images without what a method marks.

    Attributes:
        method: whose maps rank the cells; "": nothing is removed.
        fraction: of the cells that are filled.
        fill: "mean", of the image, or "blur".
        seed: of the training.
    """

    method: str
    fraction: float
    fill: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its line."""
        what = f"{self.method}_{self.fraction}_{self.fill}" if self.method else "whole"
        return f"{what}_{self.seed}"


def jobs() -> list[Job]:
    """Return all trainings: whole images, each method and fraction from each seed, and the blurred control."""
    found = [Job("", 0.0, "mean", seed) for seed in (0, *SEEDS)]
    for seed in SEEDS:
        found += [Job(method, fraction, "mean", seed) for fraction in FRACTIONS for method in METHODS]
        found += [Job(method, 0.5, "blur", seed) for method in METHODS]
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenette128.zip and clothing128.zip")
    parser.add_argument("--work", type=Path, default=Path("retrain_work"), help="default: ./retrain_work")
    parser.add_argument("--cache", type=Path, help="folder of the decoded images; default: cache, in --work")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once; default: 2")
    parser.add_argument("--minutes", type=float, help="begin no training after this time, and report what there is")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return False  # the file says what was trained


def run_retrain(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Train what the work folder lacks, and report."""
    limit, epochs = (64, 1) if args.quick else (None, EPOCHS)
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = [Job("", 0.0, "mean", 0), Job("random", 0.5, "mean", 1)] if args.quick else jobs()
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    setting = Setting(args.data, args.work, args.cache or args.work / "cache", limit, epochs, deadline)
    explained, *others = wanted
    trained(setting, explained)
    for method in dict.fromkeys(job.method for job in others if job.method):
        ranks(setting, method)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, torch.set_num_threads, (1,)) as pool:
        list(pool.map(trained, [setting] * len(others), others))
    lines = [json.loads(path.read_text()) for job in wanted if (path := args.work / f"{job.name}.json").is_file()]
    found = {"how": __doc__, "epochs": epochs, "options": OPTIONS, "cell": CELL, "pixels": PIXELS, "runs": lines}
    header, rows = table(lines)
    show("top-1 of retrained models, %", header, rows)
    return [], found


class Setting(NamedTuple):
    """What all trainings share.

    Attributes:
        data: folder of the images.
        work: of the results.
        cache: of decoded images.
        limit: images of each split; None: all.
        epochs: of each training.
        deadline: of ``time.time``, after which none begins.
    """

    data: Path
    work: Path
    cache: Path
    limit: int | None
    epochs: int
    deadline: float | None


def trained(setting: Setting, job: Job) -> None:
    """Train a model on what is left, unless that is done, and write its accuracy."""
    path, folder = setting.work / f"{job.name}.json", setting.work / job.name
    if path.is_file() or (setting.deadline is not None and time.time() > setting.deadline):
        return
    folder.mkdir(exist_ok=True)
    args = train.parse(
        ["vmamba_micro", "--data", str(setting.data), "--out", str(folder), "--pixels", str(PIXELS), "--epochs",
         str(setting.epochs), "--seed", str(job.seed), "--options", json.dumps(OPTIONS), *LEARNING]
    )  # fmt: skip
    learnt, judged = (left(setting, job, split) for split in ("train", "val"))
    run = train.Run(args, learnt)
    checkpoint = folder / "last.pt"
    if checkpoint.is_file():
        run.resume(checkpoint)
    train.fit(run, judged, train.Log(folder / "log.jsonl", run.total), checkpoint, None)
    top1 = evaluate(run.ema.module, judged, PIXELS)["top1"]
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**job._asdict(), "top1": top1, "cpu_s": round(run.cpu, 1)}))
    part.replace(path)
    print(f"{job.name}: {top1:.2f} %", flush=True)


def squares(setting: Setting, split: str) -> images.Images:
    """Return a split as the model sees it in evaluation: squares of its own size, in one buffer."""
    path = setting.work / f"{split}_{PIXELS}.npy"
    whole = images.load(setting.data, setting.cache, split, setting.limit)
    if not path.is_file():
        part = path.with_suffix(".part.npy")
        cut = (images.centre(whole.image(index), PIXELS)[0] for index in range(len(whole)))
        np.save(part, np.stack([each.permute(1, 2, 0).numpy() for each in cut]))
        part.replace(path)
    return _of(whole, np.load(path, mmap_mode="c"))


def _of(whole: images.Images, pixels: np.ndarray) -> images.Images:
    """The same images and labels with other pixels, (images, PIXELS, PIXELS, 3)."""
    table = whole.table.copy()
    table[:, 0] = 0
    table[:, 1] = np.arange(len(table)) * PIXELS * PIXELS * 3
    table[:, 2:4] = PIXELS
    return replace(whole, buffers=[pixels.reshape(-1)], table=table)


def left(setting: Setting, job: Job, split: str) -> images.Images:
    """Return a split without the cells that a method ranks highest."""
    whole = squares(setting, split)
    if not job.method:
        return whole
    order = np.load(setting.work / f"{job.method}_{split}.npy")
    pixels = whole.buffers[0].reshape(len(whole), PIXELS, PIXELS, 3)
    return _of(whole, filled(pixels, order, job.fraction, job.fill))


def filled(pixels: np.ndarray, order: np.ndarray, fraction: float, fill: str) -> np.ndarray:
    """Return images whose highest cells are filled.

    Args:
        pixels: (images, PIXELS, PIXELS, 3) uint8.
        order: (images, cells), cells from the highest to the lowest.
        fraction: of the cells.
        fill: "mean" or "blur".
    """
    side = PIXELS // CELL
    lost = np.zeros(order.shape, bool)
    np.put_along_axis(lost, order[:, : round(fraction * order.shape[1])].astype(np.int64), True, axis=1)
    result = pixels.copy()
    for start in range(0, len(pixels), 256):
        own = slice(start, start + 256)
        values = torch.from_numpy(pixels[own].copy()).permute(0, 3, 1, 2).float()
        other = values.mean((2, 3), keepdim=True).expand_as(values) if fill == "mean" else blurred(values)
        where = lost[own].reshape(-1, side, side).repeat(CELL, 1).repeat(CELL, 2)[..., None]
        result[own] = np.where(where, other.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy(), pixels[own])
    return result


def ranks(setting: Setting, method: str) -> None:
    """Write the cells of every image from the highest to the lowest in a method's map, unless they are there."""
    model = None
    for split in ("train", "val"):
        path = setting.work / f"{method}_{split}.npy"
        if path.is_file():
            continue
        model = model or explained(setting)
        part = path.with_suffix(".part.npy")
        np.save(part, np.concatenate(list(_ranked(model, method, squares(setting, split)))))
        part.replace(path)
        print(f"{method}: maps of {split}", flush=True)


def explained(setting: Setting) -> nn.Module:
    """Return the model whose maps they are: the averaged weights of the training of seed 0 on whole images."""
    from benchmarks import zoo

    state = torch.load(setting.work / Job("", 0.0, "mean", 0).name / "last.pt", weights_only=True)
    whole = images.load(setting.data, setting.cache, "val", setting.limit)
    model = zoo.create("vmamba_micro", num_classes=len(whole.classes), image_size=PIXELS, **OPTIONS)
    model.load_state_dict(state["ema"])
    return model.eval()


def _ranked(model: nn.Module, method: str, whole: images.Images) -> Iterator[np.ndarray]:
    mapped = catalogue.build(method, model)
    for x, _ in images.evaluation_batches(whole, PIXELS, BATCH):
        with torch.no_grad():
            answered = model(x).argmax(1)
        cells = F.avg_pool2d(mapped.attribute(x, answered).detach().float(), CELL).flatten(1)
        yield cells.argsort(dim=1, descending=True, stable=True).to(torch.int16).numpy()


def table(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: top-1 by method, fraction and fill, the mean over seeds and every seed's own.

    Args:
        lines: of the trainings.
    """
    columns = [(fraction, "mean") for fraction in FRACTIONS] + [(0.5, "blur")]
    found: dict[tuple[str, float, str], list[float]] = {}
    for line in lines:
        found.setdefault((line["method"], line["fraction"], line["fill"]), []).append(line["top1"])
    methods = [method for method in METHODS if any(key[0] == method for key in found)]
    rows = [[method, *(_cell(found.get((method, *column), [])) for column in columns)] for method in methods]
    whole = found.get(("", 0.0, "mean"), [])
    header = ["method", *(f"{fraction:.0%}, {fill}" for fraction, fill in columns)]
    return header, [*rows, ["nothing removed", _cell(whole), *[""] * (len(columns) - 1)]] if whole else rows


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.1f} ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else f"{mean:.1f}"
