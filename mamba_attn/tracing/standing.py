"""Where the tokens that a mixer gets stand in the model: one forward pass of one image, and one weighted gradient.

An adapter knows the order of a mixer's own tokens. Code around it may have flipped them before, and flip them back.
With every mixer cut, the gradient of a later tensor T reaches a mixer's output at the tokens that its cells came from:
where weights on the cells arrive as the same weights, token by token, the mixer's order is the model's. Where they do
not, bits of the cells' numbers tell the order, as in ``frames``. Only the paths between mixers count: of mixers of one
kind the first alone runs, and layers of features get cheap gradients.
"""

import random
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamba_attn._types import Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.adapters import Seen
from mamba_attn.tracing.agreement import Call, measurable
from mamba_attn.tracing.doors import Watch, open_doors, suspended
from mamba_attn.tracing.nearest_layout import nearest_layout
from mamba_attn.tracing.patch_embedding import Embedding, makes_a_class_token
from mamba_attn.tracing.patching import PatchedForward, patched
from mamba_attn.tracing.probes import LAYER_NORMS, SHARE, Centre, OnItsToken, Probe, watch_fused_norms
from mamba_attn.tracing.replay import Replay
from mamba_attn.tracing.running import modules_of
from mamba_attn.tracing.undisturbed import FAILURES, in_words, recomputing, settings, undisturbed

_LOOKS = 2  # at tensors of one shape that stand not around a mixer
_ALIVE = 1e-3  # of the largest gradient: tokens with less of it do not reach T


@dataclass(frozen=True)
class Standing:
    """What one look at a model gave.

    Args:
        orders: of the calls of mixers, by name: the cell of every token, (sequences, tokens), in the latest tensor in
            which each token has its own; -1 for tokens that do not reach it. Calls without such a tensor are left out.
        maps: shapes of the tensors of four axes and more that modules took and returned, by the modules' names.
        doors: names of modules whose scans went through doors.
        embedded: of the tensor in which the patches of the model's embedding have a cell each.
        failed: the error of a pass that did not end, in words.
    """

    orders: list[tuple[str, Int[Tensor, "_ _"]]] = field(default_factory=list)
    maps: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    doors: list[str] = field(default_factory=list)
    embedded: TokenLayout | None = None
    failed: str = ""

    def at_a_door(self, name: str) -> bool:
        """Whether a mixer's scans went through a door."""
        return any(not name or f"{door}.".startswith(f"{name}.") for door in self.doors)

    @property
    def moved(self) -> list[str]:
        """Mixers that get tokens in another order than the model has them."""
        return list(dict.fromkeys(name for name, order in self.orders if not _increases(order)))

    @property
    def whole(self) -> list[str]:
        """Mixers whose sequences are an image's tokens, one after the other."""
        return list(dict.fromkeys(name for name, order in self.orders if len(order) == 1 and _counts_up(order)))


def _increases(order: Tensor) -> bool:
    """Whether every sequence goes through the cells upwards."""
    top = torch.where(order >= 0, order, -1).cummax(1).values
    return bool(((order > F.pad(top, (1, 0), value=-1)[:, :-1]) | (order < 0)).all())


def _counts_up(order: Tensor) -> bool:
    flat = order.flatten()
    return bool(((flat == torch.arange(len(flat))) | (flat < 0)).all())


def standing(model: nn.Module, replay: Replay, mixers: Mapping[str, nn.Module], doors: bool = True) -> Standing:
    """Return where the mixers' tokens stand, measured or remembered per model, settings and shapes.

    Args:
        model: that is about to run; its modes, flags, buffers, hooks and random numbers are as before.
        replay: how it is called; one image is enough.
        mixers: by name.
        doors: whether to look which of them reach doors, if there may be any.
    """
    small = replay if replay.batch in (None, 1) else replay.changed(lambda tensor: tensor[:1])
    key = (small.key, settings(model), tuple(mixers), doors)
    remembered = _remembered.setdefault(model, {})
    if key not in remembered:
        found = _measured(model, small, mixers, doors)
        remembered[key] = _measured(model, replay, mixers, doors) if found.failed and small is not replay else found
    return remembered[key]


_remembered: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Standing]]" = weakref.WeakKeyDictionary()


class _StatesError(Exception):
    """A mixer may be given states of an earlier call, as of a model that reads its tokens forwards."""


