"""``benchmarks/run.py kernel``: its arguments, and the loop over the grid.

Without options: on a GPU Vim and VMamba tiny to base and DeiT tiny and small at 224, 512 and 1024 pixels, batch 1, 8
and 64, float32 and bfloat16; on a CPU three tiny models at 224 pixels, batch 1, float32, on one thread, in CPU time.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernel import ceilings, machine, measuring, subjects, table, targets, verify
from benchmarks.kernel.rows import Row
from benchmarks.kernel.subjects import Configuration, Model
from mamba_attn import models
from mamba_attn.errors import nearest

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

_DTYPES = ("float32", "bfloat16")
_TINY = ("vim_tiny", "vmamba_tiny_s1l8", "deit_tiny_patch16_224")  # what a CPU measures
_GPU_TIME = (
    "between CUDA events, cold L2 cache; forward: from an idle GPU, so slow launches count; attention and scan: kernels"
)
_SMALLEST = 32  # pixels: what patches of 16 and four stages leave tokens of


@dataclass(frozen=True)
class Job:
    """What one call measures.

    Args:
        device: where.
        grid: cheap ones first.
        budget: seconds for a row.
        quick: one or two rounds of small sizes: does everything run?
        tf32: whether TF32 is allowed.
    """

    device: torch.device
    grid: list[Configuration]
    budget: float
    quick: bool
    tf32: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``job`` reads, but ``--quick``."""
    add = parser.add_argument
    add("--models", nargs="+", action="extend", metavar="NAME", help="of mamba_attn.models, or DeiT's names in timm")
    add("--pixels", nargs="+", action="extend", type=int, metavar="SIDE", help="multiples of 32")
    add("--batch", nargs="+", action="extend", type=int, metavar="IMAGES")
    add("--dtype", nargs="+", action="extend", choices=_DTYPES)
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--budget", type=float, default=60.0, metavar="SECONDS", help="for a row; default: 60")
    add("--tf32", action="store_true", help="allow TF32 in products and convolutions of float32")


def job(args: argparse.Namespace) -> Job:
    """Check the arguments.

    Raises:
        ValueError: an unknown model, a size that does not fit, a device that is not there.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu.")
    small = device == "cpu" or args.quick
    names = args.models or (_TINY if small else [*subjects.MODELS, *subjects.TRANSFORMERS])
    known = [*(name for name in models.names() if not name.startswith("vit")), *subjects.TRANSFORMERS]
    for name in names:
        if name not in known:
            raise ValueError(f"--models {name}: no such model. {nearest(name, known)}")
    pixels = args.pixels or ([64] if args.quick else [224] if small else [224, 512, 1024])
    batches = args.batch or ([1] if small else [1, 8, 64])
    for option, values, step in (("--pixels", pixels, _SMALLEST), ("--batch", batches, 1)):
        for value in values:
            if value < 1 or value % step:
                what = "a positive number" if step == 1 else f"a positive multiple of {step}"
                raise ValueError(f"{option} {value}: expected {what}.")
    if not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g}: expected seconds, more than 0.")
    dtypes = args.dtype or (["float32"] if small else list(_DTYPES))
    grid = subjects.grid(*(list(dict.fromkeys(values)) for values in (names, pixels, batches, dtypes)))
    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    return Job(where, grid, args.budget, args.quick, args.tf32)


def partial(args: argparse.Namespace) -> bool:
    """Return whether arguments leave out something of the default run, so that it does not replace such a result."""
    changed = (args.models, args.pixels, args.batch, args.dtype)
    return bool(args.quick or args.tf32 or any(value is not None for value in changed))


def measure(its: Job, path: Path | None, folder: Path | None) -> None:
    """Measure the grid, show the table, write the JSON file after every configuration and the pictures at the end.

    Args:
        its: what to measure.
        path: of the JSON file; None writes none.
        folder: of the pictures; None draws none.
    """
    rows: list[Row] = []
    with _one_thread(its.device), ceilings.tf32(its.tf32):
        roof = ceilings.measure(its.device, rounds=2 if its.quick else 7, quick=its.quick)
        errors = verify.backend_errors(its.device, dict.fromkeys(each.dtype for each in its.grid))
        rounds = 2 if its.quick else measuring.ROUNDS
        bench = measuring.Bench(its.device, roof, its.budget, rounds, verify.refusals(errors))
        header, found = machine.machine(its.device), targets.Run(its.device, rows, errors, its.tf32)
        model: Model | None = None
        for done, each in enumerate(its.grid):
            print(f"measuring {each} ({done + 1} of {len(its.grid)})", file=sys.stderr, flush=True)
            model = model if model is not None and model.fits(each) else Model(each, its.device)
            rows += measuring.measure(model, each.batch, bench)
            if path is not None:
                details = _details(its, errors, done + 1)
                table.write(path, table.contents(rows, targets.figures(found), roof, header, its.quick, details))
    table.show_rows(rows, targets.figures(found), roof)
    name = header["gpu"]["name"] if "gpu" in header else header["cpu"]
    if folder is not None:
        _draw(folder, table.roofline(rows, roof, f"Hidden attention on {name}"))


def _details(its: Job, errors: dict[tuple[str, str], float], done: int) -> dict[str, Any]:
    return {
        "device": its.device.type,
        "time": _GPU_TIME if its.device.type == "cuda" else "CPU seconds of one thread",
        "tf32": its.tf32,
        "budget": its.budget,
        "configurations": f"{done} of {len(its.grid)}",
        "errors": {f"{name}, {dtype}": str(error) for (name, dtype), error in errors.items()},
    }


def _draw(folder: Path, drawn: "tuple[go.Figure, np.ndarray] | None") -> None:
    """roofline.html, which needs no network, and roofline.png."""
    from mamba_attn.figures.png import save_png

    if drawn is not None:
        figure, rgb = drawn
        figure.write_html(folder / "roofline.html", include_plotlyjs=True)
        save_png(folder / "roofline.png", rgb)


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread, so that its CPU time is also how long one waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
