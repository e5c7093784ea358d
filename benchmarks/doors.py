"""What it costs to trace other people's code at doors: a pass, the look ahead, and measuring the tokens' orders once.

The models are the repositories' own, from clones that ``--checkouts`` names, and timm's ViT; all at 224 pixels, one
image, and as large as they are published.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import mamba_attn
from benchmarks.foreign import official_pairs
from benchmarks.kernel.timing import cpu_seconds
from benchmarks.measure import Spread, interleave, paired
from benchmarks.report import Figure, figure
from mamba_attn.tracing import adapters, standing, steps
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.replay import Replay
from mamba_attn.tracing.softmax_layers import DoorAttention

REPOSITORIES = {"vmamba_tiny_s1l8": "MzeroMiko/VMamba", "vim_tiny": "hustvl/Vim"}
ROUNDS = 15
PIXELS = 224


def add_options(parser: argparse.ArgumentParser) -> None:
    """What ``run.py doors`` can be told."""
    parser.add_argument(
        "--checkouts", type=Path, required=True, help="folder of clones of VMamba and Vim, under these names"
    )


def partial(args: argparse.Namespace) -> bool:
    """Never."""
    return False


def run_doors(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about the cost of doors."""
    pixels, rounds = (64, 2) if args.quick else (PIXELS, ROUNDS)
    images = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    figures: list[Figure] = []
    details: dict[str, Any] = {"pixels": pixels}
    for name, model in _models(args.checkouts, pixels):
        details[name] = {}
        with _without_adapters():
            found, details[name]["pass"] = overhead(name, model, images, rounds)
            figures += found
            if name == "vmamba_tiny_s1l8":
                found, details[name]["orders"] = measure_orders(name, model, images)
                figures += found
        if name in REPOSITORIES:
            found, details[name]["look ahead"] = look_ahead(name, model, images, rounds)
            figures += found
    return figures, details


def overhead(name: str, model: nn.Module, images: Tensor, rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """A pass that is traced at doors, no attention asked for, against the model's own.

    Raises:
        RuntimeError: the traced pass changes the output, or was not seen at doors.
    """

    def plain() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(images)
        return output

    def traced() -> Tensor:
        with torch.no_grad(), mamba_attn.trace(model):
            output: Tensor = model(images)
        return output

    with torch.no_grad(), mamba_attn.trace(model) as record:
        seen = model(images)
    if not torch.equal(seen, plain()) or not torch.equal(traced(), seen):
        raise RuntimeError(f"{name}: a trace changed the output.")
    layers = record.layers
    if not all(isinstance(layer, DoorLayer | DoorAttention) for layer in layers):
        raise RuntimeError(f"{name}: its layers were not seen at doors.")
    del record, seen
    times = interleave({"plain": plain, "traced": traced}, rounds)
    details = {
        "layers": len(layers),
        "milliseconds": {what: Spread.of([1e3 * t for t in sample]) for what, sample in times.items()},
    }
    return [figure("doors overhead", name, paired(times["traced"], times["plain"]))], details


def measure_orders(name: str, model: nn.Module, images: Tensor) -> tuple[list[Figure], dict[str, Any]]:
    """The orders of a model's tokens, measured once, and found again."""
    with torch.no_grad(), mamba_attn.trace(model) as record:
        model(images)
    layers = record.layers
    seconds = {"measured": cpu_seconds(lambda: layers[0].tokens)}
    with torch.no_grad(), mamba_attn.trace(model) as again:
        model(images)
    later = again.layers
    seconds["remembered"] = cpu_seconds(lambda: later[0].tokens)
    (remembered,) = steps._remembered[model].values()
    return [figure("doors orders", name, seconds["measured"])], {
        "seconds": seconds,
        "backwards": remembered[1].backwards,
    }


def look_ahead(name: str, model: nn.Module, images: Tensor, rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """The look at a model whose adapter declares its orders, against its forward pass."""
    found = adapters.find_mixers(model)
    mixers = {name: module for name, (module, _) in found.items()}
    replay = Replay.of((images,), {})

    def look() -> standing.Standing:
        standing._remembered.pop(model, None)
        return standing.standing(model, replay, mixers)

    def plain() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(images)
        return output

    placed = len(look().orders)
    times = interleave({"plain": plain, "look": look}, min(rounds, 5))
    details = {
        "mixers": len(mixers),
        "placed": placed,
        "milliseconds": {what: Spread.of([1e3 * t for t in sample]) for what, sample in times.items()},
    }
    return [figure("doors look", name, paired(times["look"], times["plain"]))], details


def _models(checkouts: Path, pixels: int) -> Iterator[tuple[str, nn.Module]]:
    for repository in REPOSITORIES.values():
        folder = checkouts / repository.rpartition("/")[2]
        if not folder.is_dir():
            raise SystemExit(f"--checkouts {checkouts}: no clone of {repository}.")
        for name, model in official_pairs(repository, folder):
            yield name, model.eval()
    import timm

    yield "vit_small_patch16_224", timm.create_model("vit_small_patch16_224", img_size=pixels).eval()


@contextmanager
def _without_adapters() -> Iterator[None]:
    """As if nobody had written an adapter."""
    nothing: Callable[..., dict[str, Any]] = lambda *_: {}  # noqa: E731
    with patch("mamba_attn.tracing.traceable.find_mixers", nothing):
        yield
