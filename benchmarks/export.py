"""What a training run leaves behind: validation accuracy, float16 weights, and their card."""

import argparse
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks import images, zoo

LICENSES = {
    "imagenette128": "Imagenette (fast.ai), a subset of ImageNet: non-commercial research and educational use only",
    "clothing128": "clothing-dataset-small (Alexey Grigorev): CC0 1.0",
    "localise:digits64": "MNIST digits (Yann LeCun, Corinna Cortes): CC BY-SA 3.0, on photographs of Imagenette "
    "(ImageNet's terms: non-commercial research and educational use only)",
}


class Trained(Protocol):
    """What a card needs of a training run."""

    args: argparse.Namespace
    options: dict[str, Any]
    train: images.Images
    ema: Any
    step: int
    batch: int
    cpu: float
    wall: float


@torch.no_grad()
def evaluate(model: nn.Module, val: images.Images, pixels: int, batch: int = 64) -> dict[str, Any]:
    """Top-1 in percent: overall ("top1"), per data set ("sets"), per class ("per_class")."""
    model.eval()
    right = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, y in images.evaluation_batches(val, pixels, batch):
            right.append(model(x).argmax(1) == y)
    hits = torch.cat(right).double() * 100
    labels, sets = val.labels, torch.from_numpy(val.table[:, 0].copy())

    def mean(chosen: torch.Tensor) -> float | None:
        return round(hits[chosen].mean().item(), 2) if chosen.any() else None

    return {
        "top1": round(hits.mean().item(), 2),
        "sets": {name: mean(sets == index) for index, name in enumerate(val.collection.sets)},
        "per_class": {name: mean(labels == label) for label, name in enumerate(val.classes)},
    }


def mflops(model: nn.Module, pixels: int) -> float:
    """Millions of operations of a forward pass over one image, a multiplication and its addition counted as two.

    torch counts products and convolutions; a scan is 9 operations per token, channel and state, as VMamba's and Mamba's
    authors count it. Norms and activations are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from mamba_attn import trace
    from mamba_attn.tracing.layers import ScanLayer

    image = torch.zeros(1, 3, pixels, pixels)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    with torch.no_grad(), trace(model) as traced:
        model(image)
    scans = [layer.scan for layer in traced.layers if isinstance(layer, ScanLayer)]
    steps = sum(scan.routes * scan.length * scan.channels * scan.states for scan in scans)
    return round((counter.get_total_flops() + 9 * steps) / 1e6, 1)


def export(run: Trained, val: images.Images, recipe: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Write <out>/<name>.safetensors (float16 averaged weights) and <name>.json; returns the card.

    The accuracies of the card are those of the written file, read again.
    """
    from safetensors.torch import save_file

    args = run.args
    path = args.out / f"{args.name}.safetensors"
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in run.ema.module.state_dict().items()
    }
    partial = path.with_suffix(".partial")
    save_file(half, partial)
    partial.chmod(0o644)  # safetensors writes private files
    os.replace(partial, path)
    model = zoo.create(args.name, weights=str(path), **run.options)
    card = {
        "name": args.name,
        "options": run.options,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "mflops": mflops(model, args.pixels),
        **evaluate(model, val, args.pixels),
        "samples": samples(model, args.name, args.pixels, val.classes),
        "classes": val.classes,
        "validation": f"{len(val)} images, shorter side resized to {args.pixels} (bilinear), centre crop, "
        "ImageNet mean and standard deviation, bfloat16 autocast",
        "data": {name: {"license": LICENSES[name]} for name in val.collection.sets},
        "training_images": len(run.train),
        "pixels": args.pixels,
        "epochs": args.epochs,
        "steps": run.step,
        "seed": args.seed,
        "recipe": {**recipe, "lr": args.lr, "batch": run.batch, "mixup": args.mixup},
        "init": _initial_card(args.init),
        "cpu_seconds": round(run.cpu),
        "wall_seconds": round(run.wall),
        "threads": args.threads,
        "command": "python benchmarks/train.py " + shlex.join(_portable(command)),
        "versions": versions(),
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n")
    return card


@torch.no_grad()
def samples(model: nn.Module, name: str, pixels: int, classes: Sequence[str]) -> dict[str, Any]:
    """Top-1 in percent on the images of the package, and the class that the model gives each, in float32."""
    from mamba_attn import models
    from mamba_attn.images import samples as paths

    transform = models.transform(name, pixels)
    found = {path.name: classes[int(model(transform(path)[None]).argmax())] for path in paths()}
    right = sum(path.split("_")[1] == label for path, label in found.items())  # clothing_<class>_<number>.jpg
    return {"top1": round(100 * right / len(found), 2), "classes": found}


def _initial_card(init: str | None) -> dict[str, Any] | None:
    """Return the card of the initial weights, shortened: how they were trained."""
    if init is None:
        return None
    path = Path(init).with_suffix(".json")
    if not path.is_file():
        return {"file": Path(init).name}
    card = json.loads(path.read_text())
    keys = ("pixels", "epochs", "steps", "seed", "top1", "recipe", "cpu_seconds", "wall_seconds", "command", "weights")
    return {key: card[key] for key in (*keys, "init") if key in card}


def _portable(command: Sequence[str]) -> list[str]:
    """The command with folders reduced to their last name: a card says nothing about this machine."""
    return [Path(word).name if "/" in word else word for word in command]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import numpy
    import timm

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }
