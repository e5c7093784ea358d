"""How a call is timed: in turn with its competitors, by CPU time on a CPU, by CUDA events on a GPU."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # seconds per call, from a call and its repeats

_AHEAD = 20  # flushes of 30 us or more each: longer than Python takes to launch one operator


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


def cpu_seconds(call: Call, repeats: int = 1) -> float:
    """CPU seconds of all threads of this process, per call."""
    gc.collect()
    started = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - started) / repeats


def cuda_clock(device: torch.device, kernels: bool) -> Clock:
    """Return a clock that measures between CUDA events, with a cold L2 cache before every call.

    Args:
        device: a CUDA device.
        kernels: whether the GPU is kept busy while the call is launched, so that its kernels alone are timed. Else the
            GPU is idle before, and a call is timed as a user meets it: where Python is the slower one, that counts.
    """
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
    buffer = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def clock(call: Call, repeats: int = 1) -> float:
        milliseconds = 0.0
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(_AHEAD if kernels else 1):
                buffer.zero_()
            if not kernels:
                torch.cuda.synchronize(device)
            start.record(torch.cuda.current_stream(device))
            call()
            stop.record(torch.cuda.current_stream(device))
            stop.synchronize()
            milliseconds += start.elapsed_time(stop)
        return milliseconds / 1e3 / repeats

    return clock


def clock_for(device: torch.device, kernels: bool = True) -> Clock:
    """Return the clock of a device.

    Args:
        device: a CPU or a CUDA device.
        kernels: as in ``cuda_clock``; a CPU knows no difference.
    """
    return cuda_clock(device, kernels) if device.type == "cuda" else cpu_seconds


def interleave(
    calls: Mapping[str, Call],
    rounds: int | Mapping[str, int],
    least_seconds: float = 0.02,
    once: Sequence[str] = (),
    clock: Clock | Mapping[str, Clock] = cpu_seconds,
    known: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Time calls in turn, A B A B, in this process: whatever slows the machine for a while slows all of them.

    Args:
        calls: by name.
        rounds: how often each is timed, after one untimed call; by name where they differ.
        least_seconds: a call shorter than this is repeated within its turn.
        once: names of slow calls that are timed in the first round only, without an untimed call before.
        clock: seconds per call; by name where they differ. Default: CPU time.
        known: seconds of calls that ran before, by name; they get no untimed call here.

    Returns:
        For every name seconds per call, one per round.
    """
    turns = {name: 1 if name in once else rounds if isinstance(rounds, int) else rounds[name] for name in calls}
    clocks = {name: clock[name] if isinstance(clock, Mapping) else clock for name in calls}
    ready, repeats = dict(known or {}), dict.fromkeys(calls, 1)
    for name, call in calls.items():
        if name not in once:
            if name not in ready:
                call()
                ready[name] = clocks[name](call, 1)
            repeats[name] = max(1, math.ceil(least_seconds / max(ready[name], 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(turns.values(), default=0)):
        for name, call in calls.items():
            if turn < turns[name]:
                times[name].append(clocks[name](call, repeats[name]))
    return times


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Ratio of two interleaved calls, round by round; a call timed once is divided by, or divides, every round."""
    rounds = max(len(numerator), len(denominator))
    top, bottom = (list(times) * rounds if len(times) == 1 else list(times) for times in (numerator, denominator))
    return Spread.of([a / b for a, b in zip(top, bottom[: len(top)], strict=False)][:rounds])
