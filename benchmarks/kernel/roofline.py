"""How close to the hardware: operations per byte against operations per second, under the machine's ceilings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from mamba_attn.figures.colours import CATEGORIES, GRID, INK
from mamba_attn.figures.png import add_axes, add_legend, add_text, canvas, drawn
from mamba_attn.figures.theme import Figure, plain

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star")
_LEGEND = 250  # pixels


def roofline(
    intensity: Any,
    rate: Any,
    labels: Sequence[str],
    *,
    groups: Sequence[str],
    bandwidth: float,
    rates: Mapping[str, float],
    floors: Any | None = None,
    estimated: Sequence[bool] | None = None,
    title: str | None = None,
    size: int = 620,
) -> go.Figure:
    """Draw a roofline with both axes logarithmic.

    Args:
        intensity: (points,), operations per byte that has to be moved.
        rate: (points,), operations per second that were reached.
        labels: (points,), shown at the pointer.
        groups: (points,), the legend; points of a group share a colour.
        bandwidth: bytes per second that the machine copies: the slope.
        rates: operations per second that the machine reaches, by name: horizontal lines.
        floors: (points,), operations per second that the cheapest way would reach, or None.
        estimated: (points,), which ones were extrapolated; they are open. Default: none.
        title: above the figure.
        size: height in pixels.

    Raises:
        ValueError: numbers that are not positive, lists of different lengths, no ceiling.
    """
    best = None if floors is None else np.asarray(floors, dtype=np.float64)
    if len(labels) != len(groups) or (best is not None and best.shape != (len(groups),)):
        raise ValueError(
            f"roofline: expected a label and a floor per point, got {len(labels)} labels and {len(groups)} groups."
        )
    its = roof("roofline", intensity, rate, groups, estimated, bandwidth, rates, () if best is None else best)
    figure = Figure()
    for ceiling in its.ceilings:
        slope = ceiling is its.ceilings[0]
        figure.add_trace(_line(ceiling, slope))
        if not slope:
            x, y = np.log10(ceiling.stop)
            note = {"text": ceiling.name, "xanchor": "right", "yanchor": "bottom", "font": {"size": 11}}
            figure.add_annotation(x=x, y=y, showarrow=False, **note)
    if best is not None and len(best):
        figure.add_trace(_floors(its.intensity, best, labels))
    names = list(dict.fromkeys(groups))
    for group in its.groups:
        symbol = _SYMBOLS[names.index(group.name) % len(_SYMBOLS)]
        figure.add_trace(
            go.Scatter(
                x=its.intensity[group.members],
                y=its.rate[group.members],
                mode="markers",
                name=group.title,
                marker={
                    "color": group.colour,
                    "size": 10,
                    "symbol": symbol + ("-open" if group.estimated else ""),
                    "line": {"color": group.colour if group.estimated else "white", "width": 1.5},
                },
                text=[labels[index] for index in group.members],
                customdata=[short(value, "op/s") for value in its.rate[group.members]],
                hovertemplate=f"%{{text}}<br>{group.title}<br>%{{x:.3g}} operations per byte, "
                "%{customdata}<extra></extra>",
            )
        )
    plain(figure, title=title, width=round(1.55 * size), height=size)
    axis = {"type": "log", "gridcolor": GRID, "linecolor": INK, "ticks": "outside", "exponentformat": "power"}
    figure.update_xaxes(title="operations per byte moved", range=np.log10(its.x).tolist(), dtick=1, **axis)
    figure.update_yaxes(title="operations per second", range=np.log10(its.y).tolist(), dtick=1, **axis)
    figure.update_layout(hovermode="closest", legend={"x": 1.01, "y": 1, "font": {"size": 12}})
    return figure.update_layout(margin={"l": 80, "r": 20, "b": 60})


def roofline_rgb(
    intensity: Any,
    rate: Any,
    *,
    groups: Sequence[str],
    bandwidth: float,
    rates: Mapping[str, float],
    floors: Any | None = None,
    estimated: Sequence[bool] | None = None,
    title: str | None = None,
    size: int = 620,
) -> np.ndarray:
    """Return a roofline as (rows, columns, 3) uint8.

    Args:
        intensity: as in ``roofline``.
        rate: as in ``roofline``.
        groups: as in ``roofline``.
        bandwidth: as in ``roofline``.
        rates: as in ``roofline``.
        floors: as in ``roofline``.
        estimated: as in ``roofline``.
        title: above the picture.
        size: height in pixels.

    Raises:
        ValueError: as ``roofline``.
        ImportError: matplotlib is not installed.
    """
    best = np.asarray(() if floors is None else floors, dtype=np.float64)
    its = roof("roofline_rgb", intensity, rate, groups, estimated, bandwidth, rates, best)
    if floors is not None and best.shape != its.rate.shape:
        raise ValueError(f"roofline_rgb: expected a floor per point, got {best.shape} for {its.rate.shape} points.")
    width = round(1.55 * size)
    figure = canvas(width, size)
    if title:
        add_text(figure, width / 2, 16, title, 15, ha="center")
    axes = add_axes(figure, 80, 40, width - _LEGEND - 80, size - 96, frame=True)
    axes.set(xscale="log", yscale="log", xlim=its.x, ylim=its.y)
    axes.set_xlabel("operations per byte moved", fontsize=13, color=INK)
    axes.set_ylabel("operations per second", fontsize=13, color=INK)
    axes.minorticks_off()
    shown = []
    for number, ceiling in enumerate(its.ceilings):
        lines = axes.plot(*zip(ceiling.start, ceiling.stop, strict=True), "--" if number else "-", color=INK, lw=1.5)
        if number:
            axes.annotate(ceiling.name, ceiling.stop, (-4, 5), textcoords="offset points", ha="right", fontsize=11)
        else:
            shown.append((ceiling.name, lines[0]))
    if best.size:
        floor = axes.plot(its.intensity, best, "_", color=INK, ms=16, mew=2)
        shown.append(("cheapest known way", floor[0]))
    for group in its.groups:
        fill, edge = ("none", group.colour) if group.estimated else (group.colour, "white")
        x, y = its.intensity[group.members], its.rate[group.members]
        points = axes.plot(x, y, "o", ms=9, mfc=fill, mec=edge, mew=2 if group.estimated else 1)
        shown.append((group.title, points[0]))
    add_legend(figure, width - _LEGEND + 12, 48, [line for _, line in shown], [name for name, _ in shown])
    return drawn(figure)


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

    @property
    def title(self) -> str:
        """What the legend calls them."""
        return f"{self.name} (extrapolated)" if self.estimated else self.name


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
    call: str,
    intensity: Any,
    rate: Any,
    groups: Sequence[str],
    estimated: Sequence[bool] | None,
    bandwidth: float,
    rates: Mapping[str, float],
    extra: Any = (),
) -> Roof:
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
    return Roof(
        x, y, _groups(groups, marks), _ceilings(bandwidth, rates, (left, right), bottom), (left, right), (bottom, top)
    )


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
        Group(name, CATEGORIES[known.index(name) % len(CATEGORIES)], members, mark)
        for (name, mark), members in found.items()
    ]


def _ceilings(bandwidth: float, rates: Mapping[str, float], x: tuple[float, float], bottom: float) -> list[Ceiling]:
    highest = max(rates.values())
    start = max(x[0], bottom / bandwidth)
    memory = Ceiling(f"copy, {short(bandwidth, 'B/s')}", (start, start * bandwidth), (highest / bandwidth, highest))
    flat = [
        Ceiling(f"{name}, {short(value, 'op/s')}", (value / bandwidth, value), (x[1], value))
        for name, value in sorted(rates.items(), key=lambda item: -item[1])
    ]
    return [memory, *flat]


def _line(ceiling: Ceiling, slope: bool) -> go.Scatter:
    (x0, y0), (x1, y1) = ceiling.start, ceiling.stop
    return go.Scatter(
        x=[x0, x1],
        y=[y0, y1],
        mode="lines",
        name=ceiling.name,
        showlegend=slope,
        line={"color": INK, "width": 2, "dash": "solid" if slope else "dash"},
        hovertemplate=f"{ceiling.name}<extra></extra>",
    )


def _floors(intensity: np.ndarray, rates: np.ndarray, labels: Sequence[str]) -> go.Scatter:
    """A short bar per point, at what the cheapest way would reach."""
    return go.Scatter(
        x=intensity,
        y=rates,
        mode="markers",
        name="cheapest known way",
        marker={"symbol": "line-ew", "size": 16, "line": {"color": INK, "width": 2}},
        text=list(labels),
        customdata=[short(value, "op/s") for value in rates],
        hovertemplate="%{text}<br>cheapest known way: %{customdata}<extra></extra>",
    )
