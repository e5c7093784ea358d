"""How it is measured: interleaved CPU times, paired ratios, peak memory in a child process, the machine's name."""

import gc
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise a sample; a single value is its own quartiles."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, least_seconds: float = 0.02, once: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Time calls in turn, A B A B, in this process: whatever slows the machine for a while slows all of them.

    Args:
        calls: by name.
        rounds: how often each is timed, after one untimed call.
        least_seconds: a call shorter than this is repeated within its turn.
        once: names of slow calls that are timed in the first round only, without an untimed call before.

    Returns:
        For every name CPU seconds per call, one per round.
    """
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        if name not in once:
            call()
            repeats[name] = max(1, math.ceil(least_seconds / max(_cpu_seconds(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn == 0 or name not in once:
                times[name].append(_cpu_seconds(call, repeats[name]))
    return times


def _cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds of all threads of this process, per call."""
    gc.collect()
    started = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - started) / repeats


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Ratio of two interleaved calls, round by round; a call timed once is divided by, or divides, every round."""
    rounds = max(len(numerator), len(denominator))
    top, bottom = (list(times) * rounds if len(times) == 1 else list(times) for times in (numerator, denominator))
    return Spread.of([a / b for a, b in zip(top, bottom[: len(top)], strict=False)][:rounds])


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


def machine() -> dict[str, Any]:
    """The header of every result: processor, versions, date and commit."""
    import numpy

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted changes": bool(_git("status", "--porcelain", "--", "mamba_attn", "benchmarks/*.py")),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*words: str) -> str | None:
    """What git says, or None without git or commits."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    print(_child(*sys.argv[1:]))
