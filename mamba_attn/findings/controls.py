"""The findings of a store's model and its controls: random weights, another scan order, shuffled places.

What a trained model shows may be its architecture's: a recurrence that decays reads near patches whatever its weights.
A number inside the range expected of untrained models says nothing about training; one outside is a fact about this
one trained model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mamba_attn.analytics.rebuild import order_of, takes_order
from mamba_attn.analytics.store import AttentionStore
from mamba_attn.core.decisions import LOGGER
from mamba_attn.distributed import Ranks
from mamba_attn.errors import MambaAttnError, StoreError
from mamba_attn.evaluation.intervals import LEVEL, holm
from mamba_attn.findings import intervals
from mamba_attn.findings.intervals import Effect, Estimate, Expected, effect, expected
from mamba_attn.findings.measure import Advance, Measuring
from mamba_attn.findings.registry import FINDINGS, Finding
from mamba_attn.findings.results import MODEL, Measured

# p after Holm's correction at which a number is outside. Numbers are neither normal nor independent: of 405 untrained
# models 6.4 % had one outside at 0.05, and 4.4 % have one at this level.
OUTSIDE = 0.03
ALL = "all"  # the mean over blocks, or stages
_Tested = TypeVar("_Tested", Expected, Effect)
SHUFFLED_ORDER = "random"  # one of mamba_attn.orders.ORDERS


@dataclass(frozen=True)
class Row:
    """A finding at a place.

    Args:
        finding: its name.
        place: a layer, "stage 0", "model", or "all": the mean over layers or stages.
        trained: of the store's model.
        random: the mean over seeds; None without seeds.
        seeds: every seed's own.
        untrained: the range of one more model with random weights, and the p-value of the trained one; see
            ``compared``.
        others: every further trained model's own number.
        training: the trained models, the store's among them, less the untrained ones; None without ``others``.
        reordered: of the trained weights scanning in a random order.
        order: trained minus reordered, resampled over images.
        shuffled: of the trained model with the patches' places shuffled: the chance level.

    Example:
        >>> from mamba_attn.findings.intervals import Estimate
        >>> Row("block_silhouette", "all", Estimate(0.7, 0.6, 0.8, units=200)).claimed
        'holds'
    """

    finding: str
    place: str
    trained: Estimate
    random: float | None = None
    seeds: tuple[float, ...] = ()
    untrained: Expected | None = None
    others: tuple[float, ...] = ()
    training: Effect | None = None
    reordered: float | None = None
    order: Estimate | None = None
    shuffled: float | None = None

    @property
    def about(self) -> Finding:
        """The finding that the row is about."""
        return FINDINGS[self.finding]

    @property
    def claimed(self) -> str:
        """Whether the paper's claim holds: "holds", "fails", "open" when the interval decides neither; "" without."""
        if self.about.claim is None:
            return ""
        found = self.trained.beyond(*self.about.claim)
        return "open" if found is None else "holds" if found else "fails"

    @property
    def verdict(self) -> str:
        """The model relative to the range expected of untrained ones: "above", "below", "inside"; "" if unknown."""
        if self.random is None or self.untrained is None:
            return ""
        if self.untrained.corrected > OUTSIDE:
            return "inside"
        return "above" if self.trained.value > self.random else "below"

    @property
    def training_verdict(self) -> str:
        """What training does, as far as these models tell: "more", "less", "no difference"; "" of one trained model."""
        if self.training is None:
            return ""
        if self.training.corrected > LEVEL:
            return "no difference"
        return "more" if self.training.value > 0 else "less"

    @property
    def order_verdict(self) -> str:
        """The effect of its own order: "more", "less", "no difference"; "" if unknown."""
        if self.order is None or self.order.low is None:
            return ""
        beyond = self.order.beyond(">", 0.0)
        return "no difference" if beyond is None else "more" if beyond else "less"


