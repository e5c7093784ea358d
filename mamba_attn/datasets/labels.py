"""Which class of a model a label of a collection is; they rarely number their classes alike."""

import re

from mamba_attn.datasets.loaded_model import Subject
from mamba_attn.datasets.samples import Data
from mamba_attn.models import torchvision_repair

_IMAGENET = 1000
_SYNSET = re.compile(r"n\d{8}")


def class_indices(data: Data, subject: Subject) -> list[int | None]:
    """Return the model's class for every label: by ImageNet's index or WordNet's number where both have it, by name.

    None stands for a class that the model does not have; case does not matter; a name that two classes of the model
    share is not guessed.

    Args:
        data: whose labels.
        subject: whose classes.
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
