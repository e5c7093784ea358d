"""What mixes tokens in a model besides the traced layers: found by moving one token and seeing which others move.

A block that stands in one container with a block of a traced mixer, and holds no traced mixer itself, is unknown if a
module of it mixes tokens: a map that multiplies layers would leave it out. Convolutions, and stages without any traced
mixer, are named only. Modules that a forward pass called are called again with random numbers of the same shapes.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamba_attn.tracing.undisturbed import FAILURES, in_words, recomputing, undisturbed, versions

MIXES = "mixes tokens"
NEAR = "mixes neighbouring tokens"
SCALES = "scales tokens by what it sees of all"
UNASKED = "could not be asked: it does not run on random numbers"
STAGE = "a stage without a traced mixer"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.Unfold)
_POOLS = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
_ALONE = ("activation", "dropout", "linear", "normalization", "batchnorm", "instancenorm", "sparse", "flatten")
_ATTENTION = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "flash_attn_func")
_SHAPES = 8  # of inputs, for which what a pass has shown is kept
_PUSH = 3.0  # what is added to a token; other tokens have a spread of 1


@dataclass(frozen=True)
class _Given:
    """A tensor of random numbers in the place of one that a module was called with; equal numbers are one tensor."""

    number: int


@dataclass(frozen=True, eq=False)
class _Called:
    """How a module was called: shape, type and device of its first tensor, which others may share."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Called | None":
        """None: not with a sequence, or a grid, of tokens."""
        leaves = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        first = next((t for t in leaves if t.is_floating_point()), None)
        if first is None or first.ndim < 3:
            return None
        like = (first.shape, first.dtype, first.device)
        numbers: dict[int, int] = {}

        def given(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if (value.shape, value.dtype, value.device) != like:
                return value.detach()  # masks, positions
            return _Given(numbers.setdefault(id(value), len(numbers)))

        args, kwargs = pytree.tree_map(given, (args, kwargs))
        return cls(args, kwargs, tuple(first.shape), first.dtype, first.device)

    def call(self, module: nn.Module, token: tuple[Any, ...], push: float, others: float = 1.0) -> Tensor | None:
        """The first tensor that the module makes of random numbers, one token moved and the others scaled."""
        draw = torch.Generator().manual_seed(7)
        drawn: dict[int, Tensor] = {}

        def fill(value: Any) -> Any:
            if not isinstance(value, _Given):
                return value
            if value.number not in drawn:
                tensor = torch.randn(self.shape, generator=draw).to(self.device, self.dtype)
                own = tensor[token] + push
                tensor *= others
                tensor[token] = own
                drawn[value.number] = tensor
            return drawn[value.number]

        args, kwargs = pytree.tree_map(fill, (self.args, self.kwargs))
        output = pytree.tree_leaves(module(*args, **kwargs))
        return next((value for value in output if isinstance(value, Tensor) and value.is_floating_point()), None)


class Unseen:
    """Watches which modules a forward pass calls, and says afterwards which of them mix tokens unseen.

    Args:
        model: that is traced.
        traced: names of the modules whose insides are known, or not looked at.
        modules: the model's modules by name.
    """

    def __init__(self, model: nn.Module, traced: Collection[str], modules: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.traced = list(traced)
        self._modules = modules
        self._look_at = _Look({}, {})
        self._new = True
        self._begun: tuple[Any, Any] | None = None

    def install(self, stack: ExitStack, asleep: Callable[[], bool]) -> None:
        """Put a hook on every module that may mix tokens.

        Args:
            stack: takes the hooks off.
            asleep: whether the model runs for us now, to measure.
        """
        thread, hooks = get_ident(), ExitStack()
        stack.callback(hooks.close)

        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not asleep() and thread == get_ident() and not recomputing():
                self._recall(args, kwargs)
                hooks.close()
                if self._new:
                    watch()

        def starts(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._new or asleep() or thread != get_ident() or recomputing() or name in self._calls:
                return
            called = _Called.of(args, kwargs)
            if called is not None:
                self._calls[name] = called

        def ends(*_: Any) -> None:
            if self._begun is not None and not asleep() and thread == get_ident():
                key, now = self._begun
                looks = _looks.setdefault(self.model, {})
                looks[key], self._begun = (now, self._look_at), None
                if len(looks) > _SHAPES:
                    del looks[next(iter(looks))]

        def watch() -> None:
            # a hook would keep torch's encoder layer off its fast path, whose attention is seen at a door
            fast = (name for name, module in self._modules.items() if isinstance(module, nn.TransformerEncoderLayer))
            known = [*self.traced, *fast]
            for name, module in self._modules.items():
                if name and not _alone(module) and not any(_inside(name, other) for other in known):
                    hooks.callback(module.register_forward_pre_hook(partial(starts, name), with_kwargs=True).remove)

        stack.callback(self.model.register_forward_pre_hook(begins, with_kwargs=True).remove)
        stack.callback(self.model.register_forward_hook(ends).remove)
        if self.model not in _looks:  # perhaps parts of it are called alone
            watch()

    def found(self, seen: Collection[str]) -> dict[str, str]:
        """Return what mixes tokens and was not seen, by the modules' names, in words.

        Args:
            seen: names of modules whose scans or attention were seen, besides those that are traced.
        """
        known = frozenset([*self.traced, *seen])
        if known not in self._look_at.found:
            self._look_at.found[known] = dict(self._look(known))
        return self._look_at.found[known]

    @property
    def _calls(self) -> dict[str, _Called]:
        return self._look_at.calls

    def _recall(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take what an earlier pass on inputs of these shapes has shown, while the model's tensors are the same."""
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        key = (*((tuple(t.shape), t.dtype, t.device) for t in given), *self.traced)
        looks, now = _looks.get(self.model, {}), versions(self.model)
        self._new = key not in looks or looks[key][0] != now
        if self._new:
            self._begun = key, now  # a pass that raises has shown a part
        else:
            self._look_at = looks[key][1]

    def _look(self, known: frozenset[str]) -> Iterator[tuple[str, str]]:
        around = {name[:end] for name in known for end in [0, *_dots(name)]}
        for name, module in self._modules.items():
            if name not in around or not isinstance(module, _CONTAINERS):
                continue
            children = {key: f"{name}.{key}" if name else key for key, _ in module.named_children()}
            traced = [child for child in children.values() if child in around or child in known]
            stages = any(self._holds_blocks(child, known) for child in traced)
            for child in children.values():
                if child in known or child not in self._modules:  # a shared module is looked at where it stands first
                    continue
                mixing = dict(self._mixing(child, around | known))
                if child in around:  # a traced mixer's own block: what stands next to the mixer
                    yield from (each for each in mixing.items() if not self._in_inner_container(each[0], child, around))
                elif stages and not all(kind.startswith(UNASKED) for kind in mixing.values()):
                    yield child, STAGE
                else:
                    yield from mixing.items()

    def _holds_blocks(self, stage: str, known: Collection[str]) -> bool:
        """Whether a traced child of a container holds a container of blocks itself."""
        for name, module in self._modules.items():
            if _inside(name, stage) and isinstance(module, _CONTAINERS):
                traced = [other for other in known if other != name and _inside(other, name)]
                if len(traced) > 1 or (traced and (isinstance(module, nn.ModuleList) or len(module) == 1)):
                    return True
        return False

    def _in_inner_container(self, name: str, block: str, around: Collection[str]) -> bool:
        """Whether a module stands in a container of its own inside the block, which is looked at by itself."""
        inner = (name[:end] for end in _dots(name) if end >= len(block))
        return any(each in around and isinstance(self._modules[each], _CONTAINERS) for each in inner)

    def _mixing(self, name: str, skip: Collection[str]) -> Iterator[tuple[str, str]]:
        """The innermost modules at and below a name that mix tokens; ``skip`` are seen, or hold what is seen."""
        module = self._modules[name]
        if _alone(module):
            return
        below = []
        for key, _ in module.named_children():
            child = f"{name}.{key}"
            if child in self._modules and not (child in skip and not self._around_only(child, skip)):
                below += list(self._mixing(child, skip))
        if any(kind == MIXES for _, kind in below) or name in skip or name not in self._calls:
            yield from below
            return
        kind = mixing(module, self._calls[name])
        yield from [(name, kind)] if kind == MIXES or (kind and not below) else below

    def _around_only(self, name: str, skip: Collection[str]) -> bool:
        """Whether a name is that of a module around a traced one, whose other parts are looked at."""
        return any(other != name and _inside(other, name) for other in skip)


def unseen_sentence(call: str, names: Sequence[str]) -> str:
    """Return what to say of modules that mix tokens and were not traced.

    Args:
        call: who says it.
        names: the modules'.
    """
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"{call}: {shown} mix tokens next to the traced layers, and nothing here knows how: moving one token moves "
        "others. What is traced is exact, but not all that the model mixes; name the layers that are meant with "
        "layers=, or see register_adapter."
    )


def mixing(module: nn.Module, called: _Called) -> str | None:
    """Return how a module mixes tokens, ``MIXES``, ``NEAR``, ``SCALES``, ``UNASKED`` with the error, or None.

    It is remembered while the module's tensors are the same.

    Args:
        module: called on its own.
        called: how.
    """
    now = versions(module)
    key = (called.shape, called.dtype)
    remembered = _remembered.setdefault(module, {})
    if key not in remembered or remembered[key][0] != now:
        remembered[key] = (now, _mixing(module, called))
    return remembered[key][1]


@dataclass(frozen=True, eq=False)
class _Look:
    """How modules were called in a pass, and what was found, by the names of what is known."""

    calls: dict[str, _Called]
    found: dict[frozenset[str], dict[str, str]]


_looks: "weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, _Look]]]" = weakref.WeakKeyDictionary()
_remembered: "weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, str | None]]]" = weakref.WeakKeyDictionary()


def _mixing(module: nn.Module, called: _Called) -> str | None:
    near = isinstance(module, _CONVOLUTIONS)
    axes = (1,) if near else (2,) if len(called.shape) == 3 else (1, len(called.shape) - 1)
    reach: list[int] = []
    scaled: list[int] = []
    with torch.inference_mode(False), undisturbed(module):
        for axis in axes:
            token = tuple(slice(None) if i == axis else 0 if i == 0 else n // 2 for i, n in enumerate(called.shape))
            try:
                for moved, others in ((reach, 1.0), (scaled, 0.0)):
                    before, after = (called.call(module, token, push, others) for push in (0.0, _PUSH))
                    if before is None or after is None or before.ndim < len(called.shape):
                        return None
                    tokens = prod(called.shape) // called.shape[axis]
                    if others and int((before != after).sum()) * tokens <= before.numel():
                        return None  # no more than one token's part of the output moved, wherever it stands now
                    moved.append(_moved(before, after, axis))
            except FAILURES as error:
                return f"{UNASKED} ({in_words(error)})"
    if min(reach) <= 1:
        return None
    own = set(getattr(getattr(type(module).forward, "__code__", None), "co_names", ()))
    if own.intersection(_ATTENTION):
        return MIXES
    if near or _only_convolves(module) or 1 < min(reach) <= _reach(module, len(called.shape) - 2):
        return NEAR
    gates = min(scaled) <= 1 or any(isinstance(part, _POOLS) for part in module.modules())
    return SCALES if gates else MIXES


def _only_convolves(module: nn.Module) -> bool:
    """Whether a module is made of torch's convolutions, and norms whose statistics see all tokens."""
    parts = [part for part in module.modules() if next(part.children(), None) is None]
    kinds = (nn.Sequential, nn.ModuleList)
    around = all(isinstance(part, kinds) for part in module.modules() if next(part.children(), None) is not None)
    return around and all(isinstance(part, _CONVOLUTIONS) or _alone(part) for part in parts)


def _reach(module: nn.Module, rank: int) -> int:
    """Number of tokens that a module's convolutions can reach, one behind the other."""
    across, along = 1, 1  # a line of tokens may be a grid inside
    for part in module.modules():
        if isinstance(part, _CONVOLUTIONS):
            sizes: Any = part.kernel_size
            dilations: Any = getattr(part, "dilation", 1)
            wide = [step * (size - 1) for size, step in zip(_each(sizes, rank), _each(dilations, rank), strict=False)]
            across += max(wide)
            along = max(along, len(wide))
    cells: int = across ** max(along, rank)
    return cells


def _each(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


def _moved(plain: Tensor, moved: Tensor, axis: int) -> int:
    """Number of tokens that moved."""
    difference = (moved.float() - plain.float()).abs().amax(axis)
    eps = max(torch.finfo(plain.dtype).eps, 2.5e-6)
    return int((difference > 4 * eps * float(plain.float().abs().max())).sum())


def _alone(module: nn.Module) -> bool:
    """Whether a module of torch's own treats every token by itself, as its type says."""
    kind = type(module).forward
    if isinstance(module, nn.modules.conv._ConvNd):
        return all(size == 1 for size in module.kernel_size)
    if isinstance(module, nn.MultiheadAttention):
        return False
    where = getattr(kind, "__module__", "")
    return isinstance(module, nn.Identity) or where in [f"torch.nn.modules.{each}" for each in _ALONE]


def _dots(name: str) -> list[int]:
    return [end for end, letter in enumerate(name) if letter == "."]


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")
