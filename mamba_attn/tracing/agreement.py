"""Whether an adapter computes what a module computes: compared once, by their outputs, and remembered.

Adapters recognise a module by the attributes they read, and what else its code does nobody knows. So, once per module,
input's shape and type, and settings, the module's own forward and the adapter get the same input, and the adapter is
used where their outputs agree. Values of parameters count too: a low-rank update is silent until it is trained.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamba_attn.core.tf32 import without_tf32
from mamba_attn.errors import MambaAttnError, UnsupportedModelError
from mamba_attn.tracing.adapters import AnyAdapter, Seen
from mamba_attn.tracing.doors import suspended
from mamba_attn.tracing.undisturbed import FAILURES, in_words, settings, undisturbed, versions

_ALLOWED = 1e-5  # largest difference over the largest value
_ULPS = 4  # of a type coarser than float32, that outputs may differ by
_AMPLIFIED = 16  # times what the module's own output moves by, when its input moves by its rounding
_MOST = 100  # times what is allowed: no input makes more of it
_REMEMBERED = 64  # calls of one module
# no states of an earlier call; classes and functions are ways to scan and merge, as GroupMamba hands them over
_PLAIN = (int, float, str, complex, type(None), torch.dtype, torch.device, torch.Size, type, FunctionType)


@dataclass(frozen=True)
class Call:
    """How a module was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """All arguments, those inside lists and dictionaries one by one."""
        return pytree.tree_leaves((self.args, self.kwargs), is_leaf=_is_leaf)

    @property
    def opaque(self) -> list[str]:
        """Names of the types of arguments that may hold anything, such as states of an earlier call."""
        return [type(value).__name__ for value in self.leaves if not isinstance(value, (Tensor, *_PLAIN))]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, the one that the module mixes first."""
        found = [value for value in self.leaves if isinstance(value, Tensor)]
        return sorted(found, key=lambda tensor: not tensor.is_floating_point())

    def copied(self, moved: float = 0.0) -> "Call":
        """With copies of the tensors, since a forward may write over them; the first moved by a part of its values."""
        first = next(iter(self.tensors), None)

        def copy(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            fresh = value.detach().clone()
            if moved and value is first:
                sign = (
                    torch.randint(0, 2, value.shape, device="cpu", generator=torch.Generator().manual_seed(3)) * 2 - 1
                )
                fresh = fresh * (1 + moved * sign.to(fresh))
            return fresh

        return Call(*pytree.tree_map(copy, (self.args, self.kwargs), is_leaf=_is_leaf))

    def key(self) -> tuple[Any, ...]:
        """Shapes and types of tensors, and everything that is no tensor."""
        return tuple(
            (tuple(v.shape), v.dtype, str(v.device)) if isinstance(v, Tensor) else repr(v) for v in self.leaves
        )


def _is_leaf(value: Any) -> bool:
    """Whether a value is no container of Python's own; a cache of transformers is one to torch, and holds states."""
    return type(value) not in (tuple, list, dict)


@dataclass(frozen=True)
class Verdict:
    """What a comparison gave.

    Args:
        adapter: the one that came nearest; None: none could compute it.
        number: its largest difference over the largest value.
        allowed: what that may be.
        why: in words, where it is no number alone.
    """

    adapter: AnyAdapter | None
    number: float
    allowed: float
    why: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the adapter computes what the module does; where everything is NaN, nothing says that it does not."""
        return self.adapter is not None and not self.number > self.allowed

    def sentence(self, name: str, module: nn.Module, family: str) -> str:
        """What disagrees, and by how much.

        Args:
            name: the module's in the model.
            module: the mixer.
            family: the adapter's.
        """
        who = f"{name or 'the model'} ({type(module).__name__}, family {family})"
        if self.adapter is None:
            return f"{who}: this adapter cannot compute it: {self.why}"
        return (
            f"{who}: what this adapter computes differs from what the module itself returns by {self.number:.2g} "
            f"(relative; {self.allowed:.2g} is allowed){f', {self.why}' if self.why else ''}"
        )


@dataclass
class _Remembered:
    verdict: Verdict
    versions: tuple[Any, ...]
    others: list[tuple["weakref.ref[Tensor]", int]] = field(default_factory=list)

    def holds(self, now: tuple[Any, ...], others: list[Tensor]) -> bool:
        """Whether nothing was written since, and the call has the same masks, orders and so on."""
        same = [(ref() is t and version == _version(t)) for (ref, version), t in zip(self.others, others, strict=True)]
        return self.versions == now and all(same)


_remembered: "weakref.WeakKeyDictionary[nn.Module, dict[Any, _Remembered]]" = weakref.WeakKeyDictionary()
_latest: "weakref.WeakKeyDictionary[nn.Module, Verdict]" = weakref.WeakKeyDictionary()


def latest(module: nn.Module) -> Verdict | None:
    """Return what the last comparison of a module gave, whatever its input was."""
    return _latest.get(module)


def measurable() -> bool:
    """Whether a module can be called once more now: not while code is compiled, or put into a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def judge(
    module: nn.Module,
    own: Callable[..., Any],
    adapter: AnyAdapter,
    call: Call,
    seen: Seen,
    answer: Callable[[AnyAdapter, Call], Any],
    ready: Callable[[AnyAdapter], Any] | None = None,
) -> Verdict:
    """Return which of an adapter's alternatives computes what a module does; remembered.

    Args:
        module: the mixer.
        own: its own forward.
        adapter: that recognises it.
        call: how it is called.
        seen: what the forward pass has shown of the image.
        answer: what an adapter computes of a call.
        ready: what it computes of this call, where that is wanted anyway, and no hook and no random number is in it.
    """
    others = call.tensors[1:]
    key = (adapter, settings(module), call.key(), _autocast(call), seen.layout, seen.frames.get(module))
    remembered = _remembered.setdefault(module, {})
    found = remembered.get(key)
    if found is None or not found.holds(versions(module), others):
        verdict = _compare(module, own, adapter, call, answer, ready)
        if len(remembered) >= _REMEMBERED:
            del remembered[next(iter(remembered))]
        # after it: what the comparison wrote to buffers, and wrote back, counts as written
        found = _Remembered(verdict, versions(module), [(weakref.ref(tensor), _version(tensor)) for tensor in others])
        if verdict.number == verdict.number:  # not of nothing but NaN
            remembered[key] = found
    _latest[module] = found.verdict
    return found.verdict


