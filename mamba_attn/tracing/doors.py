"""Doors: the functions that scans of anybody's code go through, watched for the length of a trace.

A door is ``fwd`` and ``bwd`` of a compiled extension (``selective_scan_cuda``, its ``_core`` and ``_oflex``, and their
other names), wherever a module holds it, or of a CPU stand-in of one. Code looks them up at every call, so that a
wrapper around them sees all scans of a model and changes none. A door is patched once, however many traces are open;
each call asks which of them it concerns: those of its own thread, or of any thread when it runs inside a backward pass.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.tracing.chunk_scans import (
    ChunkInputs,
    backward_arguments,
    forward_inputs,
    scanned,
    with_output,
    zeros,
)
from mamba_attn.tracing.door_rules import edited_backward, ruled_backward, ruled_chunk_backward
from mamba_attn.tracing.edits import CallEdit, edited_call
from mamba_attn.tracing.reachable import CHUNK_SCANS, Loaded, compiled_scans
from mamba_attn.tracing.running import Names, running_modules
from mamba_attn.tracing.selective_scans import (
    AnyInputs,
    ScanCall,
    ScanInputs,
    ScanStates,
    as_extension,
    detached_plain,
    first_flag,
    replaceable,
    scan_inputs,
    zeros_of,
)
from mamba_attn.tracing.undisturbed import recomputing

if TYPE_CHECKING:
    from mamba_attn.tracing.softmax_calls import SoftmaxCall

Handler = Callable[..., Any]  # what stands in a function's place: handler(door, *the function's arguments)


class Watch:
    """What one trace sees at the doors.

    Args:
        model: whose modules' scans are wanted.
        outside: modules whose scans are not, those inside them included.
        attention: a fold; our operator then takes the scan's place and gives that matrix beside the output.
        cut: no gradient passes a scan, and ``dout`` is kept at each: for measuring orders.
        rules: what an attribution method changes, by what the doors' backward passes return.
        around: further doors: modules, and what stands in their functions' places.
        edits: what an intervention does to the next scan of a module, by the module's name and the scan's inputs; it
            keeps no calls.
        modules: the model's modules by name, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        outside: set[nn.Module] | None = None,
        attention: str | None = None,
        cut: bool = False,
        rules: Rules | None = None,
        around: Callable[[], Iterable[tuple[ModuleType, dict[str, Handler]]]] = tuple,
        edits: Callable[[str, AnyInputs], CallEdit | None] | None = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.name_of = Names(model, modules)
        self.names = self.name_of.modules
        self.outside = {id(module) for module in outside or ()}
        self.attention = attention
        self.cut = cut
        self.rules = rules
        self.around = around
        self.edits = edits
        self.edited: list[tuple[Tensor, AnyInputs, list[CallEdit]]] = []  # by the states that were handed out
        self.convolved: dict[Any, tuple[Tensor, str]] = {}  # by where they lie: inputs of fused convolutions
        self.thread = get_ident()
        self.calls: list[ScanCall | SoftmaxCall] = []
        self.tensors: list[tuple[str, Tensor]] = []  # while orders are measured: what modules returned
        self.crosses: dict[str, str] = {}  # modules whose attention reads other tokens than its own, in words
        self.other_scans: list[str] = []  # doors that were called in a way that is not known
        self.suspended = False
        self._hooks: list[Any] = []
        self._runs: dict[str, int] = {}

    @property
    def scans(self) -> list[ScanCall]:
        """The calls that are scans."""
        return [call for call in self.calls if isinstance(call, ScanCall)]

    @property
    def ruled(self) -> bool:
        """Whether there are rules that are not known at doors."""
        return self.rules is not None and not self.rules.at_doors

    def place(self, running: Iterator[nn.Module]) -> nn.Module | None:
        """The innermost running module of the model, if its scans are wanted."""
        found = None
        for module in running:
            if id(module) in self.outside:
                return None
            if found is None and id(module) in self.names:
                found = module
                if not self.outside:
                    break  # a look at every frame of the stack costs more than the rest
        return found

    def require_rules(self, module: nn.Module) -> None:
        """Raise UnsupportedModelError if there are rules that are not known at doors."""
        if self.ruled:
            raise UnsupportedModelError(
                f"{type(module).__name__}: no adapter recognises this module, and at the door of its scan what this "
                "method looks at is not seen; use another method (RawAttention, AttentionRollout, MambaAttribution, "
                "MambaLRP, FrozenContribution), or write an adapter (mamba_attn.register_adapter)."
            )

    def keep(
        self,
        module: nn.Module,
        entered: Tensor,
        inputs: AnyInputs,
        states: Tensor,
        run_again: Callable[[], Tensor],
        matrix: tuple[str, Tensor] | None,
    ) -> None:
        """Record a call, or, when checkpointing repeats one inside a backward pass, pair it with its first.

        ``entered`` is what it scans, with its graph; ``inputs`` have none.
        """
        name = self.names[id(module)]
        if recomputing():
            first = self._same_call(name, inputs)
            if first is not None:
                first.again = states
            return
        if name not in self._runs:
            self._runs[name] = 0
            hook = partial(self._starts, name)  # the module is running: the hook sees its next call
            self._hooks.append(module.register_forward_pre_hook(hook, prepend=True))
        call = ScanCall(name, self._runs[name], inputs, run_again, states, matrix, len(self.tensors))
        if self.rules is not None:
            self.rules.scanned(call, name, entered)
        self.calls.append(call)

    def _starts(self, name: str, module: nn.Module, args: Any) -> None:
        if get_ident() == self.thread and not recomputing():
            self._runs[name] += 1

    def _same_call(self, name: str, inputs: AnyInputs) -> ScanCall | None:
        alike = [c for c in self.scans if c.module == name and c.inputs.u.shape == inputs.u.shape]
        if len(alike) < 2:
            return next(iter(alike), None)
        same = [c for c in alike if torch.equal(c.inputs.u, inputs.u) and torch.equal(c.inputs.delta, inputs.delta)]
        return next(iter(same), None)

    def call_of(self, states: Any) -> ScanCall | None:
        """The call that handed out these states."""
        if not isinstance(states, Tensor):
            return None
        wanted = states.data_ptr()
        for call in reversed(self.scans):
            for kept in (call.states, call.again):
                if kept is states or (kept is not None and kept.data_ptr() == wanted != 0):
                    return call
        return None

    def another_recurrence(self) -> str | None:
        """What the model scans with that is no selective scan, in a sentence; None: nothing."""
        if not self.other_scans:
            return None
        return (
            f"Its scan {self.other_scans[0]}.fwd takes other arguments than a selective scan: it is another "
            "recurrence, whose matrix is not known here."
        )

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


