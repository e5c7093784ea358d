"""What it costs to trace other people's code at doors: a pass, the look ahead, and measuring the tokens' orders once.

The models are the repositories' own, from clones that ``--checkouts`` names, and timm's ViT; all at 224 pixels, one
image, and as large as they are published.
"""

import argparse
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamba_attn
from benchmarks.foreign import official_pairs
from benchmarks.kernel.timing import cpu_seconds
from benchmarks.measure import Spread, interleave, paired
from benchmarks.report import Figure, figure
from mamba_attn.tracing import adapters, standing, steps
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.reachable import compiled_scans
from mamba_attn.tracing.replay import Replay
from mamba_attn.tracing.selective_scans import ScanCall
from mamba_attn.tracing.softmax_calls import SoftmaxCall
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

    Beside it a pass under which nothing happens but that a list holds what a trace keeps: what of it is memory, which
    the allocator cannot hand out again.

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

    def holding() -> Tensor:
        with torch.no_grad(), held_inputs():
            output: Tensor = model(images)
        return output

    calls = {"plain": plain, "traced": traced, "holding": holding}
    with torch.no_grad(), mamba_attn.trace(model) as record:
        seen = model(images)
    if not torch.equal(seen, plain()) or not torch.equal(traced(), seen):
        raise RuntimeError(f"{name}: a trace changed the output.")
    layers = record.layers
    if not all(isinstance(layer, DoorLayer | DoorAttention) for layer in layers):
        raise RuntimeError(f"{name}: its layers were not seen at doors.")
    count = len(layers)
    tensors = [t for call in record._doors.watch.calls for t in _kept(call)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    del record, seen, layers, tensors
    times = interleave(calls, rounds)
    found, alone = (paired(times[what], times["plain"]) for what in ("traced", "holding"))
    details = {
        "layers": count,
        "kept bytes": sum(storages.values()),
        "holding alone": alone,
        "traced over holding": paired(times["traced"], times["holding"]),
        "page faults": {what: _page_faults(call) for what, call in calls.items()},
        "milliseconds": {what: Spread.of([1e3 * t for t in sample]) for what, sample in times.items()},
    }
    print(
        f"{name}: a traced pass takes {found.median:.3f} of its own; one whose scans' inputs a list holds, and nothing "
        f"else, {alone.median:.3f}: {details['kept bytes'] / 2**20:.0f} MiB, page faults {details['page faults']}."
    )
    return [figure("doors overhead", name, found)], details


@contextmanager
def held_inputs() -> Iterator[None]:
    """Hold what enters scans and attention in a list until the end, as a trace must; do nothing else."""
    kept: list[Any] = []

    def holding(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            kept.append((args, kwargs))
            return found

        return call

    with ExitStack() as stack:
        for scan in compiled_scans():
            if "fwd" in vars(scan):
                stack.enter_context(patch.object(scan, "fwd", holding(scan.fwd)))
        own = F.scaled_dot_product_attention
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", holding(own)))
        yield


def _kept(call: ScanCall | SoftmaxCall) -> list[Tensor]:
    """The tensors that a call at a door keeps alive."""
    return call.given if isinstance(call, SoftmaxCall) else [t for t in call.inputs if isinstance(t, Tensor)]


def _page_faults(call: Callable[[], object]) -> int:
    """Pages of 4 KiB that a call got from the system: memory that its process did not have yet."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


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
