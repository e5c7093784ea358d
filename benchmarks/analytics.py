"""`mamba-attn collect`: memory against the number of images, time, and its means against explicit ones."""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import peak_memory, wall_seconds
from benchmarks.report import Figure, figure
from mamba_attn import images, trace
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.analytics.collecting import batch_size
from mamba_attn.datasets import open_data
from mamba_attn.datasets.loading import load

MODELS = ("vim_micro", "vmamba_micro")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for images and models."""
    parser.add_argument("--data", required=True, metavar="DIR|ZIP[:PART]", help="at least 1,000 images")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave something out of the full run."""
    return tuple(args.models) != MODELS


def collecting(name: str, data: str, limit: int) -> Callable[[], None]:
    """A call that collects images with a micro model into a folder that is then removed."""
    request = Request(load(name, "demo"), open_data(data), limit)

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(request, Path(folder) / "store")

    return call


def mean_error(name: str, data: str, limit: int, size: int | None = None) -> float:
    """Largest difference between a store's means and those of explicit matrices, relative to the mean's largest entry.

    Args:
        name: of the model.
        data: of the images.
        limit: of them.
        size: of the batches of the explicit matrices; a forward pass itself differs by float32's rounding between
            batches of other sizes. Default: the store's.
    """
    request = Request(load(name, "demo"), open_data(data), limit)
    with tempfile.TemporaryDirectory() as folder:
        collect(request, Path(folder) / "store")
        store = AttentionStore.open(Path(folder) / "store")
        sums: dict[tuple[str, str | int], np.ndarray] = {}
        for batch in batched(request.wanted, size or batch_size(store.layers)):
            pixels = [request.data.load(number, request.subject.transform).pixels for number in batch]
            with torch.no_grad(), trace(request.subject.model) as found:
                request.subject.model(images.normalise(np.stack(pixels)))
                for layer in store.layers:
                    for route in ("sum", *(range(layer.routes) if layer.routes > 1 else ())):
                        options = {} if route == "sum" else {"routes": route}
                        matrices = found[layer.name].attention(**options).double().sum(0).numpy()
                        sums[layer.name, route] = sums.get((layer.name, route), 0) + matrices
        errors = []
        for (layer_name, route), total in sums.items():
            exact = total / len(request.wanted)
            errors.append(float(np.abs(store.mean(layer_name, route) - exact).max() / np.abs(exact).max()))
    return max(errors)


def batched(numbers: list[int], size: int) -> list[list[int]]:
    """Yield numbers in groups of ``size``."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def run_collect(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about collect."""
    few, many, compared = (4, 12, 3) if args.quick else (100, 1000, 50)
    figures, details = [], {}
    data = str(Path(args.data).expanduser().resolve()) if Path(args.data).exists() else args.data
    for name in args.models:
        memory = [peak_memory("benchmarks.analytics:collecting", name=name, data=data, limit=n) for n in (few, many)]
        command = [
            sys.executable,
            "-m",
            "mamba_attn.commands.cli",
            "collect",
            "--model",
            name,
            "--data",
            data,
            "--limit",
            str(many),
            "--out",
            "{folder}/store",
        ]
        seconds = wall_seconds(command, 1)[0]
        error, alone = mean_error(name, data, compared), mean_error(name, data, compared, size=1)
        figures += [
            figure("collect memory", name, memory[1] / memory[0]),
            figure("collect time", name, seconds),
            figure("collect mean", name, error),
        ]
        details[name] = {
            "images": (few, many),
            "peak_bytes": memory,
            "seconds": seconds,
            "error": error,
            "error_one_by_one": alone,
        }
    return figures, details
