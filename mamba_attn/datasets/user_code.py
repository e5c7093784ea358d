"""Builds a model with a user's own function, ``file.py:function`` or ``package.module:function``.

Code runs only because the user names it, and what goes wrong in it is shown as Python shows it.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import nn

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.errors import ModelBuildError, nearest
from mamba_attn.stand_ins import cpu_stand_ins

STAND_INS = ("auto", "on", "off")
_OURS = str(Path(__file__).parent.parent)


def names_code(spec: str) -> bool:
    """Whether a model's name is a function of the user's: ``file.py:function`` or ``package.module:function``.

    Args:
        spec: as given to ``load``.
    """
    place, colon, function = spec.rpartition(":")
    return bool(colon) and (place.endswith(".py") or place.replace(".", "").isidentifier()) and function.isidentifier()


def find_function(spec: str) -> Callable[..., Any]:
    """Import a user's function.

    The file's folder, or the folder above its packages, is added to ``sys.path``: what stands next to it can be
    imported. For a module it is the current folder.

    Args:
        spec: ``file.py:function`` or ``package.module:function``.

    Raises:
        ValueError: no such file, module or function.
        ModelBuildError: the import failed; with the traceback.
    """
    place, _, name = spec.rpartition(":")
    call = f"model={spec!r}"
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"{call}: there is no file {place!r}; expected FILE.py:FUNCTION.")
        module = _imported(call, *_as_module(path), path)
    else:
        module = _imported(call, place, Path.cwd(), None)
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        raise ValueError(f"{call}: {place} has no {name!r}. {nearest(name, known)}")
    found = getattr(module, name)
    function: Callable[..., Any] | None = found if callable(found) else None
    if function is None:
        kind = type(found).__name__
        raise ValueError(f"{call}: {name!r} is a {kind}, not a function that returns a model. {nearest('', known)}")
    return function


def build_model(spec: str, function: Callable[..., Any], options: Mapping[str, Any]) -> LoadedModel:
    """Call a user's function and return its model, in eval mode if it is a plain module.

    Args:
        spec: what names the function.
        function: returns an ``nn.Module`` or a ``LoadedModel``.
        options: its keyword arguments.

    Raises:
        ValueError: an argument is missing or unknown.
        ModelBuildError: it raised, or returned something else.
    """
    call = f"model={spec!r}"
    _require_options(call, function, options)
    with _reported(call, f"{spec.rpartition(':')[2]}()"):
        found = function(**options)
    if isinstance(found, LoadedModel):
        return found
    if not isinstance(found, nn.Module):
        raise ModelBuildError(
            f"{call}: it returned {type(found).__name__}; expected a torch.nn.Module or a mamba_attn.LoadedModel."
        )
    place, _, name = spec.rpartition(":")
    short = f"{Path(place).stem if place.endswith('.py') else place}.{name}"
    return LoadedModel(found.eval(), name=short if type(found) is nn.Sequential else None)


def takes(function: Callable[..., Any], option: str) -> bool:
    """Whether a function has an argument of this name.

    Args:
        function: any.
        option: the name.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # written in C
        return False
    return option in parameters and parameters[option].kind is not inspect.Parameter.POSITIONAL_ONLY


@contextmanager
def stand_ins_for(choice: str, device: str) -> Iterator[list[str]]:
    """Serve ``cpu_stand_ins`` while a user's code is imported and built; yields a list that names those that were used.

    Args:
        choice: "on", "off", or "auto": where the model runs on a CPU and there is no CUDA device.
        device: of the model.

    Raises:
        ValueError: another choice.
    """
    if choice not in STAND_INS:
        raise ValueError(f"stand_ins={choice!r}: expected one of {STAND_INS}.")
    used: list[str] = []
    with ExitStack() as stack:
        if choice == "on" or (choice == "auto" and device == "cpu" and not torch.cuda.is_available()):
            stack.enter_context(cpu_stand_ins())
        yield used
        loaded = sys.modules.copy()  # another thread may import meanwhile
        used += sorted({name.partition(".")[0] for name, its in loaded.items() if type(its).__name__ == "StandIn"})


@contextmanager
def _reported(call: str, what: str) -> Iterator[None]:
    """Run a user's code: what it prints goes to standard error, what it raises is shown with its own traceback."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise ModelBuildError(f"{call}: {what} failed.\n{_own_traceback(error)}") from error


def _own_traceback(error: BaseException) -> str:
    """Return a traceback of the user's lines, and of what they call in other libraries; our own stand in no way."""
    place: TracebackType | None = error.__traceback__
    while place is not None and place.tb_next is not None and _is_foreign(place.tb_frame.f_code.co_filename):
        place = place.tb_next
    shown = traceback.TracebackException(type(error), error, place)
    shown.stack = traceback.StackSummary.from_list([each for each in shown.stack if not _is_foreign(each.filename)])
    return "".join(shown.format()).rstrip()


def _is_foreign(file: str) -> bool:
    """Whether code is neither the user's nor of a library that it calls."""
    return file.startswith((_OURS, "<frozen importlib", "<string>")) or file == importlib.__file__


def _require_options(call: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return
    name = getattr(function, "__name__", "it")
    every = signature.parameters.values()
    known = [each.name for each in every if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if not any(each.kind is each.VAR_KEYWORD for each in every):
        for option in options:
            if option not in known:
                raise ValueError(f"{call}: {name}() has no argument {option!r}. {nearest(option, known)}")
    needed = [
        each.name for each in every
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and each.name not in options
    ]  # fmt: skip
    if needed:
        raise ValueError(
            f"{call}: {name}() needs {', '.join(needed)}; give each as an option, {needed[0]}=VALUE, or name a "
            "function without arguments."
        )


def _as_module(path: Path) -> tuple[str, Path]:
    """Return a file's module name and the folder that it is imported from: above its packages."""
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts if path.stem != "__init__" else parts[:-1]), folder


def _imported(call: str, name: str, folder: Path, file: Path | None) -> ModuleType:
    """Import a module by name from a folder."""
    loaded = sys.modules.get(name)
    if file is not None and loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() != file:
        name = _renamed(call, name, file)  # another file has this name
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    before = set(sys.modules)
    try:
        with _reported(call, f"the import of {file or name}"):
            return importlib.import_module(name)
    except ModelBuildError as error:
        for each in set(sys.modules) - before:
            if Path(getattr(sys.modules[each], "__file__", None) or "/").is_relative_to(folder):
                del sys.modules[each]  # half imported
        missing = error.__cause__
        if file is None and isinstance(missing, ModuleNotFoundError) and name.startswith(str(missing.name)):
            raise ValueError(f"{call}: there is no module {missing.name!r} in {folder} or in this Python.") from missing
        raise


def _renamed(call: str, name: str, file: Path) -> str:
    """Register a file under a name of its own, and return that."""
    own = f"{name}_{abs(hash(str(file)))}"
    if own not in sys.modules:
        made = importlib.util.spec_from_file_location(own, file)
        if made is None or made.loader is None:
            raise ValueError(f"{call}: Python cannot import {file}.")
        module = importlib.util.module_from_spec(made)
        sys.modules[own] = module
        try:
            with _reported(call, f"the import of {file}"):
                made.loader.exec_module(module)
        except ModelBuildError:
            del sys.modules[own]
            raise
    return own
