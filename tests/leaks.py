"""What a trace may leave behind on a model: nothing. Snapshots of modules before, and the differences after.

``Watch`` wraps ``mamba_attn.trace`` for the whole test session. Modules are remembered when a trace first reaches them
and compared when the last open trace is left, so that nested traces, traces of a submodule and traces in several
threads need no special case.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def state_of(module: nn.Module) -> dict[tuple[str, str], object]:
    """Everything a leak could show in, of this one module: (aspect, name) -> object, compared by identity."""
    found: dict[tuple[str, str], object] = {
        ("class", "type"): type(module),
        ("forward", "class"): type(module).forward,
        ("forward", "instance"): vars(module).get("forward"),
        ("training", "training"): module.training,
    }
    for name, value in vars(module).items():
        if name not in ("forward", "training"):
            found["attributes", name] = None
        if "hooks" in name and isinstance(value, dict):
            for key, hook in value.items():
                found["hooks", f"{name}[{key}]"] = hook
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(module)[kind].items():
            found["attributes", name] = value if kind != "_buffers" else None  # a forward may replace a buffer
    for name, parameter in vars(module)["_parameters"].items():
        if parameter is not None:
            found["requires_grad", name] = parameter.requires_grad
            found["grad", name] = parameter.grad
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                for key, hook in (getattr(parameter, kind) or {}).items():
                    found["hooks", f"{name}.{kind}[{key}]"] = hook
    return found


def global_state() -> dict[tuple[str, str], object]:
    """Hooks that act on every module of the process."""
    hooks = ((name, getattr(torch.nn.modules.module, name)) for name in _GLOBAL_HOOKS)
    return {("global hooks", f"{name}[{key}]"): hook for name, all_of in hooks for key, hook in all_of.items()}


def differences(
    before: dict[tuple[str, str], object], after: dict[tuple[str, str], object], name: str
) -> list[tuple[str, str]]:
    """(aspect, sentence) for everything added, removed or replaced."""
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        aspect, item = key
        if key not in after:
            found.append((aspect, f"{name}: {aspect} {item} is gone"))
        elif key not in before:
            found.append((aspect, f"{name}: {aspect} {item} is new"))
        elif after[key] is not before[key]:
            found.append((aspect, f"{name}: {aspect} {item} was {before[key]!r:.80}, is {after[key]!r:.80}"))
    return found


class Watch:
    """Compares every model that a wrapped context manager received, once all of them are left."""

    def __init__(self) -> None:
        self.leaks: list[tuple[str, str]] = []
        self.open = 0
        self._lock = threading.Lock()
        self._before: dict[int, tuple[str, nn.Module, dict[tuple[str, str], object]]] = {}
        self._global: dict[tuple[str, str], object] = {}

    def wrap(self, trace: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
        """The same context manager, watched; whatever it is given first or as ``model=`` is the model."""

        @functools.wraps(trace)
        @contextmanager
        def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            model = args[0] if args else kwargs.get("model")
            self._enter(model)
            try:
                with trace(*args, **kwargs) as record:
                    yield record
            finally:
                self._leave()

        return watched

    def install(self, module: ModuleType, name: str = "trace") -> None:
        """Replace ``module.name`` by its watched form, there and in every loaded module of the same package."""
        original = getattr(module, name)
        watched = self.wrap(original)
        package = module.__name__.split(".")[0]
        for other_name, other in list(sys.modules.items()):
            if other_name.split(".")[0] == package and vars(other).get(name) is original:
                setattr(other, name, watched)

    def collect(self) -> list[tuple[str, str]]:
        """The leaks since the last call; an open trace is one."""
        with self._lock:
            if self.open:
                self.leaks.append(("open", f"{self.open} trace(s) entered and never left"))
            found, self.leaks, self.open, self._before = self.leaks, [], 0, {}
        return found

    def _enter(self, model: object) -> None:
        with self._lock:
            if not self.open:
                self._global = global_state()
            self.open += 1
            if isinstance(model, nn.Module):
                for name, module in model.named_modules():
                    label = f"{type(model).__name__}{'.' if name else ''}{name}"
                    self._before.setdefault(id(module), (label, module, state_of(module)))

    def _leave(self) -> None:
        with self._lock:
            self.open -= 1
            if self.open:
                return
            for name, module, before in self._before.values():
                self.leaks += differences(before, state_of(module), name)
            self.leaks += differences(self._global, global_state(), "torch.nn")
            self._before = {}
