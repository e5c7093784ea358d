"""The cost of a map: seconds and peak bytes of memory per image."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

RUNS = 2  # timed, after one that loads and compiles


@dataclass(frozen=True)
class Cost:
    """The cost of one call.

    Args:
        seconds: wall time, the fastest of a few runs.
        peak_bytes: peak memory of tensors, in addition to what was allocated before.

    Example:
        >>> Cost(seconds=0.25, peak_bytes=2**20).peak_bytes
        1048576
    """

    seconds: float
    peak_bytes: int


def cost(call: Callable[[], object], device: torch.device) -> Cost:
    """Measure a call.

    Args:
        call: the function to measure; it is called four times.
        device: where it runs.

    Example:
        >>> found = cost(lambda: torch.rand(256, 256), torch.device("cpu"))
        >>> found.peak_bytes >= 4 * 256 * 256
        True
    """
    call()
    seconds = min(_timed(call, device) for _ in range(RUNS))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return Cost(seconds, torch.cuda.max_memory_allocated(device) - before)
    return Cost(seconds, _peak(call))


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(call: Callable[[], object]) -> int:
    """Return the peak from the allocator's record, which includes tensors that are freed at once."""
    with (
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    results = profile.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the profiler's library writes to stderr when it starts and stops."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
