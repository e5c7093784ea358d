"""Loads weights from files: every published layout, but nothing that could run code."""

import argparse
import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import WeightsError
from mamba_attn.models.vim import VisionMamba, resize_positions
from mamba_attn.models.vit import position_layout

_ENTRIES = ("model", "model_ema", "state_dict")
_PREFIXES = ("module.", "backbone.")
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
_REFUSED = (
    r"(?:GLOBAL|Unsupported global:?(?! GLOBAL)|Unsupported class) (\S+)|allowlisted .*but got (?:<class ')?([^'>]+)"
)
_SCANNED = 2**22  # bytes of a refused pickle that are searched for a name to report
_OF_WEIGHTS = ("torch", "collections", "argparse", "numpy", "_codecs")  # modules that appear in pickles of weights
# errors of the unpickler, the zip reader and the tensor builder on damaged files
_DAMAGED = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, struct.error)


def read(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, by name.

    Takes .safetensors and PyTorch files: the weights under "model", "model_ema" or "state_dict" (in this order), or
    bare. The prefixes "module." and "backbone." are dropped; with "backbone.", so is everything outside it.
    Of pickled things only tensors, containers of them, plain values and argparse.Namespace are loaded.

    Args:
        path: the file.

    Raises:
        WeightsError: no such file, not a checkpoint, a damaged one, or one that is not safe to load.
        ImportError: a .safetensors file without the package safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"read({str(path)!r}): there is no such file.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    content = content if isinstance(content, dict) else {}
    content = next((content[entry] for entry in _ENTRIES if isinstance(content.get(entry), dict)), content)
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"read({str(path)!r}): this file contains no tensors; expected a state dict of a model.")
    for prefix in _PREFIXES:
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        tensors = inside or tensors
    return tensors


def load(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a model of this package, all of it.

    Names of older VMamba releases and of the one-file VMamba are translated, 1x1 convolutions read as matrices, and
    position embeddings made for another (square) image size interpolated bicubically, as the model itself does.

    Args:
        model: the model; its type and device stay.
        path: see ``read``.

    Raises:
        WeightsError: weights that do not fit, with the keys; and what ``read`` raises.
    """
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    for key, value in read(path).items():
        name = _translate(key, expected)
        state[name] = _fit(model, name, value, expected.get(name))
    _check(model, path, state, expected)
    model.load_state_dict(state)


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs safetensors: pip install 'mamba_attn[weights]'") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"read({str(path)!r}): this is not a safetensors file, or it is damaged: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        # hide PyTorch's own advice, which is to allow the content or to switch the check off
        text = str(error)
        refused = re.search(_REFUSED, text)
        foreign = refused.group(1) or refused.group(2) if refused else _foreign(path)
        if foreign:
            raise WeightsError(
                f"read({str(path)!r}): refused, because the file contains {foreign[:200]}, and loading that could run "
                "code. Save its state dict alone (tensors by name), or as .safetensors, and load that."
            ) from None
        reason = re.search(r"WeightsUnpickler error:\s+(.+)", text)
        first = reason.group(1) if reason else text.partition(". In PyTorch 2.6")[0].partition("\n")[0]
        raise WeightsError(
            f"read({str(path)!r}): this is not a checkpoint, or it is damaged or incomplete "
            f"({type(error).__name__}: {first.partition(' Please use ')[0][:200]})."
        ) from None


def _foreign(path: Path) -> str | None:
    """Return the first name in a pickle that does not belong to weights; runs and imports nothing.

    For pickles of which PyTorch does not know the instructions (very old or very new), and so names nothing.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_SCANNED)
        if content.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(name) as file:
                    content = file.read(_SCANNED)
        stream = io.BytesIO(content)
        while stream.tell() < len(content):  # the old format is several pickles in a row
            for name in _named(stream):
                if name.partition(".")[0] not in _OF_WEIGHTS:
                    return name
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, RuntimeError):  # not a pickle, or a truncated one
        return None
    return None


def _named(pickled: io.BytesIO) -> Iterator[str]:
    """Yield what a pickle imports, as "module.name"."""
    strings: list[str] = []
    memo: list[str | None] = []
    top: str | None = None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif opcode.name == "MEMOIZE":
            memo.append(top)
        else:
            if opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int) and argument < len(memo):
                top = memo[argument]
            else:
                top = argument if isinstance(argument, str) else None
            if top is not None:
                strings.append(top)


def _translate(key: str, expected: dict[str, Tensor]) -> str:
    """Return the model's name for a tensor; the given name if there is no other."""
    name = key
    for pattern, replacement in _RENAMED:
        if name not in expected:
            name = re.sub(pattern, replacement, name)
    return name if name in expected else key


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


def _resize(model: nn.Module, pos_embed: Tensor) -> Tensor:
    """Resize position embeddings to the model's grid; unchanged if they fit no square grid."""
    wanted = model.layout(*model.image_size) if isinstance(model, VisionMamba) else position_layout(model)
    if wanted is None:
        return pos_embed
    extra = len(wanted.class_tokens)
    side = math.isqrt(pos_embed.shape[1] - extra)
    if side < 1 or side * side != pos_embed.shape[1] - extra:
        return pos_embed
    middle = isinstance(model, VisionMamba) and model.class_token == "middle"
    position = (side * side // 2,) if middle else wanted.class_tokens
    return resize_positions(pos_embed, TokenLayout((side, side), class_tokens=position), wanted)


def _check(model: nn.Module, path: str | Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
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
    head = next((state[key] for key in state if key.endswith("head.weight")), None)
    advice = "Give the name and options that the weights were made with"
    if head is not None and any("head.weight" in shape for shape in shapes):
        advice += f" (they have {head.shape[0]} classes: num_classes={head.shape[0]})"
    raise WeightsError(f"{Path(path)}: these weights do not fit this {type(model).__name__}: {listed}. {advice}.")
