"""How ``dropin`` gets at other people's model code: imported from a checkout on a CPU, as it stands there."""

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import mamba_attn


def load(root: Path, module: str, *more: str) -> ModuleType:
    """Import a module of a checkout; ``more`` are folders that it imports from."""
    sys.path[:0] = [str(root / folder) for folder in ("", *more)]
    with mamba_attn.cpu_stand_ins(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def package(name: str, folder: Path) -> None:
    """Let a package's modules be imported without its ``__init__``, which imports training code and its packages."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def renamed(old: str, new: str) -> None:
    """Serve a module under the name that it had in a release this code was written for."""
    with mamba_attn.cpu_stand_ins(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.modules[old] = importlib.import_module(new)


def side_by_side(model: nn.Module, x: Tensor) -> Tensor:
    """All feature maps that a model returns, in one vector."""
    return torch.cat([output.flatten() for output in model(x)])


def made(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A model's constructor; some import what they need when they are called."""

    def under_stand_ins() -> nn.Module:
        with mamba_attn.cpu_stand_ins(), contextlib.redirect_stdout(io.StringIO()):
            return make(*args, **options)

    return under_stand_ins
