"""What correlates with accuracy over patch orders, and whether accuracy differs between orders at all."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mamba_attn.analytics.store import AttentionStore
from mamba_attn.errors import WeightsError
from mamba_attn.findings.controls import ALL, Report
from mamba_attn.findings.intervals import Together, together
from mamba_attn.findings.registry import FINDINGS
from mamba_attn.findings.results import MODEL
from mamba_attn.models import registry

LEAST = 3  # orders, for a correlation
_DRAWS = 10_000


@dataclass(frozen=True)
class Orders:
    """Models that differ only in their order and the seed of their training.

    Args:
        model: their name.
        options: common to all.
        accuracy: top-1 in percent by order, one per model.
        correlations: by finding: the numbers of the orders' models, averaged, against their averaged accuracy.

    Example:
        >>> found = Orders("vmamba_digits", {}, {"raster": [62.0, 63.0], "morton": [65.0, 66.0]}, {})
        >>> found.spread, found.seeds_spread
        (3.0, 1.0)
    """

    model: str
    options: dict[str, object]
    accuracy: dict[str, list[float]]
    correlations: dict[str, Together]

    @property
    def spread(self) -> float:
        """Range of the orders' mean accuracies, in percentage points."""
        means = [float(np.mean(each)) for each in self.accuracy.values()]
        return max(means) - min(means)

    @property
    def seeds_spread(self) -> float | None:
        """Range of accuracies over an order's seeds, averaged over orders; None with one seed each."""
        ranges = [float(np.ptp(each)) for each in self.accuracy.values() if len(each) > 1]
        return float(np.mean(ranges)) if ranges else None

    @property
    def chance(self) -> float | None:
        """Fraction of random assignments to orders whose means differ as much: a p-value; None with one seed each."""
        if self.seeds_spread is None:
            return None
        label = np.repeat(np.arange(len(self.accuracy)), [len(each) for each in self.accuracy.values()])
        values = np.concatenate([np.asarray(each, dtype=np.float64) for each in self.accuracy.values()])
        random = np.random.default_rng(0)
        drawn = np.stack([values, *(random.permutation(values) for _ in range(_DRAWS - 1))])
        means = np.stack([drawn[:, label == order].mean(1) for order in range(len(self.accuracy))])
        sizes = np.bincount(label)[:, None]
        between = (sizes * (means - values.mean()) ** 2).sum(0)
        return float((between >= between[0] - 1e-9).mean())

    @property
    def strongest(self) -> tuple[str, Together, float] | None:
        """The finding that correlates best with accuracy, and its p-value times the number of findings; or None."""
        known = {name: each for name, each in self.correlations.items() if np.isfinite(each.correlation)}
        if not known:
            return None
        name = max(known, key=lambda name: abs(known[name].correlation))
        return name, known[name], min(1.0, known[name].chance * len(known))


def over_orders(reports: Sequence[Report]) -> list[Orders]:
    """Return what correlates with accuracy, for each model with several orders.

    Args:
        reports: of stores; those without accuracy are ignored.

    Example:
        >>> over_orders([])  # reports of stores that differ in their scan order
        []
    """
    families: dict[str, list[Report]] = {}
    for report in reports:
        if report.order and report.accuracy is not None:
            key = json.dumps([report.model, _common(report)], sort_keys=True, default=str)
            families.setdefault(key, []).append(report)
    found = []
    for members in families.values():
        orders = list(dict.fromkeys(report.order for report in members))
        if len(orders) > 1:
            found.append(_compared(members, orders))
    return found


def known_accuracy(store: AttentionStore, weights: str | Path | None = None) -> float | None:
    """Return the accuracy on the card of weights, top-1 in percent; None if unknown.

    Args:
        store: a store of attention.
        weights: a file of other weights for its model. Default: the store's own.
    """
    weights = str(store.index.model["weights"] if weights is None else weights)
    try:
        if weights == "demo":
            card = registry.demo_card(store.model_name)
        else:
            path = Path(weights).with_suffix(".json")
            card = json.loads(path.read_text(encoding="utf-8")) if weights and path.is_file() else {}
        found = card.get("top1")
    except (WeightsError, OSError, ValueError, AttributeError):
        return None
    return float(found) if isinstance(found, int | float) and np.isfinite(found) else None


def _common(report: Report) -> dict[str, object]:
    return {name: value for name, value in report.options.items() if name != "order"}


def _compared(members: Sequence[Report], orders: Sequence[str]) -> Orders:
    accuracy = {
        order: [
            float(each)
            for member in members
            if member.order == order and member.accuracy is not None
            for each in (member.accuracy, *member.other_accuracies)
        ]
        for order in orders
    }
    means = np.array([np.mean(each) for each in accuracy.values()])
    correlations = {}
    for name, finding in FINDINGS.items():
        place = MODEL if finding.level == "model" else ALL
        numbers = [_number(members, order, name, place) for order in orders]
        known = np.isfinite(numbers)
        if known.sum() >= LEAST:
            correlations[name] = together(np.array(numbers)[known], means[known])
    return Orders(members[0].model, _common(members[0]), accuracy, correlations)


def _number(members: Sequence[Report], order: str, name: str, place: str) -> float:
    rows = [member.row(name, place) for member in members if member.order == order]
    values = [value for row in rows if row is not None for value in (row.trained.value, *row.others)]
    return float(np.mean(values)) if values else float("nan")
