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
Wanted = Sequence[tuple[str, Sequence[tuple[str, int, str]]]]  # of every method: measures, images and options
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

    @cached_property
    def chosen(self) -> dict[str, list[int]]:
        """Indices of the images of every collection that are compared, by selector."""
        return {selector: data.chosen(self.half, self.limit) for selector, data in self.data.items()}

    def indices(self, selector: str, measure: str, method: str | None = None) -> list[int]:
        """Return indices of the images of a collection that a measure uses: the first ones."""
        return self.chosen[selector][: self._count(selector, measure, method)]

    def _count(self, selector: str, measure: str, method: str | None = None) -> int:
        """Return how many images of a collection a measure uses."""
        if measure not in self.only.get(selector, self.measures):
            return 0
        if (measure == "localisation" and not self.data[selector].truth) or (
            measure == "pixels" and self.options.fill == DROP
        ):
            return 0
        first = {"sanity": self.sanity_images, "pixels": self.pixel_images, "cost": 1, "picture": self.pictures}
        most = None if measure == "picture" else self.most.get(method or "")
        counts = [count for count in (first.get(measure), most) if count is not None]
        return min([len(self.chosen[selector]), *counts])

    def key(self, data: Data, index: int, model: Model, method: str, measure: str) -> Key:
        """Return the store's key of a figure."""
        options = self.options.of(measure)
        return Key(data.identity, data.items[index].key, model.identity, method, measure, options)

    def tasks(self, store: Store) -> Iterator[Task]:
        """Yield the work that is not in the store yet, in chunks of images, by collection, then model."""
        for selector, model in self.pairs:
            wanted = self._wanted(selector, model)
            for start in range(0, len(self.chosen[selector]), CHUNK):
                task = self.task(selector, model, start, start + CHUNK, store, wanted)
                if task is not None:
                    yield task

    def task(
        self, selector: str, model: Model, start: int, stop: int, store: Store, wanted: Wanted | None = None
    ) -> Task | None:
        """Return what a store lacks of some images of a pair; None if that is nothing.

        Args:
            selector: of the collection.
            model: of the pair.
            start: place of the first image among those that are compared.
            stop: behind the last.
            store: existing results.
            wanted: what is measured of the pair, where it is known already.
        """
        data, identity = self.data[selector], model.identity
        of, fresh = data.identity, not len(store)
        images = [
            (at, index, data.items[index].key) for at, index in enumerate(self.chosen[selector][start:stop], start)
        ]
        needs: dict[str, dict[int, tuple[str, ...]]] = {}
        for method, measures in self._wanted(selector, model) if wanted is None else wanted:
            here = [each for each in measures if start < each[1]]
            for at, index, key in images:
                lacking = [
                    name
                    for name, count, options in here
                    if at < count and (fresh or (of, key, identity, method, name, options) not in store)
                ]
                if lacking:
                    needs.setdefault(method, {})[index] = tuple(lacking)
        return Task(selector, model, needs, self.options) if needs else None

    def keys(self, task: Task) -> list[Key]:
        """Return the store's keys of all lines of a task."""
        data = self.data[task.selector]
        return [
            self.key(data, index, task.model, method, measure)
            for method, its in task.needs.items()
            for index, measures in its.items()
            for measure in measures
        ]

    def _wanted(self, selector: str, model: Model) -> Wanted:
        """Return the methods of a pair with their measures, each with the number of its images and its options."""
        options = {measure: self.options.of(measure) for measure in self.measures}
        return [
            (name, [(each, self._count(selector, each, name), options[each]) for each in self.measures])
            for name in self.fitting(model)
        ]

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
