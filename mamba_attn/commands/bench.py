"""``mamba-attn bench``: the cost that tracing and attention add to a model's forward here, next to DeiT-tiny."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from mamba_attn.commands.options import Commands, add_device, command, require_least
from mamba_attn.commands.terminal import show
from mamba_attn.core.requirements import require_extras

if TYPE_CHECKING:
    from torch import Tensor, nn

_DEIT = "deit_tiny_patch16_224"
_HEADER = ("model", "forward", "traced", "with attention", "layers", "forward / DeiT", "attention added / DeiT")
_EXAMPLES = """\

--model vmamba_micro vim_micro --batch 8
--model net.py:build timm:vit_small_patch16_224
--device cuda"""
_NOTES = """\
Milliseconds for one batch of noise at each model's own image size, with
random weights: its forward pass, the same inside mamba_attn.trace, and the
same with the attention matrices of all layers; next to timm's
deit_tiny_patch16_224. Models take turns and medians are shown. On a CPU it is
CPU time of one thread.
"""


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands, "bench", "time tracing and attention on this machine", examples=_EXAMPLES, notes=_NOTES, run=run
    )
    add = parser.add_argument
    models = ["vim_tiny", "vmamba_tiny_s1l8"]
    add("--model", nargs="+", default=models, metavar="SPEC", help=f"as for explain; default: {' '.join(models)}")
    add("--batch", type=int, default=1, metavar="N", help="images at once; default: 1")
    add("--rounds", type=int, default=5, metavar="N", help="timings of each; default: 5")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Time the models in turn, and print a table."""
    require_extras({"timm": "timm", "rich": "rich"})
    import torch

    from mamba_attn import models
    from mamba_attn.datasets.loading import complete, load, require_device
    from mamba_attn.models import registry
    from mamba_attn.tracing.tracer import trace

    require_least(args, batch=1, rounds=1)
    require_device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(1)  # with one thread, CPU time equals wall time on an idle machine
    import timm

    sizes: dict[str, tuple[int, int]] = {}
    built: dict[str, nn.Module] = {}
    for name in dict.fromkeys(args.model):
        random = name in (*models.names(), *registry.aliases())  # the weights are not what is timed
        weights = "random" if random or name.startswith("timm:") else None
        loaded = complete(load(name, weights, device=args.device))  # refuses what reads text
        built[name], sizes[name] = loaded.model, loaded.transform.size
    built[_DEIT], sizes[_DEIT] = timm.create_model(_DEIT), (224, 224)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    layers = {}
    for name, model in built.items():
        model.eval().to(args.device)
        images = torch.randn(args.batch, 3, *sizes[name], device=args.device)
        calls[name, "forward"] = partial(model, images)
        calls[name, "traced"] = partial(_traced, model, images, attention=False)
        calls[name, "attention"] = partial(_traced, model, images, attention=True)
        with torch.no_grad(), trace(model) as found:
            model(images)
        layers[name] = len(found.layers)
    with torch.no_grad():
        seconds = _medians(calls, args.rounds, args.device)
    unit = seconds[_DEIT, "forward"]
    rows = []
    for name in built:
        forward, traced, attention = (seconds[name, what] for what in ("forward", "traced", "attention"))
        times = (f"{1e3 * each:.1f} ms" for each in (forward, traced, attention))
        rows.append((name, *times, str(layers[name]), f"{forward / unit:.2f}", f"{(attention - forward) / unit:.2f}"))
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU time of one thread"
    show(f"batch {args.batch}, {where}, torch {torch.__version__}", _HEADER, rows)
    return 0


def _traced(model: "nn.Module", images: "Tensor", attention: bool) -> object:
    from mamba_attn.tracing.tracer import trace

    with trace(model, attention="mean" if attention else None) as found:
        logits = model(images)
    return logits, [layer.attention() for layer in found.layers] if attention else None


def _medians(
    calls: Mapping[tuple[str, str], Callable[[], object]], rounds: int, device: str
) -> dict[tuple[str, str], float]:
    """Median seconds of calls that take turns, after one untimed round."""
    import torch

    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key, call in calls.items():
            started = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[key].append(clock() - started)
    return {key: statistics.median(each) for key, each in times.items()}
