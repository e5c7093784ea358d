"""Run a part of a user's model once more, and leave it as it was: modes, buffers, attributes, random numbers, hooks."""

import functools
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock, local
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn.tracing.running import modules_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEPTH = 3  # of objects inside attributes: a configuration holds numbers, and perhaps another configuration
# what a module may raise that runs for us, on other input than it is made for
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, AttributeError)
_one_at_a_time = RLock()
_here = local()


@contextmanager
def undisturbed(
    module: nn.Module, *, hooks: bool = False, own_mode: bool = False, traced: bool = False
) -> Iterator[None]:
    """Put a module in eval mode, to be called inside the block; afterwards everything is as before.

    Args:
        module: a model or a part of one.
        hooks: whether its hooks, the user's own among them, see the calls; forwards are the module's own in any case.
        own_mode: whether it stays in the mode in which it is, training or not.
        traced: whether traces that are opened inside the block see the calls; hooks then do, too.
    """
    modules = list(module.modules())
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    with _one_at_a_time, torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as stack:
        if not traced:
            stack.enter_context(_unseen(modules if not hooks else ()))
        stack.callback(random.setstate, random.getstate())  # some forks choose by Python's numbers
        for each in modules:
            stack.callback(_restore, each, dict(vars(each)), _contents(each))
        for value in [value for each in modules for value in each._buffers.values() if value is not None]:
            stack.callback(_write_back, value, value.clone())
        if not own_mode:
            module.eval()
        yield


def in_words(error: BaseException) -> str:
    """Return an error's type and the first line of what it says.

    Args:
        error: any.
    """
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def unseen() -> bool:
    """Whether this thread calls a module for us, and no hook or trace is to see it."""
    return getattr(_here, "depth", 0) > 0


@contextmanager
def _unseen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let no hook see what this thread calls; other threads may use the modules, and put hooks on them."""
    kept = []
    for held in (vars(module)[name] for module in modules for name in _HOOKS):
        for key, hook in list(held.items()):
            kept.append((held, key, hook, _Asleep(hook)))
            held[key] = kept[-1][-1]
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1
        for held, key, hook, asleep in kept:
            if held.get(key) is asleep:
                held[key] = hook


class _Asleep:
    """A hook, but for calls that it is not to see."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if unseen() else self.hook(*args, **kwargs)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's own lists and dictionaries, in which a forward may keep results, with what is in them."""
    own = [value for name, value in vars(module).items() if name == "_buffers" or not name.startswith("_")]
    return [(value, value.copy()) for value in own if isinstance(value, list | dict)]


def _restore(module: nn.Module, attributes: dict[str, Any], contents: list[tuple[Any, Any]]) -> None:
    """Give a module its attributes back; a trace of another thread may have put a forward on it meanwhile."""
    for name in vars(module).keys() - attributes.keys() - {"forward"}:
        del vars(module)[name]
    vars(module).update({name: value for name, value in attributes.items() if name != "forward"})
    for value, items in contents:
        value.clear()
        value.extend(items) if isinstance(value, list) else value.update(items)


def _write_back(value: Tensor, copy: Tensor) -> None:
    if not torch.equal(value, copy):
        value.copy_(copy)


def recomputing() -> bool:
    """Whether gradient checkpointing repeats a forward inside a backward pass, in whatever thread that runs."""
    return torch._C._current_graph_task_id() != -1


def versions(module: nn.Module) -> tuple[Any, ...]:
    """What changes when anything writes to a module's parameters or buffers, or exchanges its parts or their code.

    It keeps nothing alive.
    """
    parts = modules_of(module).values()
    kinds = [type(each) for each in parts]
    own = [kept for each in parts for kept in (each._parameters, each._buffers) if kept]
    tensors = [tensor for kept in own for tensor in kept.values() if tensor is not None]
    try:
        numbers = [tensor._version for tensor in tensors]
    except RuntimeError:  # tensors of inference mode have none
        numbers = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    forwards = [*(vars(each).get("forward") for each in parts), *(kind.forward for kind in dict.fromkeys(kinds))]
    code = [getattr(forward, "__func__", forward) for forward in forwards if forward is not None]
    return (
        tuple([tensor.data_ptr() for tensor in tensors]),
        tuple(numbers),
        tuple(map(weakref.ref, parts)),
        tuple(map(weakref.ref, kinds)),
        tuple([weakref.ref(each) for each in code if type(each) is FunctionType]),  # and not what a trace put there
    )


def settings(module: nn.Module) -> int:
    """A number for everything in a module and those inside that is no tensor and may change what they compute."""
    return hash(tuple((name, type(each), _simple(vars(each))) for name, each in modules_of(module).items()))


def _simple(value: Any, depth: int = _DEPTH) -> Any:
    if isinstance(value, ModuleType):  # a library that a model keeps at hand is no setting
        return value.__name__
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, nn.Module) or depth < 0:
        return type(value).__name__
    if isinstance(value, dict):
        return tuple((str(key), _simple(item, depth)) for key, item in value.items() if _counts(str(key), item))
    if isinstance(value, list | tuple):
        return tuple(_simple(item, depth) for item in value if not isinstance(item, Tensor))
    if isinstance(value, functools.partial):
        return _simple((value.func, value.args, value.keywords), depth)
    if isinstance(value, FunctionType | MethodType | type):
        return value.__qualname__
    if hasattr(value, "__wrapped__"):  # what a trace put in the place of a forward
        return _simple(value.__wrapped__, depth)
    inside = getattr(value, "__dict__", None)
    return type(value).__name__, None if inside is None else _simple(inside, depth - 1)


def _counts(name: str, value: Any) -> bool:
    """Whether an attribute is a setting: not private, no result, and not what a trace put where there was nothing."""
    ours = name == "forward" and getattr(value, "own", True) is False
    return not name.startswith("_") and not isinstance(value, Tensor) and not ours