@contextmanager
def open_doors(watch: Watch, loaded: Loaded | None = None) -> Iterator[Watch]:
    """Let a watch see the scans of its thread; doors that nobody watches any more are put back as they were.

    A watch may be let in again, for a backward pass after the trace.

    Args:
        watch: of one trace.
        loaded: the loaded modules, where they were just looked at.
    """
    with _lock:
        scans = [(scan, _CHUNKS if CHUNK_SCANS[0] in vars(scan) else _SCAN) for scan in compiled_scans(loaded)]
        wanted = [*scans, *watch.around()]
        doors = [_patched.get((id(module), tuple(its))) or Door(module, its) for module, its in wanted]
        for door in doors:
            door.enter()
        _open.append(watch)
    try:
        yield watch
    finally:
        with _lock:
            _open.remove(watch)
            for door in doors:
                door.leave()


@contextmanager
def suspended(watch: Watch | None) -> Iterator[None]:
    """Let the other traces of this thread see nothing, while a model runs for one of ours."""
    thread = get_ident()
    others = [other for other in tuple(_open) if other is not watch and other.thread == thread]
    before = [other.suspended for other in others]
    for other in others:
        other.suspended = True
    try:
        yield
    finally:
        for other, value in zip(others, before, strict=True):
            other.suspended = value


def measuring() -> bool:
    """Whether orders are measured on this thread now, by passes in which the user's hooks run, too."""
    thread = get_ident()
    return any(watch.cut and watch.thread == thread for watch in tuple(_open))


class Door:
    """Some functions of one module while anybody watches.

    Args:
        module: the module.
        handlers: what stands in their places, by name.
    """

    def __init__(self, module: ModuleType, handlers: Mapping[str, Handler]) -> None:
        self.module = module
        self.handlers = handlers
        self.watches = 0

    def enter(self) -> None:
        """Patch the module, the first time."""
        self.watches += 1
        if self.watches == 1:
            self.own = {name: vars(self.module)[name] for name in self.handlers}
            self.ours = {name: partial(handler, self) for name, handler in self.handlers.items()}
            vars(self.module).update(self.ours)
            _patched[id(self.module), tuple(self.handlers)] = self

    def leave(self) -> None:
        """Put the module's own functions back, the last time; what somebody put around ours stays."""
        self.watches -= 1
        if self.watches == 0:
            del _patched[id(self.module), tuple(self.handlers)]
            for name, function in self.own.items():
                if vars(self.module).get(name) is self.ours[name]:
                    setattr(self.module, name, function)


