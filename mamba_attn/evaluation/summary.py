"""Summarises lines as figures: per collection, model and method, with intervals, ranks and paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np

from mamba_attn.datasets.samples import Data
from mamba_attn.datasets.texts import Texts
from mamba_attn.evaluation.intervals import LEVEL, Interval, Resampler, holm, interval
from mamba_attn.evaluation.metrics import METRICS, Metric
from mamba_attn.evaluation.plan import Plan
from mamba_attn.evaluation.specs import Model
from mamba_attn.evaluation.store import Store

FEW = 50  # images: below, intervals are as wide as the differences between methods
Lines = Mapping[int, dict[str, Any]]  # by the image's index


@dataclass(frozen=True)
class Figure:
    """A method's figure.

    Args:
        interval: over the images.
        images: number of images.
        rank: 1 is the best; 0 if neither direction is better, or if others were measured on more images.
        behind: the first method's lead over this one on the images of both, always positive if it is clearly ahead;
            None for the first.
        chance: of a difference as large if this one and the first were equal, two-sided, after Holm's correction over
            all pairs of methods; None for the first, and without a rank.
        ahead_of: methods that it leads by the same test.
    """

    interval: Interval
    images: int
    rank: int = 0
    behind: Interval | None = None
    chance: float | None = None
    ahead_of: tuple[str, ...] = ()


@dataclass
class Table:
    """The figures of one model on one collection.

    Args:
        data: the collection.
        model: the model.
        images: number of requested images, or texts.
        accuracy: share of the clean predictions that are the label; None without labels.
        figures: by metric, then method, best first.
        curves: by method: accuracies at 10 to 90 %, by sign and kind.
        randomised: by method: correlation at every stage of the cascade.
        failed: by method, reasons and the number of images lost to each.
        flags: sentences about maps and truths without information.
    """

    data: Data | Texts
    model: Model
    images: int
    accuracy: float | None = None
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    randomised: dict[str, list[float | None]] = field(default_factory=dict)
    failed: dict[str, dict[str, int]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        """All methods with figures, best first by the most informative figure available."""
        for name in ("gap_target", "gap_top", "miou", "source_auc", "tokens_gap", *METRICS):
            if name in self.figures:
                first = list(self.figures[name])
                rest = (method for its in self.figures.values() for method in its)
                return list(dict.fromkeys([*first, *rest]))
        return []


def summarise(plan: Plan, store: Store, half: str | None = None) -> list[Table]:
    """Return all tables of a plan.

    Args:
        plan: the comparison.
        store: what was measured.
        half: use only the images of this half.
    """
    return [_table(plan, store, selector, model, half) for selector, model in plan.pairs]


def _table(plan: Plan, store: Store, selector: str, model: Model, half: str | None) -> Table:
    data, methods = plan.data[selector], plan.fitting(model)
    kept = data.chosen(plan.half, plan.limit)
    allowed = set(kept if half is None else data.chosen(half)) & set(kept)
    table = Table(data, model, len(allowed))
    for measure in plan.measures:
        indices = [index for index in plan.indices(selector, measure) if index in allowed]
        lines = {
            method: {
                index: line
                for index in indices
                if (line := store.get(plan.key(data, index, model, method, measure))) is not None
            }
            for method in methods
        }
        _note(table, measure, lines)
        good = {
            method: {i: line for i, line in its.items() if "error" not in line and "skipped" not in line}
            for method, its in lines.items()
        }
        for metric in (each for each in METRICS.values() if each.measure == measure):
            if found := compare(metric, good, indices, plan.options.seed):
                table.figures[metric.name] = found
        if measure == "perturbation":
            table.curves, table.accuracy = _curves(good), _accuracy(good)
        if measure == "sanity":
            table.randomised = {method: _cascade(its) for method, its in good.items() if its}
    return table


def compare(metric: Metric, lines: Mapping[str, Lines], indices: Sequence[int], seed: int = 0) -> dict[str, Figure]:
    """Return the methods' figures, best first; differences are over the images that both have.

    Args:
        metric: the figure.
        lines: by method, what was measured of every image.
        indices: all images.
        seed: of the resampling.
    """
    columns = {method: _columns(metric, its, indices) for method, its in lines.items()}
    columns = {method: both for method, both in columns.items() if both[1].any()}
    if not columns:
        return {}
    resampler = _resampler(len(indices), seed)
    drawn: dict[tuple[str, bytes], np.ndarray] = {}

    def draws(method: str, valid: np.ndarray) -> np.ndarray:
        key = (method, valid.tobytes())
        if key not in drawn:
            drawn[key] = metric.combine(resampler.means(columns[method][0], valid))
        return drawn[key]

    whole = {method: draws(method, valid) for method, (_, valid) in columns.items()}
    columns = {method: both for method, both in columns.items() if np.isfinite(whole[method][0])}  # accuracy 0: no gap
    if not columns:
        return {}
    counts = {method: int(valid.sum()) for method, (_, valid) in columns.items()}
    most, better = max(counts.values()), metric.better or 1
    # those of fewer images last: easier images would put them ahead
    order = sorted(columns, key=lambda each: (-counts[each], -_number(better * float(whole[each][0]))))
    gained = {}
    for one, other in combinations(order, 2) if metric.better else ():
        shared = columns[one][1] & columns[other][1]
        if shared.any():
            gained[one, other] = metric.better * (draws(one, shared) - draws(other, shared))
    # over all pairs, not those with the first alone: it is the first because its sample was the best
    ranked = [pair for pair in gained if all(counts[each] == most for each in pair)]
    chances = dict(zip(ranked, holm([_chance(gained[pair]) for pair in ranked]), strict=True))
    found = {}
    for place, method in enumerate(order):
        lead, values = gained.get((order[0], method)), whole[method]
        found[method] = Figure(
            interval(float(values[0]), values[1:]),
            counts[method],
            place + 1 if metric.better and counts[method] == most else 0,
            None if lead is None else interval(float(lead[0]), lead[1:]),
            chances.get((order[0], method)),
            tuple(other for (one, other), chance in chances.items() if one == method and chance < LEVEL),
        )
    return found


def _chance(gained: np.ndarray) -> float:
    """Return the two-sided p-value of a difference, given with its resampled values; normal, for tails beyond them."""
    value, drawn = float(gained[0]), gained[1:][np.isfinite(gained[1:])]
    spread = float(drawn.std()) if len(drawn) else 0.0
    return math.erfc(abs(value) / spread / math.sqrt(2)) if spread > 0 else float(value == 0)


@lru_cache(2)  # of many images, one is 100 MB
def _resampler(images: int, seed: int) -> Resampler:
    return Resampler(images, seed)


def _columns(metric: Metric, lines: Lines, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(images, columns) with zeros for images that do not count, and (images,) whether each counts."""
    found = [metric.columns(lines[index]) if index in lines else None for index in indices]
    width = max((len(each) for each in found if each is not None), default=1)
    array = np.array([[0.0] * width if each is None else list(each) for each in found]).reshape(-1, width)
    return array, np.array([each is not None for each in found], dtype=bool)


