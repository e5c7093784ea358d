"""What more threads gain on a CPU, and what a prebuilt kernel saves at its first call; wall seconds."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.measure import ROOT, Spread, paired
from benchmarks.report import Figure, figure
from mamba_attn.ops.cpu import compiling

_THREADS = (1, 2, 4)  # more than there are cores: must not cost either
_ROUNDS = {1: 11, 4: 7, 16: 3}  # by images
_FIRST_CALL = """
import sys, time
from pathlib import Path
import torch
from mamba_attn import ops
from mamba_attn.ops.cpu import build

build._PREBUILT = Path(sys.argv[1])
call = torch.rand(1, 8, 20), -torch.rand(8, 4), torch.randn(1, 4, 20), torch.randn(1, 4, 20)
ops.hidden_attention(*call, backend="blocked")
started = time.perf_counter()
ops.hidden_attention(*call, backend="native")
print(build.library_origin(), time.perf_counter() - started)
"""


def run_threads(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Attention of all layers by models, images and threads, in turn; then first calls in processes of their own."""
    figures: list[Figure] = []
    details: dict[str, Any] = {"cores": os.cpu_count()}
    for name in cases.MODELS:
        for images, rounds in ({1: 2} if quick else _ROUNDS).items():
            call = cases.matrices(name, images, 64 if quick else 224)
            times = _in_turn(call, rounds)
            figures.append(figure("two threads", f"{name}, batch {images}", paired(times[2], times[1])))
            details[f"{name}, batch {images}"] = {
                f"{threads} threads": {
                    "milliseconds": Spread.of([1e3 * seconds for seconds in times[threads]]),
                    "/ 1 thread": paired(times[threads], times[1]),
                }
                for threads in _THREADS
            }
    with tempfile.TemporaryDirectory() as work:
        kernels = Path(work, "kernels")
        compiling.prebuild(Path(compiling.__file__).parent, kernels)
        found = [(_first_call(kernels), _first_call(Path(work, "none"))) for _ in range(1 if quick else 2)]
    prebuilt, compiled = zip(*found, strict=True)
    figures.append(figure("first call", "", paired(prebuilt, compiled)))
    details["first call"] = {"prebuilt": Spread.of(prebuilt), "compiled": Spread.of(compiled)}
    return figures, details


def _in_turn(call: cases.Call, rounds: int) -> dict[int, list[float]]:
    """Wall seconds of every round, by threads: A B C A B C."""
    times: dict[int, list[float]] = {threads: [] for threads in _THREADS}
    before = torch.get_num_threads()
    try:
        for each in range(rounds + 1):
            for threads, sample in times.items():
                torch.set_num_threads(threads)
                started = time.perf_counter()
                call()
                if each:  # the first round starts threads and fills caches
                    sample.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return times


def _first_call(kernels: Path) -> float:
    """Seconds of the kernel's first call in a new process with an empty cache; everything else has run once.

    Args:
        kernels: folder of prebuilt ones; without it the kernel is compiled.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MAMBA_ATTN_CACHE": cache}
        command = [sys.executable, "-c", _FIRST_CALL, str(kernels)]
        said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    origin, seconds = said.rsplit(maxsplit=1)
    if origin.startswith("prebuilt") != kernels.is_dir():
        raise RuntimeError(f"_first_call({str(kernels)!r}): the kernel was {origin}.")
    return float(seconds)
