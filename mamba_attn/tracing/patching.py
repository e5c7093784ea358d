"""What a trace installs on a user's model, and takes off again: forwards of mixers, and hooks.

``tracer`` says what is traced and owns the ExitStack; ``module_rules`` patches the norms, activations and linear layers
around the mixers. Nothing else touches a user's model.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, get_ident
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import PLAIN, Rules, unruled
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.ops import hidden_attention, selective_scan
from mamba_attn.tracing.adapters import AnyAdapter, AttentionAdapter, LayoutSource, Seen
from mamba_attn.tracing.agreement import Call, Verdict, judge, judge_call, latest, measurable
from mamba_attn.tracing.doors import Watch
from mamba_attn.tracing.edits import Edit, edited_probabilities, edited_scan
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.softmax_layers import AttentionLayer
from mamba_attn.tracing.texts import is_text, real_tokens, require_prefill
from mamba_attn.tracing.undisturbed import recomputing, unseen


@dataclass(frozen=True, eq=False)
class Interest:
    """The interest of one trace, or of one intervention, in one mixer.

    Args:
        name: the mixer's name in the model.
        seen: what the forward pass has shown so far.
        adapter: the mixer's.
        store: takes the layer of a call; None: an intervention's.
        attention: a fold whose matrix is computed during the pass, or None.
        rules: what changes in the forward, or None.
        apart: takes what says that the adapter does not compute what the mixer does.
        watch: at the doors that its scans may go through, or None.
        edits: what an intervention does to the mixer of a name, or None.
        thread: whose calls are traced.
    """

    name: str
    seen: Seen
    adapter: AnyAdapter
    store: Callable[[Layer], None] | None = None
    attention: str | None = None
    rules: Rules | None = None
    apart: Callable[[str, Verdict], None] | None = None
    watch: Watch | None = None
    edits: Callable[[str], list[Edit]] | None = None
    thread: int = field(default_factory=get_ident)

    def send_to_doors(self, module: nn.Module, verdict: Verdict) -> None:
        """Let the doors see the mixer's scans, which its adapter does not compute."""
        if self.watch is not None:
            self.watch.outside.discard(id(module))
        if self.watch is not None and self.apart is not None:
            self.apart(self.name, verdict)

    def at_doors(self, module: nn.Module) -> bool:
        """Whether the mixer's scans are seen at doors."""
        return self.watch is not None and id(module) not in self.watch.outside

    @property
    def scans_seen(self) -> int:
        """Number of scans that came through doors so far."""
        return 0 if self.watch is None else len(self.watch.calls)

    def why_refused(self, module: nn.Module, verdict: Verdict) -> str:
        """What disagrees, and why no door shows its scans."""
        sentence = verdict.sentence(self.name, module, self.adapter.family).rstrip(".")
        another = None if self.watch is None else self.watch.another_recurrence()
        return f"{sentence}. {another or 'None of its scans goes through a door that is known, so it is not traced.'}"


