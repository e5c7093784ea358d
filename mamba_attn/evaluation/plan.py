"""The plan of a run: models, collections and methods, and the work that remains."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property

from mamba_attn.datasets.class_names import class_indices
from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.samples import Data
from mamba_attn.evaluation.perturbation import DROP
from mamba_attn.evaluation.specs import LABEL, Model, Options
from mamba_attn.evaluation.store import Key, Store

MEASURES = ("perturbation", "pixels", "localisation", "sanity", "cost", "picture")
Needs = Mapping[str, Mapping[int, tuple[str, ...]]]  # measures, by method and image
CHUNK = 8  # images per task, explained in one batch


@dataclass(frozen=True)
class Task:
    """A unit of work: some images of a collection and one model.

    Args:
        selector: of the collection.
        model: by name.
        needs: by method and index of the image, the measures that it lacks.
        options: of the run.
    """

    selector: str
    model: Model
    needs: Needs
    options: Options

    @property
    def records(self) -> int:
        """Number of lines that the task will return."""
        return sum(len(measures) for its in self.needs.values() for measures in its.values())


@dataclass
class Plan:
    """A whole comparison.

    Args:
        models: to compare.
        selectors: of the collections.
        only: the measures of some collections; the others get all.
        methods: keys, as ``choose_methods`` returns them.
        unasked: methods not named by the user, which may fit no model.
        most: largest number of images of some methods; the others get all.
        measures: some of ``MEASURES``.
        options: of the run.
        half: of the images, or "all".
        limit: images per collection.
        sanity_images: number of images for the sanity checks.
        pixel_images: number of images for ranking pixels.
        pictures: number of images to show.
        notes: sentences about what was left out, and why.
    """

    models: Sequence[Model]
    selectors: Sequence[str]
    methods: Sequence[str]
    measures: Sequence[str] = MEASURES
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    unasked: AbstractSet[str] = frozenset()
    options: Options = field(default_factory=Options)
    half: str = "all"
    limit: int | None = None
    sanity_images: int = 8
    pixel_images: int = 100
    pictures: int = 6
    notes: list[str] = field(default_factory=list)

    @cached_property
    def data(self) -> dict[str, Data]:
        """The collections by selector; see ``open_data`` for the errors."""
        return {selector: open_data(selector) for selector in dict.fromkeys(self.selectors)}

    @cached_property
    def pairs(self) -> list[tuple[str, Model]]:
        """Pairs of selectors and models: every model with every collection whose classes it knows.

        If a model knows no class of a collection, the pair is left out, provided another model knows them and the model
        has another collection; otherwise the model's predicted class is explained.
        """
        knows = {
            (s, m): not d.classes or any(i is not None for i in class_indices(d, m.subject))
            for s, d in self.data.items()
            for m in self.models
        }
        found = []
        for selector, data in self.data.items():
            for model in self.models:
                wanted = any(knows[selector, other] for other in self.models)
                elsewhere = any(knows[other, model] and self.data[other].classes for other in self.data)
                if not knows[selector, model] and wanted and elsewhere:
                    self.notes.append(f"{model.name} is left out of {data.name}: it knows none of its classes.")
                else:
                    found.append((selector, model))
        return found

    def fitting(self, model: Model) -> list[str]:
        """Return the methods that fit a model."""
        return [name for name in self.methods if model.misfit(name) is None]

    def indices(self, selector: str, measure: str, method: str | None = None) -> list[int]:
        """Return indices of the images of a collection that a measure uses: the first ones."""
        data = self.data[selector]
        if measure not in self.only.get(selector, self.measures) or (measure == "localisation" and not data.truth):
            return []
        if measure == "pixels" and self.options.fill == DROP:
            return []
        first = {"sanity": self.sanity_images, "pixels": self.pixel_images, "cost": 1, "picture": self.pictures}
        most = None if measure == "picture" else self.most.get(method or "")
        counts = [count for count in (first.get(measure), most) if count is not None]
        return data.chosen(self.half, self.limit)[: min(counts, default=None)]

    def key(self, data: Data, index: int, model: Model, method: str, measure: str) -> Key:
        """Return the store's key of a figure."""
        options = self.options.of(measure)
        return Key(data.identity, data.items[index].key, model.identity, method, measure, options)

    def tasks(self, store: Store) -> Iterator[Task]:
        """Yield the work that is not in the store yet, in chunks of images, by collection, then model."""
        for selector, model in self.pairs:
            methods = self.fitting(model)
            chosen = self.data[selector].chosen(self.half, self.limit)
            for start in range(0, len(chosen), CHUNK):
                part = range(start, min(start + CHUNK, len(chosen)))
                needs = {name: self._lacking(store, selector, model, name, chosen, part) for name in methods}
                if needs := {name: its for name, its in needs.items() if its}:
                    yield Task(selector, model, needs, self.options)

    def _lacking(
        self, store: Store, selector: str, model: Model, method: str, chosen: Sequence[int], part: Sequence[int]
    ) -> dict[int, tuple[str, ...]]:
        """Return the measures that the store lacks, by image."""
        data, found = self.data[selector], {}
        counts = {measure: len(self.indices(selector, measure, method)) for measure in self.measures}
        for place in part:
            index = chosen[place]
            keys = {measure: self.key(data, index, model, method, measure) for measure in self.measures}
            lacking = tuple(name for name, key in keys.items() if place < counts[name] and key not in store)
            if lacking:
                found[index] = lacking
        return found

    def check(self) -> None:
        """Check the plan before anything runs, and note what is left out.

        Raises:
            ValueError: a method fits no model, a target is not a class, or a label is missing.
        """
        for method in self.methods:
            reasons = {model.name: model.misfit(method) for model in self.models}
            wrong = {name: reason for name, reason in reasons.items() if reason is not None}
            if len(wrong) == len(reasons) and method not in self.unasked:
                raise ValueError(f"methods={method!r}: {next(iter(wrong.values()))}")
            self.notes += [f"{method} is left out: {reason}" for reason in wrong.values()]
            if method in self.most:
                self.notes.append(f"{method} gets the first {self.most[method]} images.")
        for selector, model in self.pairs:
            data = self.data[selector]
            model.explained(self.options)
            known = [index for index in class_indices(data, model.subject) if index is not None]
            if self.options.target == LABEL and not known:
                what = "the model has none of its classes" if data.classes else "it has no labels"
                raise ValueError(f"target='label': {data.name}: {what} ({model.name}); use target='predicted'.")
            if data.classes and not known:
                self.notes.append(
                    f"{data.name}: {model.name} has none of its classes, so there is no accuracy against labels."
                )
            elif len(known) < len(data.classes):
                unknown = len(data.classes) - len(known)
                self.notes.append(
                    f"{data.name}: {unknown} of its {len(data.classes)} classes {'is' if unknown == 1 else 'are'} not "
                    f"among {model.name}'s."
                )
        if "pixels" in self.measures and self.options.fill == DROP:
            self.notes.append("Single pixels cannot be dropped: no ranking of pixels.")
        self.notes += [f"{data.name}: {data.note}." for data in self.data.values() if data.note]
        self.notes += [
            f"{data.name} has no boxes and no masks: no localisation."
            for selector, data in self.data.items()
            if "localisation" in self.only.get(selector, self.measures) and not data.truth
        ]
