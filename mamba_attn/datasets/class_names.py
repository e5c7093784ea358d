"""The names of a model's classes: read from files, found by a user's word, matched with a collection's labels."""

import ast
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.samples import Data
from mamba_attn.errors import local_path, nearest

_IMAGENET = 1000
_SYNSET = re.compile(r"n\d{8}")


def read_names(given: str | Path | Sequence[str]) -> list[str]:
    """Return names of classes from a file, or those given.

    Args:
        given: names; or the path of a file: one name per line, or JSON: a list, {name: index}, {index: name}, or an
            object with one of these as "classes".

    Raises:
        ValueError: no such file, or not of these kinds.
    """
    if not isinstance(given, str | Path):
        return [str(name) for name in given]
    path = local_path("classes", given)
    if not path.is_file():
        raise ValueError(f"classes={str(given)!r}: there is no such file; expected one name per line, or JSON.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"classes={str(given)!r}: this file is not text.") from error
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        found: Any = json.loads(text)
    except ValueError:
        try:
            found = ast.literal_eval(text)  # a printed dict
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"classes={str(given)!r}: it begins like JSON, but is not ({error}).") from error
    found = found.get("classes", found) if isinstance(found, dict) else found
    names = _in_order(found)
    if not names:
        raise ValueError(
            f"classes={str(given)!r}: expected a list of names, or an object of names and their numbers from 0 on."
        )
    return names


def _in_order(found: Any) -> list[str]:
    """Return the names of a list, of {name: index} or of {index: name}; empty for anything else."""
    if isinstance(found, list):
        return [str(name) for name in found]
    if not isinstance(found, Mapping):
        return []
    by_index = {value: key for key, value in found.items()} if all(type(v) is int for v in found.values()) else found
    numbered = {int(index): name for index, name in by_index.items() if str(index).isdecimal()}
    return [str(numbered[index]) for index in range(len(numbered))] if sorted(numbered) == [*range(len(found))] else []


def names_for(count: int, *candidates: Sequence[str]) -> list[str]:
    """Return the first candidates of the right number; for 1000 classes ImageNet's if timm is installed; else numbers.

    Args:
        count: of the model's outputs.
        candidates: names, as files next to the weights list them.
    """
    for names in candidates:
        if names and len(names) == count:
            return [str(name) for name in names]
    if count == _IMAGENET and importlib.util.find_spec("timm") is not None:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo()
        return [str(info.index_to_description(index)).partition(",")[0] for index in range(count)]
    return [f"class {index}" for index in range(count)]


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


def class_indices(data: Data, subject: LoadedModel) -> list[int | None]:
    """Return the model's class for every label: by ImageNet's index or WordNet's number where both have it, by name.

    None stands for a class that the model does not have, or whose name two of its classes share. Case does not
    matter.

    Args:
        data: the collection with the labels.
        subject: the model with the classes.

    Example:
        >>> from mamba_attn.datasets import open_data
        >>> from mamba_attn.images import SAMPLES
        >>> class_indices(open_data(str(SAMPLES)), LoadedModel(torch.nn.Identity(), classes=["hat"]))  # no labels
        []
    """
    count = len(subject.classes)
    if count == _IMAGENET and data.imagenet is not None:
        return [index if 0 <= index < count else None for index in data.imagenet]
    return _found(data.classes, subject, synsets=is_imagenet(data))


def folder_class(image: Path, subject: LoadedModel) -> int | None:
    """Return the class whose name, or WordNet's number, the folder of an image bears; None if no class does.

    Args:
        image: the file.
        subject: the model with the classes.
    """
    name = image.absolute().parent.name
    return _found([name], subject, synsets=_SYNSET.fullmatch(name) is not None)[0]


def _found(names: Sequence[str], subject: LoadedModel, *, synsets: bool) -> list[int | None]:
    """Return the model's class for every name of a class, or WordNet's number of one."""
    if synsets and len(subject.classes) == _IMAGENET:
        by_synset = {name: index for index, name in enumerate(_synsets())}
        return [by_synset.get(name) for name in names]
    lowered = [name.casefold() for name in subject.classes]
    return [lowered.index(name) if lowered.count(name) == 1 else None for name in map(str.casefold, names)]


def is_imagenet(data: Data) -> bool:
    """Whether the classes are named by WordNet's numbers, as ImageNet's folders are."""
    return bool(data.classes) and all(_SYNSET.fullmatch(name) for name in data.classes)


def _synsets() -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo().label_names())  # type: ignore[no-untyped-call]