@dataclass
class Report:
    """The findings of one store.

    Args:
        name: of the store.
        model: name of its model.
        options: that built it.
        order: its scan order; "" for softmax attention.
        images: number of images used.
        groups: of images, for findings about mean matrices.
        rows: findings at every place.
        depths: places of blocks, first to last.
        pairs: number of pairs of blocks per stage with pairs; ``block_correlation`` is a quantile over them.
        notes: what could not be measured, and why.
        accuracy: top-1 in percent, if known.
        other_accuracies: the same of the further trained models whose accuracy is known.
        left: parts that other processes have not measured yet; then there are no rows.

    Example:
        >>> found = Report("digits", "vim_digits", {}, order="raster", images=200, groups=10)
        >>> found.row("block_silhouette") is None
        True
    """

    name: str
    model: str
    options: dict[str, object]
    order: str
    images: int
    groups: int
    rows: list[Row] = field(default_factory=list)
    depths: list[str] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    accuracy: float | None = None
    other_accuracies: list[float] = field(default_factory=list)
    left: int = 0

    def row(self, finding: str, place: str = ALL) -> Row | None:
        """Return a finding at a place, or None if undefined.

        Args:
            finding: its name.
            place: see ``Row``.
        """
        return next((row for row in self.rows if (row.finding, row.place) == (finding, place)), None)


def counted(store: AttentionStore, images: int | None = None) -> int:
    """Return how many images are measured: those whose features and pixels the store has.

    Args:
        store: a store of attention.
        images: the first so many of them. Default: all.

    Raises:
        StoreError: it has them of no image.
    """
    there = len(store.featured)
    if not there:
        raise StoreError(f"{store.folder}: it has features and pixels of no image; collect some into a new folder.")
    return min(images or there, there)


def steps(store: AttentionStore, count: int, seeds: int, weights: int = 0) -> int:
    """Return how often ``report`` calls ``advance``, at most.

    Args:
        store: a store of attention.
        count: images.
        seeds: of random weights.
        weights: number of further trained models.
    """
    return count * (1 + seeds + weights + (1 if takes_order(store.model_name) else 0))


def report(
    name: str,
    store: AttentionStore,
    folder: Path,
    *,
    images: int | None = None,
    seeds: int = 20,
    weights: Sequence[str | Path] = (),
    advance: Advance = lambda: None,
    ranks: Ranks | None = None,
    device: str | None = None,
) -> Report:
    """Measure a store's model and its controls on the store's own images.

    Args:
        name: what the store is called.
        store: a store of attention.
        folder: where numbers are kept; a killed call resumes from it.
        images: number of first images to use. Default: all.
        seeds: number of models with random weights.
        weights: files of further trained models of the same architecture and options, of other seeds.
        advance: called after every image of every model.
        ranks: this process among all that measure into the folder; the one that reports has the rows. Default: alone.
        device: where models run. Default: where the store loads them.

    Raises:
        StoreError: the store is damaged, or of another projection.
        OSError: the folder cannot be written.
        WeightsError: a file of ``weights`` is not there, or not of this model.

    Example:
        >>> report("digits", AttentionStore.open("store"), Path("kept"), seeds=5).notes  # doctest: +SKIP
        []
    """
    count = counted(store, images)
    measuring = Measuring(store, count, folder, advance, ranks, device)
    notes: list[str] = []
    there = len(store.featured)
    if there < len(store.images) and (images is None or images > there):
        notes.append(
            f"measured on {there:,} of {len(store.images):,} images: the store has features and pixels of no others."
        )
    own = _tried(lambda: measuring.model(store.subject, shuffled=True), "the trained model", notes)
    if own is None and measuring.ranks.reports:
        own = measuring.kept()
        notes.append(_what_is_kept(measuring))
    random = []
    for seed in range(seeds):
        found = _tried(lambda: measuring.model(store.untrained(seed)), f"random weights, seed {seed}", notes)  # noqa: B023
        if found is None:
            break  # a failure repeats for every seed
        random += found
    others = [each for path in weights for each in measuring.model(store.with_weights(path))]
    reordered = _reordered(store, measuring, notes)
    if count < 2:
        notes.append("only one image: no intervals, and nothing that compares images.")
    result = Report(
        name,
        store.model_name,
        dict(store.index.model["options"]),
        order_of(store.index),
        count,
        0,
        depths=[layer.name for layer in store.layers],
        pairs=pairs([each.stage for each in store.layers]),
        notes=notes,
        left=measuring.left,
    )
    if not own or measuring.left:
        return result
    result.rows = compared(list(_rows(own, random, reordered, others)))
    result.groups = max((row.trained.units for row in result.rows if row.about.kind == "rows"), default=0)
    return result


