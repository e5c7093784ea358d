"""What is compared, from text: models with their weights, methods by name, and what all figures depend on."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache

import torch

from mamba_attn import subjects
from mamba_attn.attribution import catalogue
from mamba_attn.errors import nearest
from mamba_attn.subjects import Subject

PREDICTED, LABEL = "predicted", "label"


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


def choose_methods(text: str) -> list[str]:
    """Return the names of methods.

    Args:
        text: "all", or names separated by commas, in any case.

    Raises:
        ValueError: an unknown name.
    """
    known = {name.lower(): name for name in catalogue.METHODS}
    if text.strip().lower() == "all":
        return list(catalogue.METHODS)
    found = []
    for name in filter(None, map(str.strip, text.split(","))):
        if name.lower() not in known:
            raise ValueError(f"--methods {name}: no such method. {nearest(name, catalogue.METHODS)}")
        found.append(known[name.lower()])
    if not found:
        raise ValueError(f"--methods {text!r}: expected 'all' or names. {nearest('', catalogue.METHODS)}")
    return list(dict.fromkeys(found))


def misfit(method: str, model: Model) -> str | None:
    """Return why a method does not fit a model, and which would; None if it does."""
    return catalogue.refusal(method, model.subject.model, model.name)


@cache
def _subject(model: Model) -> Subject:
    return subjects.load(model.name, model.weights, model.device)


@cache
def _weights_hash(model: Model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.subject.model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
