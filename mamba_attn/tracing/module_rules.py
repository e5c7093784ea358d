"""What a trace installs outside the mixers' equations when its rules want the whole model, and takes off again.

Norms, activations, linear layers and convolutions get a forward on the instance that asks the rules; what the rest of
the model calls as functions is met by ``function_rules``. Hooks show the rules what enters each mixer and the modules
around it. Modules of a mixer that its equations hand to the rules themselves, and modules inside a ruled one, are not
ruled again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from mamba_attn.core.rules import ACTIVATION, KINDS, LINEAR, NORM, TOKENS, Rules, unruled
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.adapters import AnyAdapter
from mamba_attn.tracing.entrances import Arrivals
from mamba_attn.tracing.function_rules import FunctionRules
from mamba_attn.tracing.patching import PatchedForward, patched
from mamba_attn.tracing.undisturbed import recomputing

Mixers = Mapping[str, tuple[nn.Module, AnyAdapter]]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, *_BATCH_NORMS)
_NORM_NAMES = ("RMSNorm", "LayerNorm", "LayerNorm2d")  # of foreign classes with a weight and an eps
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)
_ACTIVATIONS = (  # all with f(0) = 0, so that f(x) / x is finite
    nn.SiLU,
    nn.GELU,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Mish,
    nn.Hardswish,
    nn.Tanh,
    nn.Hardtanh,
    nn.Softsign,
)
_ACTIVATION_NAMES = ("GELU", "GELUTanh", "QuickGELU", "QuickGelu", "Swish", "SiLU", "HardSwish", "HardMish", "Mish")


@dataclass(frozen=True, eq=False)
class _Interest:
    """One trace's rules for one module; ``functions``: whether they are also asked at functions."""

    rules: Rules
    kind: str
    thread: int
    functions: bool
    quiet: Callable[[], bool]


@dataclass(frozen=True, eq=False)
class Asked:
    """What enters the modules, and the functions that are ruled, of one trace."""

    arrivals: Arrivals
    functions: FunctionRules


class _RuledForward(PatchedForward):
    """The forward of a norm, an activation, a linear layer or a convolution, as the rules have it."""

    def run(self, interests: list[_Interest], again: bool, /, *args: Any, **kwargs: Any) -> Any:
        interest = interests[-1]
        others = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        known = len(args) == 1 and not others and isinstance(args[0], Tensor)
        if not known and not interest.functions and not interest.quiet():
            raise UnsupportedModelError(
                f"{type(self.module).__name__} was called with {len(args)} positional arguments"
                f"{' and ' if others else ''}{', '.join(others)}: these rules know calls with one tensor alone."
            )
        if not known or interest.quiet():
            return self.original(*args, **kwargs)
        with unruled():
            return self._ruled(interest, args[0], partial(self.original, **kwargs) if kwargs else self.original)

    def _ruled(self, interest: _Interest, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        rules = interest.rules
        if interest.kind == NORM:
            return rules.norm(self.module, x, call)
        return rules.activation(call, x) if interest.kind == ACTIVATION else rules.linear(self.module, x, call)


def install_rules(
    stack: ExitStack, model: nn.Module, mixers: Mixers, rules: Rules | None, quiet: Callable[[], bool] = bool
) -> Asked | None:
    """Install what the rules want; ``stack`` undoes it.

    Args:
        stack: of the trace.
        model: the model.
        mixers: those that an adapter knows.
        rules: the rules.
        quiet: whether the model runs for something else at the moment.

    Returns:
        What rules that want everything need of the pass.
    """
    if rules is None or not rules.wants:
        return None
    thread, everything, asked = get_ident(), rules.wants >= frozenset(KINDS), None
    for _, module, kind in _ruled(model, mixers, rules.wants):
        interest = _Interest(rules, kind, thread, everything, quiet)
        stack.enter_context(patched(module, interest, _RuledForward))
    if everything:
        arrivals = Arrivals(model, quiet)
        arrivals.install(stack)
        asked = Asked(arrivals, FunctionRules(model, rules, arrivals.sources, quiet))
        stack.enter_context(asked.functions)
    if TOKENS in rules.wants:
        for mixer, module in _entrances(model, mixers):
            hook = partial(_enter, rules, mixer, thread, quiet)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
    return asked


def _ruled(model: nn.Module, mixers: Mixers, wants: frozenset[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, kind) of what is ruled, the outermost where they are nested."""
    outer: list[str] = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind not in wants or (kind != LINEAR and _inside(name, mixers)) or _inside(name, outer):
            continue
        outer.append(name)
        yield name, module, kind


def _kind(module: nn.Module) -> str:
    if isinstance(module, _LINEAR):
        return LINEAR
    if isinstance(module, _ACTIVATIONS) or (type(module).__name__ in _ACTIVATION_NAMES and _is_leaf(module)):
        return ACTIVATION
    if isinstance(module, _NORMS) or (type(module).__name__ in _NORM_NAMES and _is_leaf(module)):
        return NORM
    return ""


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _inside(name: str, outer: Any) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in outer)


def _entrances(model: nn.Module, mixers: Mixers) -> Iterator[tuple[str, nn.Module]]:
    """(mixer's name, module) for each mixer and the modules around it that hold neither an earlier mixer nor the stem.

    The outermost of them that is called receives the tokens with their residual stream; what holds the stem, the first
    convolution, receives images.
    """
    modules = dict(model.named_modules())
    convolutions = (name for name, module in modules.items() if isinstance(module, nn.Conv2d))
    before = [name for name in convolutions if not _inside(name, mixers)][:1]
    for mixer in mixers:
        parts = mixer.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        for name in around:
            if not any(_inside(other, [name]) for other in before):
                yield mixer, modules[name]
        before.append(mixer)


def _enter(
    rules: Rules, mixer: str, thread: int, quiet: Callable[[], bool], module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Show the first tensor to the rules."""
    if thread == get_ident() and not recomputing() and not quiet():
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None:
            rules.enter(mixer, given)