def watching(frame: FrameType | None) -> list[tuple[Watch, nn.Module]]:
    """Return the traces that a call in this frame concerns, each with the innermost running module of its model."""
    again, thread = recomputing(), get_ident()
    return [
        (watch, module)
        for watch in tuple(_open)
        if (again or watch.thread == thread) and not watch.suspended
        for module in [watch.place(running_modules(frame))]
        if module is not None
    ]


def opened() -> tuple[Watch, ...]:
    """All that watch at the moment, in every thread."""
    return tuple(_open)


_lock = Lock()
_open: list[Watch] = []
_patched: dict[tuple[int, tuple[str, ...]], Door] = {}


def _forward(door: Door, *args: Any) -> Any:
    """``fwd``, seen by the traces that it concerns."""
    own: Callable[..., Any] = door.own["fwd"]
    places = watching(sys._getframe(1))
    if not places:
        return own(*args)
    for watch, module in places:
        watch.require_rules(module)
    plain = tuple(detached_plain(t) if isinstance(t, Tensor) else t for t in args)
    inputs = scan_inputs(plain)
    if inputs is None:
        for watch, _ in places:
            watch.other_scans.append(door.module.__name__)
        return own(*args)
    if inputs.u.is_cuda and torch.cuda.is_current_stream_capturing():
        raise TraceError(
            "trace(...): a scan is being captured in a CUDA graph. Trace the model's own forward: "
            "with trace(model): model(images), outside torch.cuda.graph."
        )
    folds = dict.fromkeys(watch.attention for watch, _ in places if watch.attention and not recomputing())
    matrices: dict[str | None, tuple[str, Tensor]] = {}
    run_again = partial(_first_of, own, plain)
    if folds and replaceable(inputs):
        for fold in folds:
            y, matrices[fold] = _scan_and_attention(inputs, str(fold))
        found = as_extension(door.module.__name__, args, inputs, y)
    else:
        found = list(own(*args))
    edits = _edits_of(places, inputs)
    if edits:
        y = edited_call(inputs.parts(), found[0].flatten(1, -2) if found[0].ndim > 3 else found[0], edits)
        found = as_extension(door.module.__name__, args, inputs, y.reshape(inputs.u.shape))
    if edits or matrices or any(watch.rules is not None for watch, _ in places):  # whose backward reads it
        run_again = partial(Tensor.detach, found[0])
    for watch, module in places:
        if watch.edits is None:
            watch.keep(module, args[0], inputs, found[1], run_again, matrices.get(watch.attention))
        elif edits:
            watch.edited.append((found[1], inputs, edits))
    return found