def judge_call(
    module: nn.Module, own: Any, adapter: AnyAdapter, call: Call, answer: Callable[[AnyAdapter, Call], Any]
) -> Verdict:
    """Return which of an adapter's alternatives computes what a module returned; of this call alone.

    Args:
        module: the mixer.
        own: what it returned.
        adapter: that recognises it.
        call: how it was called.
        answer: what an adapter computes of a call.
    """

    def of_adapter(each: AnyAdapter) -> Any:
        with _alone(module, True):
            return answer(each, call.copied())

    truth = _first(own).detach()
    verdict = _nearest(adapter.alternatives(module), truth, _coarsest(module, call, truth), of_adapter)
    _latest[module] = verdict
    return verdict


def _compare(
    module: nn.Module,
    own: Callable[..., Any],
    adapter: AnyAdapter,
    call: Call,
    answer: Callable[[AnyAdapter, Call], Any],
    ready: Callable[[AnyAdapter], Any] | None,
) -> Verdict:
    def of_own(training: bool = True, moved: float = 0.0, seed: int | None = None) -> Any:
        with _alone(module, training):
            if seed is not None:
                torch.manual_seed(seed)
            again = call.copied(moved)
            return own(*again.args, **again.kwargs)

    def of_adapter(each: AnyAdapter, training: bool = True) -> Any:
        if ready is not None and training:
            return ready(each)
        with _alone(module, training):
            return answer(each, call.copied())

    try:
        truth = _first(of_own())
    except FAILURES as error:  # it raises, untraced too; or does not run without its hooks
        return Verdict(None, 0.0, 0.0, f"its own forward raises {in_words(error)}")
    coarse = _coarsest(module, call, truth)
    verdict = _nearest(adapter.alternatives(module), truth, coarse, of_adapter)
    if verdict.agrees or verdict.adapter is None:
        return verdict
    training = module.training
    if difference(_first(of_own(seed=1)), truth) > verdict.allowed:  # active dropout, which draws in another order
        truth, training = _first(of_own(training=False)), False
        if difference(_first(of_own(training=False, seed=1)), truth) > verdict.allowed:
            return replace(verdict, why="and so does the module's own output from call to call")
        verdict = _nearest(adapter.alternatives(module), truth, coarse, lambda each: of_adapter(each, False))
        if verdict.agrees or verdict.adapter is None:
            return verdict
    moves = difference(_first(of_own(training, moved=coarse)), truth)
    return replace(verdict, allowed=min(_MOST * verdict.allowed, max(verdict.allowed, _AMPLIFIED * moves)))


def _nearest(
    adapters: Iterable[AnyAdapter], truth: Tensor, coarse: float, of_adapter: Callable[[AnyAdapter], Any]
) -> Verdict:
    """The first adapter that agrees; in coarse types, whose roundings tell adapters apart, the nearest."""
    single = coarse <= torch.finfo(torch.float32).eps
    best = Verdict(None, float("inf"), _ALLOWED if single else _ULPS * coarse)
    for each in adapters:
        try:
            number = difference(_first(of_adapter(each)), truth)
        except UnsupportedModelError as error:
            best = replace(best, why=best.why or str(error)) if best.adapter is None else best
            continue
        except (MambaAttnError, torch.OutOfMemoryError):
            raise
        except FAILURES as error:
            best = replace(best, why=best.why or in_words(error)) if best.adapter is None else best
            continue
        if best.adapter is None or number < best.number:
            best = Verdict(each, number, best.allowed)
        if best.agrees and single:
            break
    return best


def difference(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value; NaN where there is nothing finite to compare."""
    if value.shape != truth.shape:
        return float("inf")
    value, truth = value.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if not bool(finite.any()):
        return float("nan")
    if not bool(value[finite].isfinite().all()):
        return float("inf")
    return float((value[finite] - truth[finite]).abs().max() / truth[finite].abs().max().clamp_min(1e-30))


@contextmanager
def _alone(module: nn.Module, training: bool) -> Iterator[None]:
    """In its own mode, or eval mode, in full precision, unseen by hooks and traces."""
    exact = without_tf32() if any(parameter.is_cuda for parameter in module.parameters()) else nullcontext()
    with exact, suspended(None), undisturbed(module, own_mode=training):
        yield


def _coarsest(module: nn.Module, call: Call, truth: Tensor) -> float:
    """The rounding of the coarsest type in a call."""
    tensors = [truth, *call.tensors, *module.parameters()]
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(torch.finfo(kind).eps for kind in {*kinds, *(dtype for _, dtype in _autocast(call))})


def _autocast(call: Call) -> tuple[tuple[str, torch.dtype], ...]:
    devices = sorted({tensor.device.type for tensor in call.tensors})
    return tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))


def _first(output: Any) -> Tensor:
    found = next((value for value in pytree.tree_leaves(output) if isinstance(value, Tensor)), None)
    if found is None:
        raise TypeError(f"it returns {type(output).__name__}, and no tensor")
    return found


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
