"""Reads files of weights, .safetensors and PyTorch's, and loads nothing that could run code."""

import argparse
import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mamba_attn.errors import WeightsError

_REFUSED = (
    r"(?:GLOBAL|Unsupported global:?(?! GLOBAL)|Unsupported class) (\S+)|allowlisted .*but got (?:<class ')?([^'>]+)"
)
_SCANNED = 2**22  # bytes of a refused pickle that are searched for a name to report
_OF_WEIGHTS = ("torch", "collections", "argparse", "numpy", "_codecs")  # modules that appear in pickles of weights
# errors of the unpickler, the zip reader and the tensor builder on damaged files
_DAMAGED = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, struct.error)


def read(path: str | Path) -> Any:
    """Read a file of weights: tensors, and containers of them, as they lie in it.

    Of pickled things only tensors, containers, plain values and argparse.Namespace are loaded.

    Args:
        path: the file, .safetensors or one of PyTorch's.

    Raises:
        WeightsError: no such file, not a checkpoint, a damaged one, or one that is not safe to load.
        ImportError: a .safetensors file without the package safetensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "this is a folder, not a file" if path.is_dir() else "there is no such file"
        raise WeightsError(f"read({str(path)!r}): {what}.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


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