def compared(rows: Sequence[Row]) -> list[Row]:
    """Return rows with the range expected of untrained models, from their seeds, and with what training does.

    p-values are corrected over the rows of a table: those of the whole model, and those of its blocks and stages.

    Args:
        rows: of one store.
    """
    ranges = _corrected(rows, [expected(row.trained.value, row.seeds) for row in rows])
    effects = _corrected(
        rows, [effect((row.trained.value, *row.others), row.seeds) if row.others else None for row in rows]
    )
    return [
        replace(row, untrained=its, training=gained) for row, its, gained in zip(rows, ranges, effects, strict=True)
    ]


def _corrected(rows: Sequence[Row], found: Sequence[_Tested | None]) -> list[_Tested | None]:
    """Return tests with Holm's correction, table by table."""
    result = list(found)
    for whole in (True, False):
        known = [
            (at, its) for at, its in enumerate(found) if its is not None and (rows[at].place in (ALL, MODEL)) == whole
        ]
        for (at, its), chance in zip(known, holm([its.chance for _, its in known]), strict=True):
            result[at] = replace(its, corrected=chance)
    return result


def pairs(stages: Sequence[int]) -> list[int]:
    """Return how many pairs of blocks each stage of at least two blocks has.

    Args:
        stages: of the blocks.
    """
    blocks = [stages.count(stage) for stage in sorted(set(stages))]
    return [count * (count - 1) // 2 for count in blocks if count > 1]


def _reordered(store: AttentionStore, measuring: Measuring, notes: list[str]) -> list[Measured]:
    order = order_of(store.index)
    if not order:
        return []
    if order == SHUFFLED_ORDER:
        notes.append("it was trained in a random order, so there is no comparison with another scan order.")
        return []
    return _tried(lambda: measuring.model(store.reordered(SHUFFLED_ORDER)), "the random scan order", notes) or []


def _tried(measure: Callable[[], list[Measured]], what: str, notes: list[str]) -> list[Measured] | None:
    try:
        return measure()
    except (MambaAttnError, ImportError) as error:
        LOGGER.debug("%s: not measured", what, exc_info=error)
        notes.append(f"{what}: not measured. {error}")
        return None


def _what_is_kept(measuring: Measuring) -> str:
    names = ", ".join(layer.name for layer in measuring.projected)
    means = f"; of {names} only means and projections are, so that some numbers are missing or have no interval"
    return f"the trained numbers are of the matrices that the store kept{means if names else ''}."


def _rows(
    own: Sequence[Measured], random: Sequence[Measured], reordered: Sequence[Measured], trained: Sequence[Measured]
) -> Iterator[Row]:
    shuffled = own[1].values if len(own) > 1 else {}
    models = [own[0].values, *(each.values for each in random), *(each.values for each in reordered), shuffled]
    tables = [_with_means(values) for values in models]
    first, seeds, shuffle = tables[0], tables[1 : 1 + len(random)], tables[-1]
    others = tables[1 + len(random) : -1]
    further = [_with_means(each.values) for each in trained]
    for key in sorted(first, key=lambda key: list(FINDINGS).index(key[0])):
        its = intervals.mean(first[key])
        if its is None:
            continue
        each_seed = _means(seeds, key)
        yield Row(
            *key,
            its,
            float(np.mean(each_seed)) if each_seed else None,
            each_seed,
            others=_means(further, key),
            reordered=_mean(others[0].get(key)) if others else None,
            order=intervals.difference(first[key], others[0][key]) if others and key in others[0] else None,
            shuffled=_mean(shuffle.get(key)),
        )


def _with_means(values: dict[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """Add the per-image mean over places of every finding that has several places."""
    found = dict(values)
    for name in (name for name, finding in FINDINGS.items() if finding.level != "model"):
        each = [array for (its, place), array in values.items() if its == name and np.isfinite(array).any()]
        longest = max((len(array) for array in each), default=0)
        whole = [array for array in each if len(array) == longest]
        if whole:
            known = np.isfinite(np.stack(whole)).all(0)
            found[name, ALL] = np.where(known, np.stack(whole).mean(0), np.nan)
    return found


def _means(tables: Sequence[dict[tuple[str, str], np.ndarray]], key: tuple[str, str]) -> tuple[float, ...]:
    """Return every model's own number."""
    found = (_mean(table.get(key)) for table in tables)
    return tuple(value for value in found if value is not None)


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None or not np.isfinite(values).any() else float(np.nanmean(values))