def _number(value: float) -> float:
    return float(value) if np.isfinite(value) else -np.inf


def _curves(lines: Mapping[str, Lines]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for method, its in lines.items():
        for of, wanted in (("top", "predicted"), ("target", "label")):
            known = [line for line in its.values() if line[wanted] is not None]
            for sign, name in enumerate(("positive", "negative")):
                hits = [np.equal(line["answers"][sign], line[wanted]) for line in known]
                if hits:
                    found.setdefault(method, {})[f"{name}_{of}"] = [float(each) for each in np.mean(hits, axis=0)]
    return found


def _accuracy(lines: Mapping[str, Lines]) -> float | None:
    every = {index: line for its in lines.values() for index, line in its.items() if line["label"] is not None}
    return float(np.mean([line["predicted"] == line["label"] for line in every.values()])) if every else None


def _cascade(lines: Lines) -> list[float | None]:
    stages = zip(*(line["randomised"] for line in lines.values()), strict=True)
    known = [[value for value in stage if value is not None] for stage in stages]
    return [float(np.mean(values)) if values else None for values in known]


def _note(table: Table, measure: str, lines: Mapping[str, Lines]) -> None:
    """Add sentences to a table: few images, failures, skipped images, constant maps, truths of one class."""
    most = max((sum("error" not in line for line in its.values()) for its in lines.values()), default=0)
    if measure in ("perturbation", "localisation") and 0 < most < FEW:
        table.flags.append(
            f"{measure}: {most} images order methods only where they differ a lot; use at least {FEW} for a ranking."
        )
    for method, its in lines.items():
        for line in its.values():
            if "error" in line:
                reasons = table.failed.setdefault(method, {})
                reasons[line["error"]] = reasons.get(line["error"], 0) + 1
        flat = sum(bool(line.get("constant")) for line in its.values())
        if flat and measure in ("perturbation", "localisation"):
            what = "their cells are ranked at random" if measure == "perturbation" else "their average precision is 1/2"
            table.flags.append(f"{method}, {measure}: {flat} of {len(its)} maps are constant; {what}.")
    every = {index: line for its in lines.values() for index, line in its.items() if "error" not in line}
    if skipped := sum("skipped" in line for line in every.values()):
        table.flags.append(
            f"{skipped} of {len(every)} images have no boxes and no mask and are left out of the localisation."
        )
    if single := sum(bool(line.get("one_class")) for line in every.values()):
        table.flags.append(
            f"{single} of {len(every)} images are all object or all background; those without an "
            "object are left out of pointing and energy."
        )
