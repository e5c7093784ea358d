"""The figures that the kernel should reach on a GPU, found among the rows; elsewhere they stay "not measured"."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernel.rows import Row
from benchmarks.kernel.timing import Spread

PIXELS, BATCH, DTYPE = 224, 8, "float32"
FILLED = 8 * 784  # batch x length from which the fraction of the floor counts
BLOCKED = "blocked"  # the vectorised PyTorch path


@dataclass(frozen=True)
class Target:
    """A row of the table: a figure that should be at least (``higher``) or at most this good."""

    what: str
    at_least: float
    aim: float
    higher: bool = False
    unit: str = ""

    def met(self, value: float) -> bool:
        """Whether a value reaches ``at_least``."""
        return value >= self.at_least if self.higher else value <= self.at_least


@dataclass(frozen=True)
class Found:
    """What the rows say about a target.

    Args:
        value: None where nothing was measured.
        how: with which backend, and which row where there are several.
        reason: why nothing was measured.
    """

    value: Spread | None = None
    how: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Run:
    """A run of the bench.

    Args:
        device: where it ran.
        rows: what it measured.
        errors: of every backend and type, relative to the sum of absolute terms.
        tf32: whether TF32 was allowed.
    """

    device: torch.device
    rows: Sequence[Row]
    errors: dict[tuple[str, str], float]
    tf32: bool = False

    def row(self, model: str, what: str, how: str | None = None) -> Row | None:
        """The row of a model at the targets' size; ``how`` of None takes the first."""
        for row in self.rows:
            size = (row.its.model, row.its.pixels, row.its.batch, row.its.dtype)
            if size == (model, PIXELS, BATCH, DTYPE) and row.what == what and how in (None, row.how):
                return row
        return None

    @property
    def backend(self) -> str | None:
        """The backend that ran the models' scans."""
        return next((row.how for row in self.rows if row.what == "attention added" and row.how != "timm"), None)


def figures(run: Run) -> list[dict[str, Any]]:
    """Return the table of targets as it stands in the JSON file; "value" is null where nothing was measured.

    Args:
        run: the run.
    """
    rows = []
    for target, find in _TARGETS:
        found = find(run) if run.device.type == "cuda" else Found(reason=_no_gpu())
        value = found.value
        row: dict[str, Any] = {
            "what": target.what,
            "how": found.how + (", TF32 on" if run.tf32 and value else ""),
            "value": None,
            "unit": target.unit,
            "quartiles": None,
            "rounds": 0,
            "at_least": target.at_least,
            "aim": target.aim,
            "met": None,
            "reason": None,
        }
        if value is None:
            row["reason"] = f"not measured: {found.reason}"
        else:
            row |= {"value": value.median, "quartiles": [value.low, value.high], "rounds": value.count}
            row["met"] = target.met(value.median)
        rows.append(row)
    return rows


def _added(model: str) -> Callable[[Run], Found]:
    def find(run: Run) -> Found:
        row = run.row(model, "attention added")
        if row is None or row.seconds is None:
            return Found(reason=_why(row))
        its = row.seconds
        return Found(Spread(1e3 * its.median, 1e3 * its.low, 1e3 * its.high, its.count), row.how)

    return find


def _fraction(run: Run) -> Found:
    """The worst shape of layers among those that fill a GPU."""
    found = [
        (shape.floor.seconds / shape.seconds, row, shape)
        for row in run.rows
        if row.what == "attention" and row.how == run.backend and row.its.dtype == DTYPE
        for shape in row.shapes
        if row.its.batch * shape.scans.length >= FILLED
    ]
    if not found:
        return Found(reason="no such size was measured in this run")
    fraction, row, shape = min(found, key=lambda each: each[0])
    return Found(Spread.of([fraction]), f"{row.how}, worst of {len(found)}: {row.its}, {shape.scans}")


def _against_blocked(run: Run) -> Found:
    """The worse of the two models of the first rows."""
    if run.backend == BLOCKED:
        return Found(reason="no CUDA backend ran: the default was the vectorised PyTorch path itself")
    found = []
    for model in _AT_224:
        ours, theirs = (run.row(model, "attention", how) for how in (run.backend, BLOCKED))
        if ours is None or theirs is None or ours.seconds is None or theirs.seconds is None:
            return Found(reason=_why(ours if ours is None or ours.seconds is None else theirs))
        found.append((theirs.seconds.median / ours.seconds.median, ours))
    ratio, row = min(found, key=lambda each: each[0])
    return Found(Spread.of([ratio]), f"{row.how}, the worse of two: {row.its}")


def _against_mamba_ssm(run: Run) -> Found:
    ours, theirs = (run.row(_AT_224[0], "scan", how) for how in (run.backend, "mamba-ssm"))
    if ours is None or theirs is None or ours.seconds is None or theirs.seconds is None:
        return Found(reason=_why(ours if ours is None or ours.seconds is None else theirs))
    return Found(Spread.of([ours.seconds.median / theirs.seconds.median]), f"{ours.how}, {ours.its}")


def _error(run: Run) -> Found:
    """The worse of the types."""
    if run.backend in (None, BLOCKED):
        return Found(reason="no CUDA backend ran in addition to the plain PyTorch path")
    ratios = {
        dtype: error / run.errors[BLOCKED, dtype]
        for (name, dtype), error in run.errors.items()
        if name == run.backend and (BLOCKED, dtype) in run.errors
    }
    if not ratios:
        return Found(reason="the errors were not measured in this run")
    worst = max(ratios, key=ratios.__getitem__)
    return Found(Spread.of([ratios[worst]]), f"{run.backend}, {worst}")


def _no_gpu() -> str:
    return "this run was on the CPU" + ("" if torch.cuda.is_available() else "; PyTorch sees no GPU here")


def _why(row: Row | None) -> str:
    return "this size was not part of the run" if row is None else row.reason or ""


_AT_224 = ("vim_small", "vmamba_tiny_s1l8")
_SIZE = f"at {PIXELS} pixels, batch {BATCH}"
_TARGETS: list[tuple[Target, Callable[[Run], Found]]] = [
    (Target(f"time added by all layers' attention, Vim-S {_SIZE}", 8, 4, unit="ms"), _added(_AT_224[0])),
    (Target(f"time added by all layers' attention, VMamba-T s1l8 {_SIZE}", 5, 2, unit="ms"), _added(_AT_224[1])),
    (Target("fraction of the cheapest known formulation's floor, batch x length >= 8 x 784", 0.5, 0.8, higher=True),
     _fraction),
    (Target(f"vectorised PyTorch path / ours, same GPU, {_SIZE}", 10, 50, higher=True, unit="x"), _against_blocked),
    (Target(f"our plain scan / mamba-ssm's, Vim-S {_SIZE}", 1.2, 0.9, unit="x"), _against_mamba_ssm),
    (Target("error / plain PyTorch's in the same type", 2, 1, unit="x"), _error),
]  # fmt: skip