class PatchedForward(ABC):
    """Stands in a module's ``forward`` while anybody traces it; calls of other threads go to the original."""

    seen_by_us: ClassVar[bool] = False  # whether it also answers where this thread calls the module for us

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = module.forward
        self.__wrapped__ = module.forward  # adapters read which function that is
        self.own = "forward" in module.__dict__  # SS2D of VMamba sets its forward on the instance
        self.interests: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model made inside a trace gets its plain forward, bound to the copy."""
        function = getattr(self.original, "__func__", None)
        return self.original if function is None else MethodType(function, copy.deepcopy(self.module, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer in the forward's place, for the traces that this thread has open."""
        if unseen() and not self.seen_by_us:
            return self.original(*args, **kwargs)
        again = recomputing()
        interests = [interest for interest in tuple(self.interests) if again or interest.thread == get_ident()]
        return self.run(interests, again, *args, **kwargs) if interests else self.original(*args, **kwargs)

    @abstractmethod
    def run(self, interests: list[Any], again: bool, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward as its traces want it; ``again`` when checkpointing repeats it."""


class _RoutedForward(PatchedForward):
    """A mixer's forward, through ``mamba_attn.ops``."""

    @unruled()
    def run(self, interests: list[Interest], again: bool, /, *args: Any, **kwargs: Any) -> Any:
        readers = [interest for interest in interests if interest.store is not None]
        edits = _edits(interests)
        last, call = (readers or interests)[-1], Call(args, kwargs)
        if last.at_doors(self.module) or not (readers or edits):
            return self.original(*args, **kwargs)
        rules = next((interest.rules for interest in reversed(interests) if interest.rules is not None), PLAIN)
        wanted = dict.fromkeys(interest.attention for interest in interests if interest.attention)
        computed: dict[AnyAdapter, _Computed] = {}

        def ready(adapter: AnyAdapter) -> Any:
            computed[adapter] = _compute(adapter, self.module, call, last.seen, rules, wanted)
            return computed[adapter].output

        verdict: Verdict | None
        if call.opaque and not again:
            verdict = self._beside_own(last, call)
        else:
            reusable = rules is PLAIN and not edits and not self.module.training and not _hooked(self.module)
            verdict = _verdict(last, self.module, self.original, call, again, ready if reusable else None)
        if verdict is not None and not verdict.agrees:
            return self._at_doors(interests, again, call, verdict)
        adapter = last.adapter if verdict is None or verdict.adapter is None else verdict.adapter
        found = computed.get(adapter) or _compute(
            adapter, self.module, call, last.seen, rules, wanted, (last.name, edits)
        )
        for interest in interests if not again else ():
            if interest.store is not None:
                interest.store(found.layer(interest))
        return found.output

    def _beside_own(self, last: Interest, call: Call) -> Verdict:
        """Run the module's own forward as well, since what it was given may keep states: a cache must be filled.

        Raises:
            UnsupportedModelError: it returns something else than without these states.
        """
        devices = {tensor.device for tensor in call.tensors if tensor.is_cuda}
        with torch.random.fork_rng(devices), torch.no_grad():
            own = self.original(*call.args, **call.kwargs)
        return _against(last, self.module, call, own)

    def _at_doors(self, interests: list[Interest], again: bool, call: Call, verdict: Verdict) -> Any:
        """Run the module's own forward, whose scans the doors see.

        Raises:
            UnsupportedModelError: none of them goes through a door.
        """
        with unruled(False):  # its functions are asked for rules as any other code's
            if again:
                return self.original(*call.args, **call.kwargs)
            for interest in interests:
                interest.send_to_doors(self.module, verdict)
            before = [interest.scans_seen for interest in interests]
            output = self.original(*call.args, **call.kwargs)
        for interest, count in zip(interests, before, strict=True):
            measuring = interest.watch is not None and interest.watch.suspended
            if interest.scans_seen == count and not measuring:
                raise UnsupportedModelError(interest.why_refused(self.module, verdict))
        return output


def _edits(interests: Iterable[Interest]) -> list[Edit]:
    """What interventions do to a mixer."""
    return [edit for interest in interests if interest.edits is not None for edit in interest.edits(interest.name)]


@dataclass(eq=False)
class _Computed:
    """What an adapter made of one call."""

    record: ScanRecord | AttentionRecord
    variable: Tensor
    output: Any
    folds: dict[str, Tensor]

    def layer(self, interest: Interest) -> Layer:
        """As a trace keeps it."""
        if isinstance(self.record, AttentionRecord):
            return AttentionLayer(interest.name, self.record, output=self.output)
        ready = (interest.attention, self.folds[interest.attention]) if interest.attention else None
        return ScanLayer(interest.name, self.record, y=self.variable, output=self.output, attention=ready)


def _compute(
    adapter: AnyAdapter,
    module: nn.Module,
    call: Call,
    seen: Seen,
    rules: Rules,
    folds: Iterable[str] = (),
    edits: tuple[str, Sequence[Edit]] = ("", ()),
) -> _Computed:
    """Run a call of a mixer through its adapter; ``edits``: of the layer with that name."""
    if isinstance(adapter, AttentionAdapter):
        record = rules.attention(adapter.project(module, *call.args, rules=rules, seen=seen, **call.kwargs))
        _start_gradients(record.probabilities)
        kept = edited_probabilities(edits[0], record, edits[1])
        output = adapter.finish(module, record, kept, rules)
        return _Computed(record, kept, output, {})
    scan = rules.scan(adapter.project(module, *call.args, rules=rules, seen=seen, **call.kwargs))
    both = {fold: selective_scan(scan, attention=fold) for fold in folds}
    y = next(iter(both.values()))[0] if both else selective_scan(scan)
    y = edited_scan(edits[0], scan, y, edits[1]) if edits[1] else y
    _start_gradients(y)
    output = adapter.finish(module, scan, y, rules)
    return _Computed(scan, y, output, {fold: matrix for fold, (_, matrix) in both.items()})


def _verdict(
    interest: Interest,
    module: nn.Module,
    own: Callable[..., Any],
    call: Call,
    again: bool,
    ready: Callable[[AnyAdapter], Any] | None = None,
) -> Verdict | None:
    """Whether the adapter computes what the module does, compared or remembered; None: it cannot be compared now."""
    if again or not measurable():  # of a repeated call the first said it
        return latest(module)

    def answer(adapter: AnyAdapter, again: Call) -> Any:
        return _compute(adapter, module, again, interest.seen, PLAIN).output

    return judge(module, own, interest.adapter, call, interest.seen, answer, ready)


def _against(interest: Interest, module: nn.Module, call: Call, own: Any) -> Verdict:
    """Compare an adapter with what the module returned, when it was called with what may hold states.

    Raises:
        UnsupportedModelError: they differ.
    """

    def answer(adapter: AnyAdapter, again: Call) -> Any:
        return _compute(adapter, module, again, interest.seen, PLAIN).output

    verdict = judge_call(module, own, interest.adapter, call, answer)
    if not verdict.agrees:
        sentence = verdict.sentence(interest.name, module, interest.adapter.family).rstrip(".")
        raise UnsupportedModelError(
            f"{sentence}. It was called with {', '.join(dict.fromkeys(call.opaque))}, which may hold states of an "
            "earlier call: generate first, then trace the whole text in one forward, from its first token; a causal "
            "model gives the same rows (use_cache=False)."
        )
    return verdict


def _hooked(module: nn.Module) -> bool:
    """Whether a hook is on a mixer or inside it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _start_gradients(variable: Tensor) -> None:
    """In a frozen model, let gradients with respect to a layer's variable start at it."""
    if torch.is_grad_enabled() and not variable.requires_grad:
        variable.requires_grad_()


_install = Lock()


@contextmanager
def patched(module: nn.Module, interest: Any, kind: type[PatchedForward] = _RoutedForward) -> Iterator[None]:
    """Install a forward on the instance, by default one that runs a mixer through ``mamba_attn.ops``.

    Undone when the last interest in it ends.
    """
    with _install:
        found = module.__dict__.get("forward")
        forward = found if isinstance(found, kind) else kind(module)
        module.__dict__["forward"] = forward
        forward.interests.append(interest)
    try:
        yield
    finally:
        with _install:
            forward.interests.remove(interest)
            # a forward that somebody put around ours stays
            if not forward.interests and module.__dict__.get("forward") is forward:
                if forward.own:
                    module.__dict__["forward"] = forward.original
                else:
                    del module.__dict__["forward"]


_Verdicts = list[tuple[Verdict | None, int]]  # of the call that runs, with the number of scans seen before it


@contextmanager
def observed(module: nn.Module, interest: Interest) -> Iterator[None]:
    """Install hooks that recompute the record of a call, which runs untouched, from its input."""
    verdicts: _Verdicts = []
    with ExitStack() as stack:
        look, observe = partial(_look_at, interest, verdicts), partial(_observe, interest, verdicts)
        stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(observe, with_kwargs=True).remove)
        yield


