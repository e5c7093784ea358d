"""What a run consists of: models, collections and methods, and the work that is not done yet."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property

import torch
from torch import nn

from mamba_attn import subjects
from mamba_attn.errors import nearest
from mamba_attn.evaluation import _catalogue as catalogue
from mamba_attn.evaluation.data import open_data
from mamba_attn.evaluation.labels import class_indices
from mamba_attn.evaluation.samples import Data
from mamba_attn.evaluation.store import Key, Store
from mamba_attn.subjects import Subject

MEASURES = ("perturbation", "pixels", "localisation", "sanity", "cost", "picture")
PREDICTED, LABEL = "predicted", "label"
CHUNK = 8  # images that one task explains in one batch


@dataclass(frozen=True)
class Options:
    """What the figures depend on besides image, model and method.

    Args:
        target: "predicted", "label", or the index or name of a class that is explained in every image.
        fill: what replaces removed pixels.
        stages: of the cascade of randomised models.
        seed: of everything random.
    """

    target: str = PREDICTED
    fill: str = "black"
    stages: int = 6
    seed: int = 0

    def of(self, measure: str) -> str:
        """Return those that a measure depends on, as text."""
        names = {"perturbation": ("target", "fill", "seed"), "pixels": ("target", "fill", "seed"),
                 "sanity": ("target", "stages", "seed")}.get(measure, ("target",))  # fmt: skip
        return json.dumps({name: value for name, value in asdict(self).items() if name in names})


@dataclass(frozen=True)
class Model:
    """A model of the comparison, as text: what a worker builds it from.

    Args:
        name: see ``mamba_attn.models.create``.
        weights: "demo", "official" or a file.
        device: "cpu" or "cuda".
    """

    name: str
    weights: str = "demo"
    device: str = "cpu"

    @classmethod
    def parse(cls, text: str, device: str = "cpu") -> "Model":
        """Read ``NAME`` or ``NAME=WEIGHTS``."""
        name, given, weights = text.partition("=")
        return cls(name, weights if given else "demo", device)

    @property
    def subject(self) -> Subject:
        """The model itself, built once per process; see ``subjects.load`` for the errors."""
        return _subject(self)

    @property
    def identity(self) -> str:
        """Name and hash of the weights, as results are filed under it."""
        return f"{self.name}:{_weights_hash(self)}"

    def explained(self, options: Options) -> int | None:
        """Return the class that ``target`` names; None for "predicted" and "label".

        Raises:
            ValueError: no such class.
        """
        if options.target in (PREDICTED, LABEL):
            return None
        return subjects.parse_target(options.target, self.subject)


@dataclass(frozen=True)
class Task:
    """What a worker does at once: some images of a collection, one model.

    Args:
        selector: of the collection.
        model: by name.
        needs: by method, the measures that every image lacks, by the image's index.
        options: of the run.
    """

    selector: str
    model: Model
    needs: Mapping[str, Mapping[int, tuple[str, ...]]]
    options: Options

    @property
    def records(self) -> int:
        """How many lines it will give."""
        return sum(len(measures) for its in self.needs.values() for measures in its.values())


@dataclass
class Plan:
    """A whole comparison.

    Args:
        models: to compare.
        selectors: of the collections.
        methods: names in the catalogue.
        measures: some of ``MEASURES``.
        options: of the run.
        half: of the images, or "all".
        limit: images per collection.
        sanity_images: so many of them for the sanity checks.
        pictures: so many of them are shown.
        notes: what was left out, and why, in sentences.
    """

    models: Sequence[Model]
    selectors: Sequence[str]
    methods: Sequence[str]
    measures: Sequence[str] = MEASURES
    options: Options = field(default_factory=Options)
    half: str = "all"
    limit: int | None = None
    sanity_images: int = 8
    pictures: int = 6
    notes: list[str] = field(default_factory=list)

    @cached_property
    def data(self) -> dict[str, Data]:
        """The collections by selector; see ``open_data`` for the errors."""
        return {selector: open_data(selector) for selector in dict.fromkeys(self.selectors)}

    @cached_property
    def pairs(self) -> list[tuple[str, Model]]:
        """The selectors and models that go together: every model with every collection that it knows.

        A model is left out of a collection none of whose classes it knows if another model knows them and it has
        another collection; alone with it, it is still asked for its predicted class.
        """
        knows = {(s, m): not d.classes or any(i is not None for i in class_indices(d, m.subject))
                 for s, d in self.data.items() for m in self.models}  # fmt: skip
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
        return [name for name in self.methods if _misfit(name, model.subject.model) is None]

    def indices(self, data: Data, measure: str) -> list[int]:
        """Return the images of a collection that a measure is taken on."""
        chosen = data.chosen(self.half, self.limit)
        if measure == "localisation" and not data.truth:
            return []
        return chosen[: {"sanity": self.sanity_images, "cost": 1, "picture": self.pictures}.get(measure, len(chosen))]

    def key(self, data: Data, index: int, model: Model, method: str, measure: str) -> Key:
        """Return where a figure is filed."""
        options = self.options.of(measure)
        return Key(data.identity, data.items[index].key, model.identity, method, measure, options)

    def tasks(self, store: Store) -> Iterator[Task]:
        """Yield what is not in the store yet, in chunks of images; collections in turn, models within."""
        for selector, model in self.pairs:
            data, methods = self.data[selector], self.fitting(model)
            taken = {measure: set(self.indices(data, measure)) for measure in self.measures}
            chosen = data.chosen(self.half, self.limit)
            for start in range(0, len(chosen), CHUNK):
                needs = {}
                for method in methods:
                    lacking = {
                        index: tuple(
                            measure for measure in self.measures
                            if index in taken[measure] and self.key(data, index, model, method, measure) not in store
                        )
                        for index in chosen[start : start + CHUNK]
                    }  # fmt: skip
                    if lacking := {index: measures for index, measures in lacking.items() if measures}:
                        needs[method] = lacking
                if needs:
                    yield Task(selector, model, needs, self.options)

    def check(self) -> None:
        """Find what cannot work before anything runs, and note what is left out.

        Raises:
            ValueError: a method that fits none of the models, a target that is no class or a label that is missing.
        """
        for method in self.methods:
            reasons = {model.name: _misfit(method, model.subject.model) for model in self.models}
            wrong = {name: reason for name, reason in reasons.items() if reason is not None}
            if len(wrong) == len(reasons):
                name, reason = next(iter(wrong.items()))
                raise ValueError(f"--methods {method}: {name} does not fit: {reason}")
            self.notes += [f"{method} is left out for {name}: {reason}" for name, reason in wrong.items()]
        for selector, model in self.pairs:
            data = self.data[selector]
            model.explained(self.options)
            known = [index for index in class_indices(data, model.subject) if index is not None]
            if self.options.target == LABEL and not known:
                what = "none of its classes is one of the model's" if data.classes else "it has no labels"
                raise ValueError(f"--target label: {data.name}: {what} ({model.name}); use --target predicted.")
            if data.classes and not known:
                self.notes.append(f"{data.name}: none of its classes is one of {model.name}'s, so that there is no "
                                  "accuracy against labels.")  # fmt: skip
            elif len(known) < len(data.classes):
                self.notes.append(f"{data.name}: {len(data.classes) - len(known)} of its {len(data.classes)} classes "
                                  f"are none of {model.name}'s.")  # fmt: skip
        self.notes += [f"{data.name}: {data.note}." for data in self.data.values() if data.note]
        if "localisation" in self.measures:
            self.notes += [f"{data.name} has neither boxes nor masks: no localisation." for data in self.data.values()
                           if not data.truth]  # fmt: skip


def choose_methods(text: str) -> list[str]:
    """Return the names of methods.

    Args:
        text: "all", or names separated by commas, in any case.

    Raises:
        ValueError: an unknown name.
    """
    known = {name.lower(): name for name in catalogue.ENTRIES}
    if text.strip().lower() == "all":
        return list(catalogue.ENTRIES)
    found = []
    for name in filter(None, map(str.strip, text.split(","))):
        if name.lower() not in known:
            raise ValueError(f"--methods {name}: no such method. {nearest(name, catalogue.ENTRIES)}")
        found.append(known[name.lower()])
    if not found:
        raise ValueError(f"--methods {text!r}: expected 'all' or names. {nearest('', catalogue.ENTRIES)}")
    return list(dict.fromkeys(found))


@cache
def _subject(model: Model) -> Subject:
    return subjects.load(model.name, model.weights, model.device)


@cache
def _weights_hash(model: Model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.subject.model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _misfit(method: str, model: nn.Module) -> str | None:
    return catalogue.ENTRIES[method].misfit(model)
