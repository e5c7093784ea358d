"""``triton`` where it cannot run: decorators keep a kernel's name, launching one says why it cannot."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

from mamba_attn.errors import BackendUnavailableError

__version__ = "3.0.0"  # code asks; old enough that nothing newer is expected of it


class Kernel:
    """A Triton kernel that is never compiled; ``kernel[grid](...)`` and ``kernel(...)`` raise.

    Args:
        function: the decorated Python function.
    """

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.configs: list[Any] = []
        functools.update_wrapper(self, getattr(function, "fn", function))

    def __getitem__(self, grid: Any) -> Callable[..., NoReturn]:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        raise BackendUnavailableError(
            f"The Triton kernel {self.__name__!r} was launched, and on the CPU it cannot run: "  # type: ignore[attr-defined]
            "mamba_attn.cpu_stand_ins() stood in for triton when this code was imported. Use the code's own PyTorch "
            "path, or import it without cpu_stand_ins() on a machine with a GPU."
        )

    run = warmup = __call__


def jit(function: Any = None, **options: Any) -> Any:
    """``triton.jit``, with or without arguments."""
    return Kernel if function is None else Kernel(function)


def autotune(configs: Any, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
    """``triton.autotune``: nothing to tune; the kernel keeps its ``configs``, which code reads."""

    def keep(function: Any) -> Kernel:
        kernel = Kernel(function)
        kernel.configs = list(configs)
        return kernel

    return keep


def set_allocator(allocator: Any) -> None:
    """``triton.set_allocator``: no kernel asks for memory."""


def heuristics(values: Any) -> Callable[[Any], Any]:
    """``triton.heuristics``: no effect."""
    return lambda function: function


class Config(SimpleNamespace):
    """``triton.Config``: keeps what it was given.

    Args:
        kwargs: meta-parameters of the kernel.
        options: num_warps, num_stages, ...
    """

    def __init__(self, kwargs: dict[str, Any], num_warps: int = 4, num_stages: int = 2, **options: Any) -> None:
        super().__init__(kwargs=kwargs, num_warps=num_warps, num_stages=num_stages, **options)


def cdiv(x: int, y: int) -> int:
    """The quotient, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


class constexpr:  # noqa: N801 - Triton's own name
    """``triton.language.constexpr``: a value known at compile time.

    Args:
        value: what it wraps.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class Symbol:
    """Any other name of Triton: good for annotations and for the bodies of kernels, which are never run.

    Args:
        name: its dotted name.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> "Symbol":
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__}.{name}")
        return Symbol(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        raise BackendUnavailableError(
            f"{self.__name__} was called outside a kernel; mamba_attn.cpu_stand_ins() stands in for triton's "
            "decorators, Config, cdiv, next_power_of_2 and constexpr, and for no more."
        )

    def __repr__(self) -> str:
        return f"<stand-in of {self.__name__}>"