def _look_at(
    interest: Interest,
    verdicts: _Verdicts,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Compare before the call, so that doors see the scans of one that differs."""
    again, call = recomputing(), Call(args, kwargs)
    if interest.thread != get_ident() and not again:
        return
    verdicts.clear()
    if call.opaque or interest.at_doors(module):
        return
    verdict = _verdict(interest, module, module.forward, call, again)
    verdicts.append((verdict, interest.scans_seen))
    if verdict is not None and not verdict.agrees and not again:
        interest.send_to_doors(module, verdict)


def _observe(
    interest: Interest,
    verdicts: _Verdicts,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    again, call = recomputing(), Call(args, kwargs)
    if (interest.thread != get_ident() and not again) or (interest.at_doors(module) and not verdicts):
        return
    if call.opaque and not again:
        verdicts.append((_against(interest, module, call, output), 0))
    verdict, before = verdicts[0] if verdicts else (None, 0)
    if verdict is not None and not verdict.agrees:
        if interest.scans_seen == before and not again:
            raise UnsupportedModelError(interest.why_refused(module, verdict))
        return
    adapter = interest.adapter if verdict is None or verdict.adapter is None else verdict.adapter
    store = (
        _forget if again or interest.store is None else interest.store
    )  # checkpointing wants the same computations again, nobody else does
    finish: Callable[[Tensor], Tensor]
    if isinstance(adapter, AttentionAdapter):
        record = adapter.project(module, *args, rules=PLAIN, seen=interest.seen, **kwargs)
        finish = partial(adapter.finish, module, record.map_tensors(Tensor.detach), rules=PLAIN)
        store(AttentionLayer(interest.name, record, output=output, tail=_repeatable(interest.name, module, finish)))
        return
    scan = adapter.project(module, *args, rules=PLAIN, seen=interest.seen, **kwargs)
    finish = partial(adapter.finish, module, scan.map_tensors(Tensor.detach), rules=PLAIN)
    ready = (interest.attention, hidden_attention(scan, fold=interest.attention)) if interest.attention else None
    tail = _repeatable(interest.name, module, finish)
    edits = _edits(getattr(module.__dict__.get("forward"), "interests", ()))
    y = edited_scan(interest.name, scan, selective_scan(scan), edits) if edits else None
    store(ScanLayer(interest.name, scan, y=y, output=output, tail=tail, attention=ready))


def _forget(layer: Layer) -> None:
    """Store nothing."""


def _repeatable(name: str, module: nn.Module, finish: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``finish``, unless it would draw other random numbers than the model's own forward did."""
    if not any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in module.modules()):
        return finish

    def refuse(variable: Tensor) -> Tensor:
        raise TraceError(
            f"{name}: gradients() cannot repeat active dropout in mode='observe'; use mode='route', or model.eval()."
        )

    return refuse


