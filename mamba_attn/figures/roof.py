"""A roofline without its drawing: checked points, the range of both axes, the lines of the ceilings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Okabe and Ito's colours without the yellow, which is lost on white: safe for colour-blind readers
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")


class Group(NamedTuple):
    """Points of one colour.

    Args:
        name: for the legend.
        colour: as plotly writes it.
        members: their indices.
        estimated: whether they are drawn open.
    """

    name: str
    colour: str
    members: list[int]
    estimated: bool


class Ceiling(NamedTuple):
    """A line that no point can be above.

    Args:
        name: for people, its rate included.
        start: (operations per byte, operations per second) where it begins.
        stop: where it ends.
    """

    name: str
    start: tuple[float, float]
    stop: tuple[float, float]


class Roof(NamedTuple):
    """Everything that is drawn.

    Args:
        intensity: operations per byte of every point.
        rate: operations per second of every point.
        groups: in the order of the legend.
        ceilings: the slope of the memory first, then the rates, highest first.
        x: both ends of the axis.
        y: both ends of the axis.
    """

    intensity: np.ndarray
    rate: np.ndarray
    groups: list[Group]
    ceilings: list[Ceiling]
    x: tuple[float, float]
    y: tuple[float, float]


def roof(
    call: str, intensity: Any, rate: Any, groups: Sequence[str], estimated: Sequence[bool] | None, bandwidth: float,
    rates: Mapping[str, float], extra: Any = (),
) -> Roof:  # fmt: skip
    """Check the points and lay out the picture.

    Args:
        call: for error messages.
        intensity: (points,).
        rate: (points,).
        groups: (points,).
        estimated: (points,), or None.
        bandwidth: bytes per second.
        rates: operations per second, by name.
        extra: further rates that have to fit on the axis.

    Raises:
        ValueError: numbers that are not positive, lists of different lengths, no ceiling.
    """
    x, y, more = (np.asarray(values, dtype=np.float64) for values in (intensity, rate, extra))
    marks = [False] * len(x) if estimated is None else list(estimated)
    if x.ndim != 1 or x.shape != y.shape or not len(x) == len(groups) == len(marks):
        raise ValueError(
            f"{call}: expected one intensity, rate, label and group per point, got {x.shape}, {y.shape}, "
            f"{len(groups)} groups and {len(marks)} marks."
        )
    numbers = np.concatenate([x, y, more.ravel(), [bandwidth], list(rates.values())])
    if not rates or not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise ValueError(f"{call}: expected at least one ceiling, and positive numbers everywhere on two log axes.")
    ridges = np.array(list(rates.values())) / bandwidth
    left, right = _decades(np.concatenate([x, ridges]))
    bottom, top = _decades(np.concatenate([y, more.ravel(), list(rates.values())]))
    return Roof(x, y, _groups(groups, marks), _ceilings(bandwidth, rates, (left, right), bottom),
                (left, right), (bottom, top))  # fmt: skip


def short(rate: float, unit: str) -> str:
    """Return a rate for people.

    Args:
        rate: per second.
        unit: "B/s" or "op/s".
    """
    power = min(max(int(np.log10(max(rate, 1)) // 3), 0), 5)
    return f"{rate / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}"


def _decades(values: np.ndarray) -> tuple[float, float]:
    """The ends of a log axis with a little room."""
    return float(values.min()) / 2.5, float(values.max()) * 2.5


def _groups(names: Sequence[str], marks: Sequence[bool]) -> list[Group]:
    known = list(dict.fromkeys(names))
    found: dict[tuple[str, bool], list[int]] = {}
    for index, key in enumerate(zip(names, marks, strict=True)):
        found.setdefault(key, []).append(index)
    return [
        Group(name, PALETTE[known.index(name) % len(PALETTE)], members, mark) for (name, mark), members in found.items()
    ]


def _ceilings(bandwidth: float, rates: Mapping[str, float], x: tuple[float, float], bottom: float) -> list[Ceiling]:
    highest = max(rates.values())
    start = max(x[0], bottom / bandwidth)
    memory = Ceiling(
        f"copy, {short(bandwidth, 'B/s')}", (start, start * bandwidth), (highest / bandwidth, highest)
    )  # fmt: skip
    flat = [
        Ceiling(f"{name}, {short(value, 'op/s')}", (value / bandwidth, value), (x[1], value))
        for name, value in sorted(rates.items(), key=lambda item: -item[1])
    ]
    return [memory, *flat]
