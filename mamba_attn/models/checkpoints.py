"""Loads weights by fit: of all tensors in a file, those whose names and shapes fit a model best.

Files differ in where the weights lie ("model", "state_dict", "net", nested or bare) and in what stands before the names
("module.", "model.", "_orig_mod.", "backbone.", ...). Neither is listed here: every dict of tensors in the file is
tried with every prefix of its names, and the longest common fit is taken. Where the weights and their moving average
(EMA) fit equally, the weights are taken. What is adapted to the model is said, as a warning.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import WeightsError
from mamba_attn.models.vim import VisionMamba, resize_positions
from mamba_attn.models.vit import position_layout
from mamba_attn.models.weight_files import read

_DEPTH = 4  # of dicts in dicts that are searched
_AVERAGE = re.compile(r"(^|[^a-z])(ema|swa|averaged?)([^a-z]|$)|(^|[._])(ema|swa)", re.IGNORECASE)
_COUNTERS = ("total_ops", "total_params")  # thop leaves them in the models that it measures
_NOT_WEIGHTS = ("n_averaged", "num_batches_tracked", "total_ops", "total_params")
# names in the first VMamba release, and in the one-file VMamba, and today's
_RENAMED = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    (r"\.(x_proj|dt_projs)\.weight$", r".\1_weight"),
    (r"\.downsample\.1\.", ".downsample.norm."),
    (r"\.downsample\.2\.", ".downsample.reduction."),
)
_CLASSES = ("classes", "class_names", "CLASSES", "labels", "names", "idx_to_class", "id2label", "class_to_idx")
_HEAD = re.compile(r"(^|\.)(head|heads|fc|classifier|cls_head|last_linear)(\.\w+)?\.weight$")
_FLOAT8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))


@dataclass(frozen=True)
class Fit:
    """The tensors of a file that fit a model best.

    Args:
        tensors: by the model's names; those that it does not know keep their own.
        entry: where they lie in the file, e.g. "state_dict"; "" for the file itself.
        prefix: what was cut off their names.
        left: names of the tensors next to them without this prefix.
        rivals: other entries and prefixes that fit as well, e.g. "model_ema".
        matching: number of tensors with the model's name and shape.
    """

    tensors: dict[str, Tensor]
    entry: str
    prefix: str
    left: list[str]
    rivals: list[str]
    matching: int

    @property
    def place(self) -> str:
        """Where the tensors lie, in words."""
        return _place(self.entry, self.prefix)

    def notes(self) -> list[str]:
        """Return what a reader must know about the choice, in sentences."""
        found = []
        averages = [each for each in self.rivals if _is_average(each)]
        others = [each for each in self.rivals if not _is_average(each)]
        if _is_average(self.place):
            found.append(f"it holds these weights only as a moving average, {self.place!r}")
        elif averages:
            found.append(f"took {self.place!r}, not the moving average {averages[0]!r}")
        if others:
            found.append(f"took {self.place!r}; {', '.join(map(repr, others[:3]))} fits as well")
        left = sorted({name.partition(".")[0] for name in self.left if not name.endswith(_NOT_WEIGHTS)})
        if left:
            shown = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
            count = f"{len(self.left)} tensor{'s' if len(self.left) > 1 else ''}"
            found.append(f"took {self.place!r} and left out {count} outside it ({shown})")
        return found


class Checkpoint:
    """A file of weights.

    Args:
        path: of the file; ``FILE:ENTRY`` takes only the tensors of one entry, e.g. ``best.pth:model_ema``.

    Raises:
        WeightsError: as ``read``; or the file holds no tensors with names, or no such entry.
    """

    def __init__(self, path: str | Path) -> None:
        file, colon, entry = str(path).rpartition(":")
        chosen = entry if colon and not Path(path).is_file() and Path(file).is_file() else ""
        self.path = Path(file if chosen else path)
        self.content = read(self.path)
        self.entries = dict(_dicts(self.content))
        if chosen:
            there = [name for name in self.entries if name]
            self.entries = {name: its for name, its in self.entries.items() if name == chosen}
            if not self.entries:
                raise WeightsError(f"{self.path}: it has no tensors in {chosen!r}. Its entries: {', '.join(there)}.")
        if not self.entries:
            numbered = any(isinstance(each, Tensor) for each in _values(self.content))
            what = "tensors without names, keyed by numbers" if numbered else "no tensors"
            raise WeightsError(
                f"read({str(self.path)!r}): this file contains {what}; expected a state dict of a model."
            )

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, where the file holds them next to the weights; else empty."""
        return next(_class_lists(self.content, _DEPTH), [])

    def fit(self, expected: Mapping[str, Tensor]) -> Fit:
        """Return the tensors that fit a model best.

        Args:
            expected: the model's state, possibly on the meta device.
        """
        found = [
            (self._score(entry, prefix, named, expected), entry, prefix, named)
            for entry, tensors in self.entries.items()
            for prefix, named in _readings(tensors, expected)
        ]
        best, entry, prefix, named = max(found, key=lambda each: each[0])
        place = _place(entry, prefix)
        rivals = [_place(*each[1:3]) for each in found if each[0][:2] == best[:2] and _place(*each[1:3]) != place]
        left = [name for name in self.entries[entry] if not name.startswith(prefix)]
        return Fit(named, entry, prefix, left, rivals if best[0] else [], best[0])

    @staticmethod
    def _score(
        entry: str, prefix: str, named: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> tuple[int, int, bool, int]:
        known = [name for name in named if name in expected]
        same = sum(named[name].numel() == expected[name].numel() for name in known)
        return same, len(known), not _is_average(_place(entry, prefix)), -len(prefix) - len(entry)


def load(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model, all of it.

    Names of older VMamba releases and of the one-file VMamba are translated, 1x1 convolutions read as matrices, and
    position embeddings made for another (square) image size interpolated bicubically, as the model itself does.

    Args:
        model: the model; its type and device stay.
        path: see ``Checkpoint``.

    Raises:
        WeightsError: weights that do not fit, with the keys; and what ``read`` raises.

    Warns:
        UserWarning: what was adapted: the choice between weights and their moving average, tensors left out, resized
            position embeddings, another type of numbers.
    """
    checkpoint = Checkpoint(path)
    for note in fill(model, checkpoint, checkpoint.fit(model.state_dict())):
        warnings.warn(note, stacklevel=2)


def fill(model: nn.Module, checkpoint: Checkpoint, found: Fit) -> list[str]:
    """Copy the tensors of a file into a model, and return what was adapted, in sentences.

    Args:
        model: the model; its type and device stay.
        checkpoint: the file.
        found: its tensors that fit this model.

    Raises:
        WeightsError: weights that do not fit, with the keys.
    """
    expected = model.state_dict()
    state, notes = {}, found.notes()
    for name, value in found.tensors.items():
        wanted = expected.get(name)
        if wanted is None and name.endswith(_COUNTERS):
            continue
        if wanted is not None:
            _require_numbers(checkpoint.path, name, value, wanted)
        state[name] = _fit(model, name, value, wanted)
        if name == "pos_embed" and wanted is not None and value.shape != state[name].shape:
            notes.append(_resized(model, value, wanted))
    state |= {name: expected[name] for name in expected if name.endswith("num_batches_tracked") and name not in state}
    _check(model, checkpoint.path, state, expected)
    types = {
        (str(value.dtype), str(expected[name].dtype))
        for name, value in state.items()
        if value.is_floating_point() and value.dtype != expected[name].dtype
    }
    notes += [f"its numbers are {its[6:]}, and were cast to the model's {own[6:]}" for its, own in sorted(types)]
    model.load_state_dict(state)
    return [f"{checkpoint.path}: {note}." for note in notes]


def head_of(names: Mapping[str, Any]) -> str | None:
    """Return the name of the classifier's weight; None without one.

    Args:
        names: the state of a model, or of a file, by name.
    """
    found = [name for name in names if _HEAD.search(name) and getattr(names[name], "ndim", 2) == 2]
    return found[-1] if found else None


def side_of(model: nn.Module, positions: Tensor) -> int | None:
    """Return the side of the square grid that position embeddings were made for; None if the grid is no square.

    Args:
        model: with position embeddings.
        positions: (1, tokens, features), of a file.
    """
    wanted = _layout(model)
    if wanted is None or positions.ndim != 3:
        return None
    patches = positions.shape[1] - len(wanted.class_tokens)
    side = math.isqrt(max(patches, 0))
    return side if side and side * side == patches else None


def _place(entry: str, prefix: str) -> str:
    """Return an entry and a prefix in words."""
    return ".".join(part for part in (entry, prefix.removesuffix(".")) if part) or "the file"


def _is_average(place: str) -> bool:
    return _AVERAGE.search(place) is not None


def _values(content: Any) -> list[Any]:
    return list(content.values()) if isinstance(content, Mapping) else []


def _dicts(content: Any, entry: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dict with named tensors, with where it lies: outer ones first."""
    if not isinstance(content, Mapping):
        return
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)}
    if tensors:
        yield entry, tensors
    if depth:
        for key, value in content.items():
            yield from _dicts(value, f"{entry}.{key}" if entry else str(key), depth - 1)