def watch_layout(
    stack: ExitStack, modules: Mapping[str, nn.Module], sources: Iterable[LayoutSource], seen: Seen
) -> None:
    """Learn the image size from the first convolution's input, and the token frame from the patch embedding or text.

    ``modules`` are the model's by name, itself first.
    """
    model = modules[""]
    thread, given = get_ident(), seen.layout is not None

    def image(module: nn.Conv2d, args: tuple[Any, ...]) -> None:
        if thread == get_ident() and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            seen.batch, seen.image_size = args[0].shape[0], (args[0].shape[2], args[0].shape[3])
            seen.padded_stem = module.padding == tuple((size - 1) / 2 for size in module.kernel_size)

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if thread != get_ident():
            return
        weight = next(module.parameters(), None)
        first = next((value for value in args if isinstance(value, Tensor)), None)
        if weight is not None and first is not None and first.device != weight.device:
            raise ValueError(
                f"the model is on {weight.device} and its input on {first.device}: move one, e.g. "
                f"{'ids' if is_text(first) else 'images'}.to({str(weight.device)!r})."
            )
        require_prefill(kwargs)
        if seen.real is not None:
            return  # the model runs again, on a part of the batch, to measure orders
        seen.real = real_tokens(module, args, kwargs)
        if seen.real is not None and not given:
            seen.layout = TokenLayout.line(seen.real.shape[1])

    stack.callback(model.register_forward_pre_hook(begins, with_kwargs=True, prepend=True).remove)
    first = next((module for module in modules.values() if isinstance(module, nn.Conv2d)), None)
    if first is not None:
        stack.callback(first.register_forward_pre_hook(image).remove)

    def look(source: LayoutSource, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if thread != get_ident():
            return
        if source.inside:  # kept for each: gradient checkpointing runs a block again, but not what stands around it
            layout = source.read(seen, args, output)
            seen.frames.update(dict.fromkeys(module.modules(), layout) if layout is not None else {})
        elif not given:
            seen.layout = source.read(seen, args, output)

    for source in sources:
        install = source.module.register_forward_pre_hook if source.before else source.module.register_forward_hook
        stack.callback(install(partial(look, source)).remove)
