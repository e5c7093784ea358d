"""What a trace installs outside the mixers' equations when its rules want the whole model, and takes off again.

Norms, activations, linear layers and convolutions get a forward on the instance that asks the rules, and hooks show the
rules what enters each mixer and the modules around it. Modules of a mixer that its equations hand to the rules
themselves, and modules inside a ruled one, are not ruled again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn.core.rules import ACTIVATION, LINEAR, NORM, TOKENS, Rules
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.adapters import AnyAdapter
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
    """One trace's rules for one module."""

    rules: Rules
    kind: str
    thread: int


class _RuledForward(PatchedForward):
    """The forward of a norm, an activation, a linear layer or a convolution, as the rules have it."""

    def run(self, interests: list[_Interest], again: bool, /, *args: Any, **kwargs: Any) -> Any:
        others = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        if len(args) != 1 or others or not isinstance(args[0], Tensor):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} was called with {len(args)} positional arguments"
                f"{' and ' if others else ''}{', '.join(others)}: rules for the whole model know calls with one tensor "
                "alone. A norm that adds the residual stream as well needs fused_add_norm=False."
            )
        return self._ruled(interests[-1], args[0], partial(self.original, **kwargs) if kwargs else self.original)

    def _ruled(self, interest: _Interest, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        rules = interest.rules
        if interest.kind == NORM:
            return rules.norm(self.module, x, call)
        return rules.activation(call, x) if interest.kind == ACTIVATION else rules.linear(self.module, x, call)


def install_rules(stack: ExitStack, model: nn.Module, mixers: Mixers, rules: Rules | None) -> None:
    """Install what the rules want; ``stack`` undoes it."""
    if rules is None or not rules.wants:
        return
    thread = get_ident()
    for _, module, kind in _ruled(model, mixers, rules.wants):
        stack.enter_context(patched(module, _Interest(rules, kind, thread), _RuledForward))
    if TOKENS in rules.wants:
        for mixer, module in _entrances(model, mixers):
            hook = partial(_enter, rules, mixer, thread)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def check_rules_apply(model: nn.Module, mixers: Mixers, rules: Rules | None) -> None:
    """Refuse, before anything is installed, norms that the rules would miss or do not know.

    Raises:
        UnsupportedModelError: a fused add and norm, which no module call shows; a norm of an unknown type; batch
            statistics.
    """
    if rules is None or NORM not in rules.wants:
        return
    call = f"trace(rules={type(rules).__name__})"
    for name, module in model.named_modules():
        what = f"{call}: {name or 'the model'} ({type(module).__name__})"
        if getattr(module, "fused_add_norm", False) is True:
            raise UnsupportedModelError(
                f"{what} adds and norms in one fused function, which no module call shows; build the model with "
                "fused_add_norm=False, or set that attribute to False on every module that has it."
            )
        if isinstance(module, _BATCH_NORMS) and module.training:
            raise UnsupportedModelError(f"{what} normalises with the batch's statistics; call model.eval() first.")
        if _is_unknown_norm(module) and not _inside(name, mixers):
            raise UnsupportedModelError(
                f"{what} is a norm of a type that is not known. Known: nn.LayerNorm and its subclasses, nn.RMSNorm and "
                "classes called RMSNorm, BatchNorm in eval mode."
            )


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


def _is_unknown_norm(module: nn.Module) -> bool:
    return _is_leaf(module) and "norm" in type(module).__name__.lower() and _kind(module) != NORM


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
    rules: Rules, mixer: str, thread: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Show the first tensor to the rules; where nothing before it has a gradient, let gradients start at it."""
    if thread != get_ident() or recomputing():
        return None
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if given is None:
        return None
    starts = torch.is_grad_enabled() and not given.requires_grad and given.is_floating_point()
    x = given.detach().requires_grad_() if starts else given
    rules.enter(mixer, x)
    changed = tuple(x if value is given else value for value in args)
    return changed, {name: x if value is given else value for name, value in kwargs.items()}