def _class_lists(content: Any, depth: int) -> Iterator[list[str]]:
    if not isinstance(content, Mapping):
        return
    for key in _CLASSES:
        named = content.get(key)
        if isinstance(named, Mapping) and named and all(isinstance(each, str) for each in named.values()):
            yield [named[each] for each in sorted(named, key=lambda each: int(each) if str(each).isdecimal() else 0)]
        elif isinstance(named, Mapping) and named and all(type(each) is int for each in named.values()):
            yield sorted(map(str, named), key=named.__getitem__)
        elif isinstance(named, list | tuple) and named and all(isinstance(each, str) for each in named):
            yield list(named)
    if depth:
        for value in content.values():
            yield from _class_lists(vars(value) if hasattr(value, "__dict__") else value, depth - 1)


def _readings(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield ways to read the names: what is cut off, and the tensors by the model's names.

    Either the file's names go on further to the left than the model's, or the model's further than the file's.
    """
    cut: Counter[str] = Counter({"": 1})
    for name in tensors:
        for start in _starts(name):
            cut[name[:start]] += _translate(name[start:], expected) in expected
    for prefix, _ in cut.most_common(8):
        inside = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        if inside:
            yield prefix, {_translate(name, expected): value for name, value in inside.items()}
    if max(cut.values()) > len(tensors) // 2:
        return
    common = _common(list(tensors))
    short = {name[len(common) :]: value for name, value in tensors.items()}
    put: Counter[str] = Counter(name[:start] for name in expected for start in _starts(name) if name[start:] in short)
    for prefix, _ in put.most_common(3):
        yield common, {f"{prefix}{name}": value for name, value in short.items()}


def _starts(name: str) -> list[int]:
    """Return where the parts of a dotted name begin."""
    return [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]


def _common(names: Sequence[str]) -> str:
    """Return the parts that all names begin with, as wrappers add them."""
    first = names[0].split(".")
    shared = 0
    while shared < len(first) - 1 and all(name.startswith(".".join(first[: shared + 1]) + ".") for name in names):
        shared += 1
    return "".join(f"{part}." for part in first[:shared])


def _translate(key: str, expected: Mapping[str, Tensor]) -> str:
    """Return the model's name for a tensor; the given name if there is no other."""
    name = key
    for pattern, replacement in _RENAMED:
        if name not in expected:
            name = re.sub(pattern, replacement, name)
    return name if name in expected else key


def _require_numbers(path: Path, name: str, value: Tensor, wanted: Tensor) -> None:
    """Refuse tensors that hold no numbers, or not the model's."""
    reason = ""
    if value.is_meta:
        reason = "is on the meta device, so the file holds its shape but not its numbers; save the loaded model"
    elif value.layout is not torch.strided:
        reason = "is sparse; save it with .to_dense()"
    elif wanted.is_floating_point() and (not value.is_floating_point() or value.dtype in _FLOAT8):
        kind = str(value.dtype).removeprefix("torch.")
        reason = f"is {kind}, so the weights are quantised; save them in float32, float16 or bfloat16"
    if reason:
        raise WeightsError(f"{path}: {name} {reason}.")


def _fit(model: nn.Module, name: str, value: Tensor, expected: Tensor | None) -> Tensor:
    """Reshape a tensor to the model's shape if both mean the same."""
    if expected is None or value.shape == expected.shape:
        return value
    if name.endswith(("x_proj_weight", "dt_projs_weight")) and value.numel() == expected.numel():
        return value.view(expected.shape)  # stacked routes
    if value.ndim == 4 and value.shape == (*expected.shape, 1, 1):
        return value.view(expected.shape)
    if name == "pos_embed" and value.ndim == 3:
        return _resize(model, value)
    return value


def _layout(model: nn.Module) -> TokenLayout | None:
    """Return the layout of the tokens with position embeddings."""
    return model.layout(*model.image_size) if isinstance(model, VisionMamba) else position_layout(model)


def _resize(model: nn.Module, pos_embed: Tensor) -> Tensor:
    """Resize position embeddings to the model's grid; unchanged if they fit no square grid."""
    wanted, side = _layout(model), side_of(model, pos_embed)
    if wanted is None or side is None:
        return pos_embed
    middle = isinstance(model, VisionMamba) and model.class_token == "middle"
    position = (side * side // 2,) if middle else wanted.class_tokens
    return resize_positions(pos_embed, TokenLayout((side, side), class_tokens=position), wanted)


def _resized(model: nn.Module, value: Tensor, wanted: Tensor) -> str:
    side, own, size = side_of(model, value), _layout(model), getattr(model, "image_size", None)
    if side is None or own is None:
        return f"its position embeddings were resized from {value.shape[1]} to {wanted.shape[1]} tokens"
    trained = "" if size is None else f" ({side * size[0] // own.grid[0]} pixels at this model's stride)"
    return (
        f"its position embeddings are for {side}x{side} patches{trained}, and were resized to this model's "
        f"{'x'.join(map(str, own.grid))}"
    )


def _check(model: nn.Module, path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless all names and shapes match."""
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": shapes,
    }
    if not any(problems.values()):
        return
    listed = "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for kind, keys in problems.items()
        if keys
    )
    raise WeightsError(
        f"{path}: these weights do not fit this {type(model).__name__}: {listed}. "
        f"{_advice(model, state, expected, problems['missing'])}."
    )


def _advice(
    model: nn.Module, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], missing: Sequence[str]
) -> str:
    advice, positions = "Give the name and options that the weights were made with", state.get("pos_embed")
    head = head_of(expected) or ""
    if head in missing and all(name.startswith(head.removesuffix("weight")) for name in missing):
        return "They have no classifier: num_classes=0 makes a model without one"
    its, own = state.get(head), expected.get(head)
    if its is not None and own is not None and its.shape[1:] == own.shape[1:] and its.shape != own.shape:
        return f"{advice} (they have {len(its)} classes: num_classes={len(its)})"
    wanted = expected.get("pos_embed")
    if positions is not None and wanted is not None and positions.ndim == 3 and positions.shape != wanted.shape:
        layout = _layout(model)
        patches = positions.shape[1] - (0 if layout is None else len(layout.class_tokens))
        return f"They were made for another image size, of {patches} patches: give it as image_size=(rows, columns)"
    return advice
