"""LoadedModel: a model with its transform and class names, built by name; mapping of a collection's labels."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mamba_attn import models
from mamba_attn.datasets.samples import Data
from mamba_attn.errors import nearest
from mamba_attn.models import registry, torchvision_repair
from mamba_attn.models.transforms import EvaluationTransform
from mamba_attn.tracing.adapters import AttentionAdapter, find_mixers

NO_COMPANION = "none"
_COMPANION = "vit_micro"  # of the micro models; the package has none for other sizes
_IMAGENET = 1000
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model to explain.

    Args:
        name: of the model.
        model: in eval mode.
        classes: the names of its classes.
        transform: from an image to the model's input.
        weights: "demo", "official" or a file; "" when the model was made in memory.
        options: the options of ``mamba_attn.models.create`` that built it.
    """

    name: str
    model: nn.Module
    classes: list[str]
    transform: EvaluationTransform
    weights: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers that can be traced, first to last."""
        return list(find_mixers(self.model))

    @cached_property
    def is_transformer(self) -> bool:
        """Whether all layers are softmax attention, as in a ViT."""
        return all(isinstance(adapter, AttentionAdapter) for _, adapter in find_mixers(self.model).values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and their names."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode() + flat.numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def load(name: str, weights: str, device: str = "cpu") -> LoadedModel:
    """Build a model with its weights.

    Args:
        name: see ``mamba_attn.models.create``.
        weights: "demo", "official" or a file; a .json card next to it, as ``benchmarks/train.py`` writes it, gives
            the model's options and the names of the classes.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown name, a missing device, an invalid card.
        WeightsError: weights are absent or do not fit.
    """
    require_device(device)
    card: dict[str, Any] = {}
    if weights == "demo" and name in registry.demos():
        card = registry.demo_card(name)
    card_file = Path(weights).with_suffix(".json")
    if weights not in ("demo", "official") and card_file.is_file():
        card = _card(card_file)
    options = card.get("options", {})
    model = models.create(name, weights=weights, **options)
    transform = models.transform(name, cast(tuple[int, int], model.image_size))
    return LoadedModel(name, model.to(device), _class_names(model, card), transform, weights, options)


def require_device(device: str) -> None:
    """Refuse a missing CUDA device.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError: PyTorch sees no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': PyTorch sees no CUDA device here; use device='cpu'.")


def load_companion(name: str | None, subject: LoadedModel, device: str = "cpu") -> LoadedModel | None:
    """Build the model to show next to another one, with its demo weights.

    Args:
        name: of the model, or "none". Default: for micro models, a ViT of the same size.
        subject: the model to compare with.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown name.
        WeightsError: no demo weights for this name.
    """
    if name is None:
        fits = subject.name.endswith("_micro") and not subject.is_transformer and _COMPANION in registry.demos()
        name = _COMPANION if fits else NO_COMPANION
    return None if name == NO_COMPANION else load(name, "demo", device)


def parse_target(target: str | None, subject: LoadedModel) -> int | None:
    """Return the index of a class; None for None.

    Args:
        target: an index, or a name in any case.
        subject: the model whose classes these are.

    Raises:
        ValueError: no such class, or several of this name.
    """
    if target is None:
        return None
    lowered = [name.lower() for name in subject.classes]
    named = [index for index, name in enumerate(lowered) if name == target.lower()]
    if len(named) > 1:
        numbers = " and ".join(map(str, named))
        raise ValueError(f"target={target!r}: the classes {numbers} have this name; give the index.")
    if named:
        return named[0]
    if target.isdecimal() and int(target) < len(lowered):
        return int(target)
    known = f"{subject.name} knows {len(lowered)} classes, 0..{len(lowered) - 1}. "
    raise ValueError(f"target={target!r}: no such class; {known}{nearest(target.lower(), lowered)}")


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this card of the weights is not JSON ({error}).") from error
    card = card if isinstance(card, dict) else {"options": None}
    found = {"options": card.get("options", {}), "classes": card.get("classes", [])}
    fits = isinstance(found["options"], dict) and isinstance(found["classes"], list)
    if not fits:
        raise ValueError(f"{path}: expected a card with 'options' (an object) and 'classes' (a list of names).")
    return found


def _class_names(model: nn.Module, card: dict[str, Any]) -> list[str]:
    """Return the card's names; for 1000 classes ImageNet's if timm is installed; else numbers."""
    count = int(getattr(model, "num_classes", 0))
    names = [str(name) for name in card.get("classes", [])]
    if len(names) == count:
        return names
    if count == 1000 and importlib.util.find_spec("timm") is not None:
        torchvision_repair.prepare()
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo()
        return [str(info.index_to_description(index)).partition(",")[0] for index in range(count)]
    return [f"class {index}" for index in range(count)]


def class_indices(data: Data, subject: LoadedModel) -> list[int | None]:
    """Return the model's class for every label: by ImageNet's index or WordNet's number where both have it, by name.

    None stands for a class that the model does not have, or whose name two of its classes share. Case does not
    matter.

    Args:
        data: the collection with the labels.
        subject: the model with the classes.
    """
    count = len(subject.classes)
    if count == _IMAGENET and data.imagenet is not None:
        return [index if 0 <= index < count else None for index in data.imagenet]
    if count == _IMAGENET and is_imagenet(data):
        by_synset = {name: index for index, name in enumerate(_synsets())}
        return [by_synset.get(name) for name in data.classes]
    lowered = [name.casefold() for name in subject.classes]
    return [lowered.index(name) if lowered.count(name) == 1 else None for name in map(str.casefold, data.classes)]


def is_imagenet(data: Data) -> bool:
    """Whether the classes are named by WordNet's numbers, as ImageNet's folders are."""
    return bool(data.classes) and all(_SYNSET.fullmatch(name) for name in data.classes)


def _synsets() -> list[str]:
    torchvision_repair.prepare()
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo().label_names())  # type: ignore[no-untyped-call]
