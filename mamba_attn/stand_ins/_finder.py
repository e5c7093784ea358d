"""The finder that serves stand-ins, and what it leaves alone."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mamba_attn.models import torchvision_repair
from mamba_attn.stand_ins import _served
from mamba_attn.stand_ins._modules import AroundLoader, StandIn, StandInLoader, fill
from mamba_attn.stand_ins._repairs import REPAIRS, repair

# Libraries that run without the stand-ins and outlive them: imported in the block, they see the machine as it is.
_LIBRARIES = ("torch", "torchvision", "timm", "transformers")


def overrides(name: str) -> bool:
    """Whether a module name is served whatever is installed."""
    return name in _served.ALWAYS or name.startswith("triton.")


class StandInFinder(MetaPathFinder):
    """Serves stand-ins by exact name, from ``install`` to ``remove``."""

    def __init__(self) -> None:
        self._real: dict[str, ModuleType] = {}  # what the stand-ins hide
        self._failed: list[ModuleType] = []  # real modules that could not be run, filled with stand-ins

    def install(self) -> None:
        """Hide the real modules, and come first."""
        self._real = {name: sys.modules.pop(name) for name in list(sys.modules) if overrides(name)}
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Take every stand-in out of ``sys.modules``, and put back what they hid."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in list(sys.modules.items()):
            if isinstance(module, StandIn) or any(module is failed for failed in self._failed):
                del sys.modules[name]
                _forget(name, module)
        for name, module in self._real.items():
            sys.modules.setdefault(name, module)
        self._real, self._failed = {}, []

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """A stand-in, a real module with something around its loading, or None for everything else."""
        root, _, _ = fullname.partition(".")
        if overrides(fullname):
            return _spec(fullname, _served.ALWAYS.get(fullname, {}), package=root == "triton")
        if root in _served.PACKAGES and self._stands_in_for(root):
            return self._missing(fullname)
        if root in _LIBRARIES:
            return self._around(fullname, path, target, self._run_library)
        if fullname in _served.FAILING:
            return self._around(fullname, path, target, self._run_or_fill)
        if fullname.rpartition(".")[2] in REPAIRS:
            return self._around(fullname, path, target, _run_and_repair)
        return None

    def _stands_in_for(self, root: str) -> bool:
        """Whether a package is missing; one that was served stays served."""
        present = sys.modules.get(root)
        return self._elsewhere(root, None, None) is None if present is None else isinstance(present, StandIn)

    def _missing(self, fullname: str) -> ModuleSpec:
        if fullname not in _served.MISSING:
            root = fullname.partition(".")[0]
            raise ModuleNotFoundError(
                f"{fullname} has no stand-in in mamba_attn.cpu_stand_ins(), and the package {root} cannot be found: "
                f"put its source on sys.path before importing (it needs no compiling inside the block).",
                name=fullname,
            )
        package = any(name.startswith(f"{fullname}.") for name in _served.MISSING)
        return _spec(fullname, _served.MISSING[fullname], package)

    def _elsewhere(self, fullname: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        """What the finders after this one find."""
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None

    def _around(
        self,
        fullname: str,
        path: Any,
        target: ModuleType | None,
        action: Callable[[ModuleType, Callable[[], None]], None],
    ) -> ModuleSpec | None:
        spec = self._elsewhere(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module") and spec.loader is not None:
            spec.loader = AroundLoader(spec.loader, action)
        return spec

    def _run_library(self, module: ModuleType, run: Callable[[], None]) -> None:
        with self._suspended():
            try:
                run()
            except RuntimeError as error:
                if not torchvision_repair.declare(error):  # a CPU build of torch beside PyPI's torchvision
                    raise
                run()

    def _run_or_fill(self, module: ModuleType, run: Callable[[], None]) -> None:
        try:
            run()
        except ImportError:
            fill(module, _served.FAILING[module.__name__])
            self._failed.append(module)

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        """The machine as it is, for the length of an import."""
        if self not in sys.meta_path:  # inside another suspension
            yield
            return
        sys.meta_path.remove(self)
        served = {name: module for name, module in sys.modules.items() if isinstance(module, StandIn)}
        for name in served:
            del sys.modules[name]
        sys.modules.update(self._real)
        try:
            yield
        finally:
            self._real = {name: sys.modules.pop(name) for name in list(sys.modules) if overrides(name)}
            sys.modules.update(served)
            sys.meta_path.insert(0, self)


def _run_and_repair(module: ModuleType, run: Callable[[], None]) -> None:
    run()
    repair(module)


def _spec(fullname: str, things: dict[str, str], package: bool) -> ModuleSpec:
    return ModuleSpec(fullname, StandInLoader(things), is_package=package)


def _forget(name: str, module: ModuleType) -> None:
    """Remove a stand-in from its parent, where the parent is a real module that stays."""
    parent, _, child = name.rpartition(".")
    holder = sys.modules.get(parent)
    if holder is not None and vars(holder).get(child) is module:
        delattr(holder, child)
