"""The modules that are served, and the loaders around real ones."""

from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mamba_attn.errors import nearest
from mamba_attn.stand_ins._served import thing


class StandIn(ModuleType):
    """A module that stands in for a compiled, CUDA-only or missing one."""

    def __getattr__(self, name: str) -> Any:
        """Say what there is; for triton any name is one, since kernels only name it."""
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if self.__name__.split(".")[0] == "triton":
            return thing("_triton.Symbol")(f"{self.__name__}.{name}")
        there = [key for key in vars(self) if not key.startswith("_")]
        raise AttributeError(
            f"{self.__name__}.{name} has no stand-in in mamba_attn.cpu_stand_ins(). {nearest(name, there)}"
        )


class StandInLoader(Loader):
    """Makes a stand-in.

    Args:
        things: name in the module -> what it is, as ``_served.thing`` reads it.
    """

    def __init__(self, things: dict[str, str]) -> None:
        self.things = things

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Fill it."""
        fill(module, self.things)


def fill(module: ModuleType, things: dict[str, str]) -> None:
    """Put what the tables name into a module."""
    module.__doc__ = f"Stand-in of mamba_attn.cpu_stand_ins() for {module.__name__}."
    module.__file__ = __file__  # so that `cannot import name` tells where it looked
    vars(module).update({name: thing(path) for name, path in things.items()})


class AroundLoader(Loader):
    """Runs a real module through its own loader, with something before or after.

    Args:
        inner: the module's own loader, which it keeps.
        action: called with the module and a function that runs its code.
    """

    def __init__(self, inner: Loader, action: Callable[[ModuleType, Callable[[], None]], None]) -> None:
        self.inner, self.action = inner, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # get_source and the like

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own loader back, and run it."""
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.action(module, lambda: self.inner.exec_module(module))
