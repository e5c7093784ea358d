"""Parses what to compare: models with their weights, methods by name, and options that figures depend on."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mamba_attn.attribution import MapAttribution, catalogue, spec
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets import loading
from mamba_attn.datasets.class_names import parse_target
from mamba_attn.datasets.made_of import made_of
from mamba_attn.errors import ModelBuildError, nearest
from mamba_attn.evaluation.ranking import token_cell
from mamba_attn.models import registry
from mamba_attn.tracing.door_layers import AnyLayout

PREDICTED, LABEL = "predicted", "label"
CONTROL = "random"
# raised by models, methods and images; captum asserts
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, MemoryError)


def reason_of(error: BaseException) -> str:
    """Return why something failed, in one line that results and notes can hold.

    Args:
        error: what was raised.
    """
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:400]


@dataclass(frozen=True)
class Options:
    """Options that the figures depend on, in addition to image, model and method.

    Args:
        target: "predicted", "label", or the index or name of a class that is explained in every image.
        fill: what replaces removed pixels.
        precision: of the model's answers in perturbation; maps are always float32.
        stages: of the cascade of randomised models.
        seed: of everything random.
        others: number of other images with whose objects a map is compared.
    """

    target: str = PREDICTED
    fill: str = "black"
    precision: str = "float32"
    stages: int = 6
    seed: int = 0
    others: int = 50

    def of(self, measure: str) -> str:
        """Return the options that a measure depends on, as text."""
        more = {
            "perturbation": ("fill", "seed"),
            "pixels": ("fill", "seed"),
            "sanity": ("stages", "seed"),
            "localisation": ("others",),
        }
        names = ("target", "precision", *more.get(measure, ()))
        return json.dumps({name: value for name, value in asdict(self).items() if name in names})


@dataclass(frozen=True)
class Model:
    """A model of the comparison, as text; loaded once per object, on demand, and freed with it.

    Args:
        name: see ``mamba_attn.load``.
        weights: as there; "" for its default.
        device: "cpu" or "cuda".
        more: further arguments of ``mamba_attn.load``, and their values.
        known: the fingerprint of its weights where another process has loaded it; "" where none has.
    """

    name: str
    weights: str = "demo"
    device: str = "cpu"
    more: tuple[tuple[str, Any], ...] = ()
    known: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str, device: str = "cpu") -> "Model":
        """Read ``NAME`` or ``NAME=WEIGHTS``.

        Raises:
            ValueError: nothing after the equals sign.
        """
        name, given, weights = text.partition("=")
        if given and not weights:
            raise ValueError(f"models={text!r}: expected demo, official or a file after the =.")
        return cls(name, weights if given else "demo" if name in registry.names() else "", device)

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Model":
        """Take a model that is in memory; it cannot go to other processes.

        Args:
            loaded: complete, with its transform and classes.
        """
        made = cls(str(loaded.name), loaded.fingerprint, loaded.device.type)
        vars(made)["subject"] = loaded
        return made

    def __reduce__(self) -> tuple[type["Model"], tuple[Any, ...]]:
        """Pickle as text and a fingerprint, without the loaded model."""
        return Model, (self.name, self.weights, self.device, self.more, self.subject.fingerprint)

    @cached_property
    def subject(self) -> LoadedModel:
        """The model itself, loaded at first access; see ``mamba_attn.load`` for the errors.

        Weights that are drawn at random are the same in every process and every run, which keys of results need.

        Raises:
            ModelBuildError: other weights than in the process that loaded it first.
        """
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)
            if self.known:
                warnings.simplefilter("ignore")  # said where it was loaded first
            found = loading.load(self.name, self.weights or None, device=self.device, **dict(self.more))
            found = found if found.reads == "text" else loading.complete(found)
        if self.known and found.fingerprint != self.known:
            raise ModelBuildError(
                f"{self.name}: its weights differ between processes, so their results cannot be combined; give it a "
                "file of weights, draw them with torch's random generator alone, or use workers=1."
            )
        return found

    @property
    def identity(self) -> str:
        """Name and hash of the weights: the key of stored results."""
        return f"{self.name}:{self.subject.fingerprint}"

    def explained(self, options: Options) -> int | None:
        """Return the class that ``target`` names; None for "predicted" and "label".

        Raises:
            ValueError: no such class.
        """
        if options.target in (PREDICTED, LABEL):
            return None
        return parse_target(options.target, self.subject)

    def misfit(self, method: str) -> str | None:
        """Return why a method does not fit this model, and which one does; None if it fits. Also tries its options."""
        if method not in self._misfits:
            self._misfits[method] = self._refusal(method)
        return self._misfits[method]

    def cell(self, size: tuple[int, int]) -> int:
        """Return the side of the ranked cells of an image of (rows, columns), in pixels."""
        if size not in self._cells:
            channels = len(self.subject.transform.mean)
            empty = torch.zeros(1, channels, *size, device=self.subject.device)
            self._cells[size] = token_cell(self.subject.model, empty, self.subject.layout)
        return self._cells[size]

    @cached_property
    def _misfits(self) -> dict[str, str | None]:
        return {}

    @cached_property
    def _cells(self) -> dict[tuple[int, int], int]:
        return {}

    def _refusal(self, method: str) -> str | None:
        its, subject = spec.method(method, "methods"), self.subject
        refusal = catalogue.refusal(its.name, subject.model, self.name, made_of(subject))
        if refusal is None and its.options:
            try:
                its.build(subject.model, layout=subject.layout).attribute(subject.transform.blank().to(subject.device))
            except FAILURES as error:
                return str(error) or type(error).__name__
        return refusal


def choose_methods(texts: Sequence[str]) -> tuple[list[str], dict[str, int], set[str]]:
    """Return the methods' keys, some methods' largest numbers of images, and methods that only "all" includes.

    Args:
        texts: "all", names separated by commas, or one method with options each, ``NAME:OPTION=VALUE,OPTION``; every
            name may end in ``@N``, a number of images. A method named after "all" replaces its plain form.

    Raises:
        ValueError: an unknown name, option or value, or no methods.
    """
    pieces = [piece for text in texts for piece in ([text] if ":" in text else text.split(","))]
    found: list[str] = []
    most: dict[str, int] = {}
    asked: set[str] = set()
    for piece in filter(None, map(str.strip, pieces)):
        if piece.lower() == "all":
            found += catalogue.METHODS
            continue
        text, at, count = piece.rpartition("@") if "@" in piece else (piece, "", "")
        if at and not (count.isdecimal() and int(count)):
            raise ValueError(f"methods={piece!r}: expected a number of images after @.")
        name, colon, rest = text.partition(":")
        its = spec.method(name.lower() + colon + rest, "methods")
        if its.name in found and its.key != its.name and "all" in map(str.lower, texts):
            found.remove(its.name)
        found.append(its.key)
        asked.add(its.key)
        if at:
            most[its.key] = int(count)
    if not found:
        raise ValueError(f"methods={' '.join(texts)!r}: expected 'all' or names. {nearest('', catalogue.METHODS)}")
    return list(dict.fromkeys(found)), most, set(found) - asked


def with_control(methods: Sequence[str]) -> list[str]:
    """Return methods and, if it is not among them, the random map, which every figure of the others is read against.

    Args:
        methods: keys.
    """
    return [*methods, *([] if any(spec.method(key, "methods").name == CONTROL for key in methods) else [CONTROL])]


def build(method: str, model: nn.Module, layout: AnyLayout | None = None) -> MapAttribution:
    """Construct a method for a model, and the token frame where that cannot be measured."""
    return spec.method(method, "methods").build(model, layout=layout)
