"""How it is measured: wall seconds of commands, slopes, peak memory in a child process; the rest is the package's."""

import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel.machine import machine
from benchmarks.kernel.timing import Spread, interleave, paired

__all__ = ["Spread", "interleave", "machine", "paired", "peak_memory", "slope", "wall_seconds"]

ROOT = Path(__file__).resolve().parents[1]


def wall_seconds(command: Sequence[str], runs: int) -> list[float]:
    """Wall seconds of a command as a user runs it, with all the threads it likes; the first run finds nothing compiled.

    Args:
        command: its words; ``{folder}`` stands for a new folder in every run.
        runs: how many.

    Raises:
        RuntimeError: the command failed; its last words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"PYTHONPATH": str(ROOT), "MAMBA_ATTN_CACHE": cache}
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as folder:
                words = [word.format(folder=folder) for word in command]
                started = time.perf_counter()
                child = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
                seconds.append(time.perf_counter() - started)
            if child.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {child.stderr.strip()[-800:]}")
    return seconds


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y against log x by least squares."""
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def peak_memory(function: str, **arguments: Any) -> int:
    """Bytes by which running a call raises the resident memory of a fresh process, at its highest.

    Args:
        function: "module:name"; called with ``arguments`` it returns the call. What this allocates (inputs, weights,
            loaded code) does not count.
        arguments: JSON values.

    Raises:
        RuntimeError: the child failed; its last words.
        OSError: there is no /proc (not Linux).
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # every large block is its own mapping, returned when freed: nothing hides in the allocator's reserve
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "benchmarks.measure", function, json.dumps(arguments)]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"peak_memory({function!r}, {arguments}) failed: {child.stderr.strip()[-800:]}")
    return int(child.stdout.split()[-1])


def _child(function: str, arguments: str) -> int:
    """What the child process of ``peak_memory`` does."""
    torch.set_num_threads(1)
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    print(_child(*sys.argv[1:]))
