"""One configuration: leave out what cannot fit, time the rest in turn, and make rows of it."""

import contextlib
import gc
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.kernel import estimates
from benchmarks.kernel.calls import subjects
from benchmarks.kernel.ceilings import Ceilings
from benchmarks.kernel.guarded import Guarded, sentence
from benchmarks.kernel.rows import Row, ShapeTime, cheapest, floor_of
from benchmarks.kernel.subjects import Model, Subject, Unavailable
from benchmarks.kernel.timing import Call, Clock, Spread, clock_for, interleave
from mamba_attn.ops.dispatch import free_bytes

ROUNDS = 15
SHARE = 2.0  # seconds of rounds that a call gets, unless ROUNDS are done before


@dataclass
class Bench:
    """What all configurations share.

    Args:
        device: where everything runs.
        ceilings: of the device.
        budget: seconds that one row may take.
        rounds: how often each call is timed, at most.
        errors: why backends are not timed, by (name, dtype).
        pace: the slowest that each kind of row was, over its floor.
    """

    device: torch.device
    ceilings: Ceilings
    budget: float = 60.0
    rounds: int = ROUNDS
    errors: Mapping[tuple[str, str], str] = field(default_factory=dict)
    pace: dict[tuple[str, str], float] = field(default_factory=dict)

    def least(self, subject: Subject) -> float:
        """Seconds below which no such row can come."""
        return self.ceilings.floor(subject.least, "factored")

    def expected(self, subject: Subject) -> float:
        """Seconds a call is expected to take: its floor, times the slowest pace seen so far."""
        return self.least(subject) * self.pace.get((subject.what, subject.how), 1.0)

    def learn(self, subject: Subject, seconds: float) -> None:
        """Remember the pace of a row."""
        key, least = (subject.what, subject.how), self.least(subject)
        if least > 0:
            self.pace[key] = max(self.pace.get(key, 1.0), seconds / least)


@dataclass
class Trial:
    """A subject on its way to a row.

    Args:
        subject: what is timed.
        clock: how.
        reason: why not, once that is known.
        calls: one per part.
        warm: seconds of a call of each part, once everything is loaded.
        times: seconds of every round of each part.
    """

    subject: Subject
    clock: Clock
    reason: str = ""
    calls: list[Guarded] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)

    def totals(self) -> list[float]:
        """Seconds of all layers, round by round."""
        weights = [part.times for part in self.subject.parts]
        rounds = zip(*self.times, strict=False)
        return [sum(w * t for w, t in zip(weights, times, strict=True)) for times in rounds]

    def rounds(self, bench: Bench) -> int:
        """How often it is timed: often where it is fast, never longer than the budget."""
        seconds = max(sum(self.warm), 1e-9)
        return max(1, min(bench.rounds, max(3, int(SHARE / seconds)), int(bench.budget / seconds)))

    def stop(self) -> None:
        """Take over the reason of a call that failed."""
        self.reason = self.reason or next((call.problem for call in self.calls if call.problem), "")
        if self.reason:
            self.calls.clear()


def measure(model: Model, batch: int, bench: Bench) -> list[Row]:
    """Return the rows of a configuration, measured or not.

    Args:
        model: the model at its size and type.
        batch: number of images.
        bench: what all configurations share.
    """
    kernels, whole = (clock_for(model.device, kernels=each) for each in (True, False))
    trials = [
        Trial(subject, whole if subject.what.startswith("forward") else kernels) for subject in subjects(model, batch)
    ]
    with _frozen():
        for trial in trials:
            _prepare(trial, model, bench)
            _release(model.device)
        _in_turn([trial for trial in trials if not trial.reason], bench)
    rows = [_row(trial, model, batch, bench) for trial in trials]
    rows.insert(2, _added(trials[0], trials[1], model, batch, bench))
    for trial in trials:
        trial.calls.clear()
    _release(model.device)
    return rows


def skip(subject: Subject, bench: Bench) -> str:
    """Return why a subject is not even tried, or an empty string.

    Args:
        subject: what would be timed.
        bench: its budget, ceilings and device.
    """
    free = free_bytes(bench.device)
    if free is not None and subject.memory > free:
        return f"would need {estimates.shown(subject.memory)}, {estimates.shown(free)} are free"
    seconds = bench.expected(subject)
    if 2 * seconds > bench.budget:  # once to warm up, once timed
        return f"over the time budget of {bench.budget:g} s; a call would take {seconds:.2g} s or more"
    return ""


def _prepare(trial: Trial, model: Model, bench: Bench) -> None:
    """Build the calls and run each, or say why not."""
    subject = trial.subject
    trial.reason = skip(subject, bench) or bench.errors.get((subject.how, model.its.dtype), "")
    if trial.reason:
        return
    try:
        for part in subject.parts:
            call = Guarded(part.make())
            trial.calls.append(call)
            seconds = trial.clock(call, 1)
            if 4 * seconds < bench.budget:
                seconds = trial.clock(call, 1)  # the first one loads and compiles
            trial.warm.append(seconds)
            if call.problem:
                break
    except (Unavailable, ImportError) as error:
        trial.reason = str(error).rstrip(".")
    except (RuntimeError, MemoryError) as error:
        trial.reason = sentence(error)
    trial.stop()
    if not trial.reason:
        bench.learn(subject, sum(trial.warm))


def _in_turn(trials: list[Trial], bench: Bench) -> None:
    """Time all parts of all trials in turn."""
    parts = [(f"{i}.{j}", trial, j) for i, trial in enumerate(trials) for j in range(len(trial.calls))]
    calls: dict[str, Call] = {name: trial.calls[j] for name, trial, j in parts}
    known = {name: trial.warm[j] for name, trial, j in parts}
    rounds = {name: trial.rounds(bench) for name, trial, _ in parts}
    least = 0.02 if bench.device.type == "cpu" else 0.005
    clocks = {name: trial.clock for name, trial, _ in parts}
    times = interleave(calls, rounds, least, clock=clocks, known=known)
    for _, group in itertools.groupby(parts, key=lambda part: id(part[1])):
        names, owners, _ = zip(*group, strict=True)
        owners[0].times = [times[name] for name in names]
    for trial in trials:
        trial.stop()


def _row(trial: Trial, model: Model, batch: int, bench: Bench) -> Row:
    subject, its = trial.subject, model.its
    if trial.reason:
        return Row(its=its, what=subject.what, how=subject.how, reason=trial.reason, note=subject.note)
    attention = subject.what == "attention"
    shapes = [
        ShapeTime(
            part.scans,
            part.times * Spread.of(times).median,
            cheapest([part.scans], batch, its.itemsize, bench.ceilings),
        )
        for part, times in zip(subject.parts, trial.times, strict=True)
        if attention and part.scans
    ]
    return Row(
        its=its,
        what=subject.what,
        how=subject.how,
        seconds=Spread.of(trial.totals()),
        note=subject.note,
        extrapolated=subject.extrapolated,
        floor=floor_of(model, batch, bench.ceilings) if attention else None,
        shapes=tuple(shapes),
    )


def _added(plain: Trial, traced: Trial, model: Model, batch: int, bench: Bench) -> Row:
    """Forward with attention less forward, round by round."""
    what, how = "attention added", traced.subject.how
    reason = plain.reason or traced.reason
    if reason:
        return Row(its=model.its, what=what, how=how, reason=reason)
    added = [more - less for less, more in zip(plain.totals(), traced.totals(), strict=False)]
    floor = floor_of(model, batch, bench.ceilings)
    return Row(its=model.its, what=what, how=how, seconds=Spread.of(added), floor=floor)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """The clock's collections need not walk through what is here before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