class _EnteredError(Exception):
    """A pass has reached its first mixer, and no more of it is wanted."""


@dataclass(eq=False)
class _Cut:
    """One call of a mixer, whose output is a leaf of the graph."""

    name: str
    leaf: Tensor
    axis: int  # of features
    at: int  # number of tensors before it

    @property
    def tokens(self) -> tuple[int, int]:
        """Sequences, and tokens in each."""
        sizes = [n for axis, n in enumerate(self.leaf.shape) if axis != self.axis]
        return sizes[0], prod(sizes[1:])

    def by_token(self, gradient: Tensor | None) -> Float[Tensor, "tokens features"]:
        """A gradient, token by token."""
        value = torch.zeros_like(self.leaf) if gradient is None else gradient
        return value.detach().movedim(self.axis, -1).flatten(0, -2).float()


@dataclass(eq=False)
class _Pass:
    """A forward pass with its mixers cut, and with it the last convolution to a coarser grid before them."""

    mixers: dict[nn.Module, str]
    cuts: list[_Cut] = field(default_factory=list)
    embedding: Embedding | None = None
    entered: Tensor | None = None  # the first mixer's tokens, with their graph
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    maps: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    inside: int = 0
    to_the_first: bool = False  # whether the pass ends there
    watch: Watch | None = None  # at the doors
    doors: list[str] = field(default_factory=list)  # modules whose scans go through one
    thread: int = field(default_factory=get_ident)
    _made: dict[Any, tuple[Any, list[str]]] = field(default_factory=dict)
    _features: dict[Any, bool] = field(default_factory=dict)

    def answer(self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a mixer, or return what one of its kind did: a leaf takes the place of either, and only shapes count."""
        given, form = pytree.tree_flatten((args, kwargs))
        sizes = tuple(tuple(parameter.shape) for parameter in module.parameters())
        kind = (type(module), sizes, str(form), tuple(map(_like, given)))
        name, calls = self.mixers[module], [] if self.watch is None else self.watch.calls
        if kind not in self._made:
            before = len(calls)
            output = own(*args, **kwargs)
            self._made[kind] = output, [call.module.removeprefix(name) for call in calls[before:]]
        output, inside = self._made[kind]
        self.doors += [name + its for its in inside]
        return output

    def enters(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give a mixer its input without the graph behind it.

        Raises:
            _EnteredError: no more is wanted.
            _StatesError: with it comes what may hold states, such as a cache, which a further call would change.
        """
        if Call(args, kwargs).opaque:
            raise _StatesError
        if not self.cuts and self.entered is None and not recomputing():
            self.entered = next((v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)), None)
            if self.to_the_first:
                raise _EnteredError
        self.inside += not recomputing()
        return pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))

    def leaves(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Begin the graph anew at a mixer's output."""
        self.inside -= not recomputing()
        first = next((v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)), None)
        if first is None or first.ndim not in (3, 4) or not first.is_floating_point():
            return output
        leaf = torch.zeros_like(first.detach()).requires_grad_()
        axis = 1 if first.ndim == 4 and getattr(module, "channel_first", False) else first.ndim - 1
        if not recomputing():  # checkpointing wants the same again
            self.cuts.append(_Cut(self.mixers[module], leaf, axis, len(self.tensors)))
        return pytree.tree_map(lambda v: v.detach() + leaf if v is first else v, output)

    def show(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        """Begin the graph at patches: what a convolution made of a finer grid, before any mixer; keep norms."""
        if func in LAYER_NORMS:
            self.keep("a norm", out)
        if not self.inside and len(args) > 1 and func not in LAYER_NORMS:
            cheap = self._on_its_token(args[0], args[1], out, -1 if func is F.linear else 1)
            if cheap is not out:
                return cheap
        convolved = func in (F.conv2d, F.conv3d) and len(args) > 1
        if not convolved or self.inside or self.cuts or out.ndim < 4 or out.shape[2:] == args[0].shape[2:]:
            return out
        leaf = torch.zeros_like(out.detach()).requires_grad_()
        self.embedding = Embedding.of(args, kwargs, leaf)
        return out.detach() + leaf

    def _on_its_token(self, x: Tensor, weight: Tensor, out: Tensor, axis: int) -> Tensor:
        """A layer of features with a cheap gradient, where it is certain that its axis is no part of the tokens.

        All tokens of the last mixer stand in the other axes, and the number of features does not divide theirs, as the
        length of any axis of a grid of tokens would.
        """
        if not (x.requires_grad and out.requires_grad):
            return out
        # when checkpointing repeats it, more mixers have run: the same again
        key = (weight.data_ptr(), weight.shape, x.shape)
        if key not in self._features:
            count, others = x.shape[axis], out.numel() // out.shape[axis]
            plain = axis == -1 or (set(weight.shape[2:]) == {1} and weight.shape[1] == count)
            same = x.numel() == count * others and x.ndim == out.ndim
            known = bool(self.cuts) and prod(self.cuts[-1].tokens) == others
            self._features[key] = plain and same and known and others % count != 0 and others % out.shape[axis] != 0
        return OnItsToken.apply(x, out.detach(), axis) if self._features[key] else out  # type: ignore[no-untyped-call]

    def returns(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what a module around the mixers returned."""
        if self.inside or recomputing():
            return
        values = [v for v in pytree.tree_leaves((args, output)) if isinstance(v, Tensor) and v.ndim > 2]
        self.maps.setdefault(name, []).extend(tuple(v.shape) for v in values if v.ndim > 3)
        if module not in self.mixers:
            self.keep(name, output)

    def keep(self, name: str, output: Any) -> None:
        """Keep what a module, or a norm that is called as a function, returned around the mixers."""
        if self.inside or recomputing():
            return
        found = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.ndim > 2]
        self.tensors += [(name, v) for v in reversed(found) if v.requires_grad and v.is_floating_point()]


class _Answered(PatchedForward):
    """A mixer's forward during a look, which sees what this library calls for itself."""

    seen_by_us = True

    def run(self, interests: list[_Pass], again: bool, /, *args: Any, **kwargs: Any) -> Any:
        return interests[-1].answer(self.module, self.original, args, kwargs)


def _like(value: Any) -> Any:
    """What of an argument the shapes of a mixer's output may depend on."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return value if value is None or isinstance(value, bool | int | float | str) else type(value)


def _measured(model: nn.Module, replay: Replay, mixers: Mapping[str, nn.Module], doors: bool) -> Standing:
    if any(parameter.is_inference() for parameter in model.parameters()):
        return Standing()
    watch = Watch(model)
    seen = _Pass({module: name for name, module in mixers.items()}, watch=watch)
    with ExitStack() as stack:
        stack.callback(watch.close)
        for block in (torch.inference_mode(False), undisturbed(model), suspended(watch)):
            stack.enter_context(block)
        if doors:
            stack.enter_context(open_doors(watch))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # the traced pass gives them
        # read here, where no other thread has them changed for the same purpose
        named = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]
        for name, parameter, flag in named:
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(makes_a_class_token(name) and parameter.is_floating_point())
        classes = [parameter for _, parameter, _ in named if parameter.requires_grad]
        try:
            with _run(model, replay, seen):
                orders, embedded = _orders(seen), _embedded(seen, classes, replay)
            if embedded is not None:  # unless it is drawn at random, as some forks draw a class token's place
                again = _Pass(seen.mixers, to_the_first=True)
                random.seed(1)
                torch.manual_seed(1)
                with suppress(_EnteredError), _run(model, replay, again):
                    pass
                embedded = embedded if _embedded(again, classes, replay) == embedded else None
            return Standing(orders, seen.maps, list(dict.fromkeys(seen.doors)), embedded)
        except _StatesError:
            return Standing(maps=seen.maps)
        except FAILURES as error:  # it does not run so: nothing is known
            return Standing(maps=seen.maps, failed=in_words(error))


@contextmanager
def _run(model: nn.Module, replay: Replay, seen: _Pass) -> Iterator[None]:
    """Run the model; what was put on it stays for the block, since checkpointing runs parts of it again."""
    own = replay.changed(Tensor.clone)
    with ExitStack() as hooks:
        _install(hooks, model, seen)
        for device, dtype in own.autocast:
            hooks.enter_context(torch.autocast(device, dtype=dtype))
        model(*own.args, **own.kwargs)
        yield


def _install(stack: ExitStack, model: nn.Module, seen: _Pass) -> None:
    for name, module in modules_of(model).items():
        if module in seen.mixers:
            stack.enter_context(patched(module, seen, _Answered))
            stack.callback(module.register_forward_pre_hook(seen.enters, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(seen.leaves).remove)
        stack.callback(module.register_forward_hook(partial(seen.returns, name)).remove)
    watch_fused_norms(stack, partial(seen.keep, "a norm"))
    stack.enter_context(Centre(seen.show))


def _orders(seen: _Pass) -> list[tuple[str, Tensor]]:
    """Cell of every token, in the latest tensor in which each has one of its own."""
    found: dict[_Cut, Tensor] = {}
    looks: dict[tuple[_Cut, tuple[int, ...]], int] = {}
    for number in reversed(range(len(seen.tensors))):
        name, out = seen.tensors[number]
        shape = tuple(out.shape)
        left = [cut for cut in seen.cuts if cut.at <= number and cut not in found]
        left = [cut for cut in left if looks.get((cut, shape), 0) < _LOOKS or f"{cut.name}.".startswith(f"{name}.")]
        for axis in dict.fromkeys((out.ndim - 1, 1)):
            wanted = [cut for cut in left if prod(cut.tokens) == out.numel() // shape[axis] and cut not in found]
            found.update(_decoded(Probe(out, axis), out, wanted) if wanted else ())
            looks.update({(cut, shape): looks.get((cut, shape), 0) + 1 for cut in wanted})
    return [(cut.name, found[cut]) for cut in seen.cuts if cut in found]


def _embedded(seen: _Pass, classes: Sequence[nn.Parameter], replay: Replay) -> TokenLayout | None:
    """Where the embedding's patches stand among the first mixer's tokens, where each has one of its own."""
    embedding, out = seen.embedding, seen.entered
    if embedding is None or out is None or out.ndim != 3 or not out.requires_grad or len(out) != 1:
        return None
    cut = _Cut("", embedding.leaf, 1, 0)
    if cut.tokens[0] != 1 or cut.tokens[1] > out.shape[1]:
        return None
    found = dict(_decoded(Probe(out, 2), out, [cut]))
    if not found:
        return None
    order = found[cut][0]
    others = sorted(set(range(out.shape[1])) - set(order.tolist()))
    made = [token for token in others if _reaches(classes, out[0, token])]
    return embedding.layout(order, out.shape[1], made, replay.tensors)


def _reaches(parameters: Sequence[nn.Parameter], token: Float[Tensor, " features"]) -> bool:
    """Whether a token depends on any of them."""
    if not parameters:
        return False
    noise = torch.randn(token.shape, generator=torch.Generator().manual_seed(0)).to(token)  # norms hide a sum's
    found = torch.autograd.grad((token * noise).sum(), parameters, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


def _decoded(probe: Probe, out: Tensor, cuts: Sequence[_Cut]) -> Iterator[tuple[_Cut, Tensor]]:
    """The orders of the mixers whose tokens have a cell each in T."""

    def back(cotangent: Tensor, wanted: Sequence[_Cut]) -> list[Tensor]:
        leaves = [cut.leaf for cut in wanted]
        gradients = torch.autograd.grad(out, leaves, cotangent, retain_graph=True, allow_unused=True)
        return [cut.by_token(gradient) for cut, gradient in zip(wanted, gradients, strict=True)]

    same = torch.arange(probe.cells, device=out.device)
    others: list[tuple[_Cut, Tensor, Tensor]] = []
    for cut, plain, weighted in zip(cuts, back(probe.noise, cuts), back(probe.weighted, cuts), strict=True):
        alive = _alive(plain)
        if int(alive.sum()) * 2 < probe.cells:
            continue
        if len(plain) == probe.cells and _share(plain, weighted, probe.weight) >= SHARE:
            yield cut, torch.where(alive, same, -1).view(cut.tokens).cpu()
        elif _share(plain, weighted, None) >= SHARE:
            others.append((cut, plain, weighted))
    if not others:
        return
    numbers = [torch.zeros(len(plain), dtype=torch.long, device=out.device) for _, plain, _ in others]
    for bit in range(probe.bits):
        for own, (_, plain, _), some in zip(
            numbers, others, back(probe.with_bit(bit), [cut for cut, _, _ in others]), strict=True
        ):
            own += (2 * (plain * some).sum(1) > plain.square().sum(1)).long() << bit
    for own, (cut, plain, weighted) in zip(numbers, others, strict=True):
        order, alive = probe.cell_of(own), _alive(plain)
        single = len(order[alive].unique()) == int(alive.sum())
        if single and _share(plain, weighted, probe.weight[order]) >= SHARE:
            yield cut, torch.where(alive, order, -1).view(cut.tokens).cpu()


def _alive(gradient: Tensor) -> Tensor:
    size: Tensor = gradient.norm(dim=1)
    return size > _ALIVE * size.amax()


def _share(plain: Tensor, weighted: Tensor, weight: Tensor | None) -> float:
    """Part of a token's gradient with its cell's weight, or with any one weight, of the worst hundredth of tokens."""
    alive = _alive(plain)
    plain, weighted = plain[alive], weighted[alive]
    any_one = (plain * weighted).sum(1) / plain.square().sum(1).clamp_min(1e-30)
    own = any_one if weight is None else weight[alive].to(plain)
    error = (weighted - plain * own[:, None]).norm(dim=1) / plain.norm(dim=1).clamp_min(1e-30)
    share = (1 - error.clamp_max(1)).sort().values
    return float(share[len(share) // 100]) if len(share) else 0.0


class Ahead:
    """Looks at a model ahead of its first run in a trace.

    Args:
        model: that is traced.
        mixers: by name, those that adapters trace.
        seen: what the forward pass shows of the image.
        watch: at doors, or None.
    """

    def __init__(self, model: nn.Module, mixers: Mapping[str, nn.Module], seen: Seen, watch: Watch | None) -> None:
        self.model = model
        self.mixers = mixers
        self.at_doors: list[str] = []  # mixers whose order is measured there, since they get tokens in another
        self.unplaced: list[str] = []  # the same, where there is no door
        self._seen = seen
        self._watch = watch
        self._thread = get_ident()
        self._replay: Replay | None = None
        self._found = Standing()

    def install(self, stack: ExitStack) -> None:
        """Look when the model is called."""
        hook = self.model.register_forward_pre_hook(self._starts, with_kwargs=True)
        stack.callback(hook.remove)

    def _starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asleep = self._watch is not None and self._watch.suspended
        if self._replay is not None or asleep or get_ident() != self._thread or recomputing() or not measurable():
            return
        self._replay = Replay.of(args, kwargs)
        self._found = standing(self.model, self._replay, self.mixers, self._watch is not None)
        moved = self._found.moved
        given = self._seen.layout is not None
        if not given and next(iter(self.mixers), None) in self._found.whole:
            self._seen.embedded = self._found.embedded
        seen = [name for name in self.mixers if self._watch is not None and self._found.at_a_door(name)]
        self.unplaced = [name for name in moved if name not in seen]
        if self._watch is not None and any(name in seen for name in moved):  # the others, too: in one frame
            elsewhere = {name for name, _ in self._found.orders if name not in self._found.whole}
            self.at_doors = [name for name in seen if name in elsewhere]
            self._watch.outside -= {id(self.mixers[name]) for name in self.at_doors}

    def layout_of(self, name: str, batch: int, tokens: int) -> TokenLayout | None:
        """Return the layout of a mixer's tokens from the nearest feature map, where that has as many cells.

        Args:
            name: the mixer's.
            batch: number of its sequences.
            tokens: number of tokens in each.
        """
        whole = name in self._found.whole  # a mixer may take channels for tokens
        if self._replay is None or self._replay.batch != batch or not whole:
            return None
        if self._seen.embedded is not None and self._seen.embedded.tokens == tokens:
            return self._seen.embedded
        layout = nearest_layout(name, tokens, self._found.maps, self._replay, self._seen)
        return layout if layout is not None and len(layout.grid) > 1 else None

    def sentence(self) -> str | None:
        """What to say of mixers that get tokens in another order, or of whose order nothing is known; None: nothing."""
        if self._found.failed:
            return (
                "trace: whether code around the mixers gives them the tokens in another order is not known, since the "
                f"model does not run with gradients ahead of the pass ({self._found.failed}). Their "
                "matrices are in the order in which they get the tokens."
            )
        if not self.unplaced:
            return None
        shown = ", ".join(self.unplaced[:6]) + (f" and {len(self.unplaced) - 6} more" if self.unplaced[6:] else "")
        return (
            f"trace: {shown} get the tokens in another order than the model around them has, and their scans go "
            "through no door at which it could be measured: their matrices are in the order in which they get them, "
            "and a product with those of other layers mixes two orders."
        )