def _first_of(own: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    found: Tensor = own(*args)[0]
    return found


def _edits_of(places: Sequence[tuple[Watch, nn.Module]], inputs: AnyInputs) -> list[CallEdit]:
    """What interventions do to a call."""
    asked = [w.edits(w.names[id(module)], inputs) for w, module in places if w.edits is not None]
    return [edit for edit in asked if edit is not None]


def _edited_with(states: Any) -> tuple[AnyInputs, list[CallEdit]] | None:
    """The inputs of an edited call, and what was done to it, by what ``fwd`` handed out."""
    if not isinstance(states, Tensor):
        return None
    for watch in reversed(_open):
        for kept, inputs, edits in watch.edited:
            if kept is states or kept.data_ptr() == states.data_ptr() != 0:
                return inputs, edits
    return None


def _chunk_forward(door: Door, *args: Any, **kwargs: Any) -> Any:
    """``_mamba_chunk_scan_combined_fwd``, seen by the traces that it concerns."""
    places = watching(sys._getframe(1))
    for watch, module in places:
        watch.require_rules(module)
    inputs = forward_inputs(places[0][0].names[id(places[0][1])], args, kwargs) if places else None
    found = door.own[CHUNK_SCANS[0]](*args, **kwargs)
    if inputs is not None:
        out, entered = scanned(found), inputs.u
        folds = [watch.attention for watch, _ in places if watch.attention is not None and not recomputing()]
        matrices: dict[str | None, tuple[str, Tensor]] = {
            fold: (fold, _matrix_of_chunks(inputs, fold)) for fold in dict.fromkeys(folds)
        }
        inputs = type(inputs)._make(detached_plain(t) if isinstance(t, Tensor) else t for t in inputs)
        edits = _edits_of(places, inputs)
        if edits:
            y = edited_call(inputs.parts(), out.flatten(2).mT, edits).mT.unflatten(2, out.shape[2:]).to(out.dtype)
            found, out = with_output(found, y, inputs.z), y
        for watch, module in places:
            if watch.edits is None:
                again = partial(Tensor.detach, out.flatten(2).mT)
                watch.keep(module, entered, inputs, out, again, matrices.get(watch.attention))
            elif edits:
                watch.edited.append((out, inputs, edits))
    return found


def _chunk_backward(door: Door, *args: Any, **kwargs: Any) -> Any:
    """``_mamba_chunk_scan_combined_bwd``, whose ``dout`` is kept for the call that its output comes from."""
    own: Callable[..., Any] = door.own[CHUNK_SCANS[1]]
    given = backward_arguments(args, kwargs)
    if _edited_with(given["out"]) is not None:
        raise UnsupportedModelError(
            "knockout and replace_attention: gradients through a chunk scan (Mamba-2) under them are not known here; "
            "run the model inside torch.no_grad()."
        )
    hits = _arrived(given["out"], given["dout"].flatten(2).mT)
    if any(watch.cut for watch, _ in hits):
        found = zeros(given, own(**given) if given.get("recompute_output") else None)
        for _, call in hits:
            if call.sent is not None:
                found[0].copy_(call.sent.mT.unflatten(2, found[0].shape[2:]))
        return found
    rules = [watch.rules for watch, _ in hits if watch.rules is not None and not watch.rules.observes]
    return ruled_chunk_backward(own, given, rules[-1]) if rules else own(*args, **kwargs)


def _arrived(states: Any, dout: Tensor) -> list[tuple[Watch, ScanCall]]:
    """The calls that a gradient arrives at, which keep it, each with who watches."""
    hits = [(watch, call) for watch in tuple(_open) if (call := watch.call_of(states)) is not None]
    for watch, call in hits:
        call.dout = detached_plain(dout)
        if watch.cut:
            call.node = torch._C._current_autograd_node()
    return hits


def _backward(door: Door, *args: Any) -> Any:
    """``bwd``, whose ``dout`` is kept for the call that its states come from."""
    own: Callable[..., Any] = door.own["bwd"]
    gated = first_flag(args) == 12
    at = 8 if gated else 7
    states = args[at + 1]
    hits = _arrived(states, args[at])
    if any(watch.cut for watch, _ in hits):
        return zeros_of(args, gated)
    if isinstance(states, ScanStates) and not isinstance(own, FunctionType | partial):
        args = (*args[: at + 1], states.read().contiguous(), *args[at + 2 :])
    ruled = [(w.rules, call) for w, call in hits if w.rules is not None and not w.rules.observes]
    edited = _edited_with(states)
    if edited is not None and ruled:
        raise UnsupportedModelError(
            "knockout and replace_attention: this method's rules are not known at the door of a scan that is changed; "
            "use a method without rules (RawAttention, AttentionRollout, MambaAttribution)."
        )
    if edited is not None:
        return edited_backward(args, *edited, gated=gated)
    if ruled:
        rules, call = ruled[-1]  # of nested traces the last
        return ruled_backward(own, args, call.y, rules, gated=gated)
    return own(*args)


_SCAN: dict[str, Handler] = {"fwd": _forward, "bwd": _backward}
_CHUNKS: dict[str, Handler] = dict(zip(CHUNK_SCANS, (_chunk_forward, _chunk_backward), strict=True))


@torch.no_grad()
def _matrix_of_chunks(inputs: ChunkInputs, fold: str) -> Tensor:
    """The matrix of every group of heads, in scan order; the extension's own output stays what it is."""
    record = ScanRecord.from_scan(*inputs.parts()[:5])
    groups = (record.select_routes(slice(g, g + 1)) for g in range(record.routes))
    return torch.stack([ops.hidden_attention(group, fold=fold) for group in groups], dim=1)


@torch.no_grad()
def _scan_and_attention(inputs: ScanInputs, fold: str) -> tuple[Tensor, tuple[str, Tensor]]:
    y, matrix = ops.selective_scan(*inputs.parts()[:6], attention=fold)  # in one launch
    return y.reshape(inputs.u.shape), (fold, matrix)
