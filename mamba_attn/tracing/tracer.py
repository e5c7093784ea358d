"""trace(model): what is traced. With ``patching`` and ``module_rules``, the only place that touches a user's model.

Everything installed is owned by one ExitStack and by one entry of the context manager: nothing is left on the model
after normal exit, an exception, a failure half way through, nesting, or another thread's use of the same model.
"""

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from numbers import Integral
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from mamba_attn import ops
from mamba_attn.core import notebook
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import KINDS, Rules
from mamba_attn.errors import TraceError, UnknownLayerError, nearest
from mamba_attn.tracing.adapters import Adapter, AnyAdapter, Seen, nothing_found, require_supported
from mamba_attn.tracing.agreement import Verdict
from mamba_attn.tracing.around_scans import AroundScans, convolution_doors
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders, DoorLayer, DoorScans, given_layout
from mamba_attn.tracing.doors import Watch, open_doors
from mamba_attn.tracing.fused_doors import fused_doors
from mamba_attn.tracing.layer_names import ByLayer, LayerName, LayerNames, layer_name, layer_names
from mamba_attn.tracing.layers import AnyLayer, Layer, ScanLayer
from mamba_attn.tracing.module_rules import Asked, install_rules
from mamba_attn.tracing.patching import Interest, observed, patched
from mamba_attn.tracing.presence import copied_untraced, require_numbers
from mamba_attn.tracing.reachable import loaded_modules
from mamba_attn.tracing.selective_scans import ScanCall
from mamba_attn.tracing.softmax_doors import CROSS, NESTED, open_softmax_doors
from mamba_attn.tracing.softmax_layers import AttentionLayer, DoorAttention
from mamba_attn.tracing.standing import Ahead
from mamba_attn.tracing.traceable import find_traceable
from mamba_attn.tracing.undisturbed import recomputing
from mamba_attn.tracing.unseen import MIXES, Unseen, unseen_sentence

_MODES = ("route", "observe")
_GRADIENTS = ("y", "output")
_SHOWN = 12  # layers in a notebook


class Trace(Mapping[str, Layer]):
    """The layers of one forward pass, by name, in execution order; ``trace[0]`` and ``trace[-1]`` count them.

    ``scans`` and ``softmax`` are those of one kind, with what only that kind has.

    Example:
        >>> with trace(model, layers=[0, -1]) as record, torch.no_grad():
        ...     logits = model(images[:1])
        >>> [layer.name for layer in record.layers]
        ['layers.0.mixer', 'layers.6.mixer']
        >>> record[-1].row(98).shape
        torch.Size([1, 197])
    """

    def __init__(
        self,
        names: Sequence[str],
        doors: DoorScans | None = None,
        wanted: LayerNames | None = None,
        around: Unseen | None = None,
        model: nn.Module | None = None,
        layout: AnyLayout | None = None,
    ) -> None:
        self.model = model
        self._layout = layout
        self._adapted = list(names)
        self._doors = doors
        self._wanted = wanted
        self._around = around
        self._stored: dict[str, tuple[int, Layer]] = {}
        self._repeated: set[str] = set()
        self._ahead: Ahead | None = None
        self._apart: dict[str, Verdict] = {}  # of mixers that their adapter does not compute, and that doors show
        self._thread = get_ident()
        self._runs = 0  # of the model itself; parts of it may be called alone
        self._call: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None
        self._part: frozenset[str] | None = None
        self.asked: Asked | None = None  # what rules that want everything need of the pass

    @property
    def _layers(self) -> dict[str, Layer]:
        """By name, in execution order; of a part, those in it."""
        layers = self._seen_layers()
        return layers if self._part is None else {name: layers[name] for name in layers if name in self._part}

    def _seen_layers(self) -> dict[str, Layer]:
        """Those of adapters, and those that were seen at doors."""
        if self._doors is None:
            return {name: layer for name, (_, layer) in self._stored.items()}
        if not self._doors.watch.calls and not self._stored:
            self._require_seen()
            return {}
        # a layer that an adapter stored when k scans had come through doors ran before scan k
        found = [(at, 0, layer) for at, layer in self._stored.values()]
        found += [(at, 1, layer) for at, layer in self._doors.layers()]
        layers = {layer.name: layer for _, _, layer in sorted(found, key=lambda each: each[:2])}
        if self._wanted is None:
            return layers
        return {name: layers[name] for name in layer_names("trace(layers=...)", self._wanted, list(layers))}

    @property
    def _names(self) -> list[str]:
        elsewhere = {*self._apart, *(self._ahead.at_doors if self._ahead else ())}
        adapted = [name for name in self._adapted if name not in elsewhere]
        return list(dict.fromkeys([*adapted, *self._layers]))

    def __getitem__(self, name: LayerName) -> Layer:
        if not isinstance(name, str):
            self._require_run()
            name = layer_name(f"trace[{name!r}]", name, list(self._layers))
        if name not in self._names:
            raise UnknownLayerError(f"no traced layer is called {name!r}. {nearest(name, self._names)}")
        if name not in self._layers:
            raise TraceError(f"{name} has not run: call the model inside the with-block first, then read the trace.")
        if name in self._repeated or self._runs > 1:
            raise TraceError(f"{name} ran twice inside one trace(): use one trace per forward pass.")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __contains__(self, name: object) -> bool:
        if isinstance(name, Integral) and not isinstance(name, bool):
            return -len(self) <= int(name) < len(self)
        return name in self._layers

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        unseen = "".join(f"\n  {name}: {what}, not traced" for name, what in self.unseen.items())
        return f"Trace({', '.join(self._adapted)}{', scans at doors' if self._doors else ''}){unseen}"

    def _repr_html_(self) -> str:
        """In a notebook: every layer, one below the other."""
        if not self._layers:
            return notebook.card("Trace", {}, "No layer has run yet: call the model inside the with-block.")
        shown = list(self._layers)[:_SHOWN]
        more = len(self._layers) - len(shown)
        names = f"<div>and {more} more: {notebook.safe(', '.join(list(self._layers)[_SHOWN:]))}</div>" if more else ""
        body = "".join(f"<div>{_of(self, name)}</div>" for name in shown)
        return f"<div>{body}{names}</div>"

    @property
    def names(self) -> list[str]:
        """Names of the layers that are traced, in the model's order, whether they ran or not."""
        return self._names

    @property
    def layers(self) -> list[Layer]:
        """The layers in execution order."""
        return [self[name] for name in self]

    @property
    def output(self) -> Any:
        """What the model returned, with its graph.

        Raises:
            TraceError: the model has not run, or only parts of it did.
        """
        return self._ran()[2]

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model was called with, (args, kwargs).

        Raises:
            TraceError: the model has not run, or only parts of it did.
        """
        args, kwargs, _ = self._ran()
        return args, kwargs

    def part(self, names: Collection[str]) -> "Trace":
        """Return the same pass with only some of its layers.

        Args:
            names: of those.
        """
        found = copy.copy(self)
        found._part = frozenset(names)
        return found

    @property
    def scans(self) -> ByLayer[ScanLayer]:
        """The layers of selective scans, by name or number.

        Raises:
            TraceError: no layer has run yet.
        """
        return self._of_kind(ScanLayer)

    @property
    def softmax(self) -> ByLayer[AttentionLayer]:
        """The layers of softmax attention, by name or number.

        Raises:
            TraceError: no layer has run yet.
        """
        return self._of_kind(AttentionLayer)

    @property
    def scan_calls(self) -> list[ScanCall]:
        """The calls of scans that were seen at doors, in order."""
        return [] if self._doors is None else self._doors.watch.scans

    @property
    def unseen(self) -> dict[str, str]:
        """What mixes tokens in blocks like those of the traced mixers and was not traced: what it does, by its name.

        Attention that nobody knows, convolutions, and stages without a traced mixer. Found by moving one token of what
        a module was called with, and looking which others move; empty before the model runs.
        """
        # not self._layers: of scans at doors it measures the order
        at_doors = [] if self._doors is None else [call.module for call in self._doors.watch.calls]
        if self._around is None or not (self._stored or at_doors):
            return {}
        crosses = {} if self._doors is None else self._doors.watch.crosses
        return self._around.found(at_doors) | crosses

    @property
    def unseen_mixers(self) -> list[str]:
        """Names of what mixes tokens like a layer and was not traced; a product of layers leaves it out."""
        return [name for name, what in self.unseen.items() if what in (MIXES, CROSS, NESTED)]

    def gradients(self, scalar: Tensor, of: str = "y") -> ByLayer[Tensor]:
        """Return the gradient of a scalar with respect to every layer's ``variable``, or ``output``.

        By the layers' names or numbers, as the trace. The graph is kept, so several targets can be asked for. Nothing
        accumulates in ``.grad``.

        Args:
            scalar: computed from this forward pass, e.g. ``logits[:, 7].sum()``.
            of: "y", the layers' ``variable``: y (batch, channels, tokens) of scans, the probabilities (batch, heads,
                tokens, tokens) of attention; or "output", what the mixer returned, in the mixer's own shape.

        Raises:
            TraceError: the forward pass ran without gradients, or the scalar does not depend on it; dropout was active
                in mode "observe"; a mixer that returned no tensor.
            ValueError: another ``of``.
        """
        if of not in _GRADIENTS:
            raise ValueError(f"gradients(of={of!r}): expected one of {_GRADIENTS}.")
        at_doors = [layer for layer in self.layers if isinstance(layer, DoorLayer)]
        softmax = [layer for layer in self.layers if isinstance(layer, DoorAttention)]
        layers = [layer for layer in self.layers if not isinstance(layer, DoorLayer | DoorAttention)]
        edges = [edge for layer in softmax for edge in layer.call.edges if edge is not None]
        if softmax and of == "output":
            softmax[0].require_output()
        if at_doors and of == "output":
            at_doors[0].require_output()
        direct = [layer.variable if of == "y" and layer.tail is None else layer.output for layer in layers]
        attached = [tensor for tensor in direct if tensor.requires_grad]
        leaves = self._doors.differentiable() if at_doors and self._doors is not None else []
        lost = len(attached) < len(layers) or not all(any(layer.call.edges) for layer in softmax)
        if lost or not scalar.requires_grad or (at_doors and not leaves):
            raise TraceError(
                "gradients(): the forward pass ran without gradients; call the model outside no_grad(), where it "
                "checkpoints activations, with use_reentrant=False, and where all of its parameters are frozen, on "
                "images.requires_grad_()."
            )
        ends: list[Any] = [*edges, *attached, *leaves]
        try:
            with open_doors(self._doors.watch) if self._doors is not None and at_doors else nullcontext():
                found = torch.autograd.grad(scalar, ends, retain_graph=True, allow_unused=True)
        except CheckpointError as error:
            raise TraceError(
                "gradients(): the model checkpoints activations, so its forward runs again now, and no longer traced; "
                "call gradients() inside the with-block."
            ) from error
        if all(gradient is None for gradient in found):
            raise TraceError("gradients(): the scalar does not depend on this forward pass; take it from its output.")
        result: ByLayer[Tensor] = ByLayer()
        at_edges = iter(found[: len(edges)])
        for its in softmax:
            result[its.name] = its.placed_gradient([None if e is None else next(at_edges) for e in its.call.edges])
        for layer, tensor, gradient in zip(layers, attached, found[len(edges) :], strict=False):
            filled = torch.zeros_like(tensor) if gradient is None else gradient
            result[layer.name] = filled if of == "output" or layer.tail is None else _through_tail(layer, filled)
        for scans in at_doors:
            result[scans.name] = scans.take_gradient()
        return ByLayer({layer.name: result[layer.name] for layer in self.layers})

    def _of_kind(self, kind: type[AnyLayer]) -> ByLayer[AnyLayer]:
        self._require_run()
        return ByLayer({layer.name: layer for layer in self.layers if isinstance(layer, kind)})

    def _require_seen(self) -> None:
        """Raise UnsupportedModelError when the model ran, and what was to be seen at doors was not."""
        if self._doors is None or not self._doors.finished:
            return
        self._doors.require_seen()
        if not self._stored and not self._doors.watch.calls:
            raise nothing_found(self._doors.model)

    def _require_run(self) -> None:
        if not self._layers:
            raise TraceError("no layer has run yet: call the model inside the with-block first, then read the trace.")

    def _starts(self, *_: Any) -> None:
        """Count the model's own runs, which tell a second forward pass from a mixer that one pass calls twice."""
        require_numbers()
        measuring = self._doors is not None and self._doors.watch.suspended
        self._runs += get_ident() == self._thread and not recomputing() and not measuring

    def _ends(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep what went in and what came out."""
        measuring = self._doors is not None and self._doors.watch.suspended
        if get_ident() == self._thread and not recomputing() and not measuring:
            self._call = (args, kwargs, output)

    def _ran(self) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        if self._call is None:
            raise TraceError("the model has not run: call it inside the with-block first, then read the trace.")
        if self._runs > 1:
            raise TraceError("the model ran twice inside one trace(): use one trace per forward pass.")
        return self._call

    def _store(self, layer: Layer) -> None:
        watch = None if self._doors is None else self._doors.watch
        if watch is not None and watch.suspended:
            return  # the model runs for us, to measure
        if layer.name in self._stored and self._runs == 1:  # one forward calls the mixer again: another layer
            name, number = layer.name, 2
            while layer.name in self._stored:
                layer.name, number = f"{name}#{number}", number + 1
        elif layer.name in self._stored:
            self._repeated.add(layer.name)
        layer.lay_out(given_layout(self._layout, layer.name, layer.tokens))
        if self._ahead is not None and isinstance(layer, ScanLayer) and not layer.has_layout:
            layer.lay_out(self._ahead.layout_of(layer.name.partition("#")[0], layer.batch, layer.tokens))
        self._stored[layer.name] = (0 if watch is None else len(watch.calls), layer)


def _of(layers: Trace, name: str) -> str:
    try:
        return layers[name]._repr_html_()
    except TraceError as error:
        return notebook.card(name, {}, notebook.safe(error))


@contextmanager
def trace(
    model: nn.Module,
    *,
    layers: LayerNames | None = None,
    mode: str = "route",
    attention: str | None = None,
    layout: AnyLayout | None = None,
    orders: AnyOrders | None = None,
    rules: Rules | None = None,
    adapters: Iterable[AnyAdapter] | None = None,
) -> Iterator[Trace]:
    """Record the selective scans, and the softmax attention, of the next forward pass of a model.

    Args:
        model: a model with mixers of a known family, or whose scans and attention go through a door (compiled scans,
            torch's attention), as it is; it is neither switched to eval nor changed. Inside
            DistributedDataParallel, and DataParallel on one device, names are those of the wrapped model.
        layers: names, patterns (``"layers.1?.mixer"``) or numbers of mixers, or one of them; numbers count the
            model's mixers in the order of its modules, negative ones from the last. Default: all.
        mode: "route" runs the mixers' equations through ``mamba_attn.ops``, and softmax attention through its explicit
            probabilities, submodules called as modules; "observe" leaves the model's own forward untouched and
            recomputes the record from each mixer's input.
        attention: a fold whose matrix is computed during the pass; None computes matrices when asked.
        layout: the token frame, where it cannot be read from the model: one, or by patterns of layers' names, or a
            function of a layer's name and number of tokens.
        orders: the token of every step, (routes, length) or (batch, routes, length), of scans whose order cannot be
            measured: one, or by patterns of names, or a function of a layer's name, number of routes and length.
        rules: what an attribution method changes in the forward (mode "route"): in the mixers, and where the rules
            ask for it in the norms, activations and linear layers of the whole model.
        adapters: asked before the known ones.

    Yields:
        A Trace: a mapping from names to layers, filled by the forward pass. Records keep the autograd graph when the
        pass ran with gradients.

    Raises:
        UnsupportedModelError: nothing to trace, a variant that is refused, a compiled model, copies on several devices.
        UnknownLayerError: a name or pattern that fits no mixer, a number that is out of range.
        TypeError: ``layers`` that are neither names nor numbers.
        ValueError: an unknown mode or fold, rules in mode "observe".

    Example:
        >>> with trace(model) as record:
        ...     logits = model(images)
        >>> record["layers.6.mixer"].attention().shape
        torch.Size([2, 197, 197])
    """
    if mode not in _MODES:
        raise ValueError(f"trace(mode={mode!r}): expected one of {_MODES}.")
    if attention is not None and attention not in ops.FOLDS:
        raise ValueError(f"trace(attention={attention!r}): expected one of {ops.FOLDS}.")
    if rules is not None and mode == "observe":
        raise ValueError("trace(rules=..., mode='observe'): rules change the forward; use mode='route'.")
    there = find_traceable(model, adapters)
    model, found, known, unnamed = there.model, there.mixers, there.known, there.unnamed
    # at doors nobody knows the layers' names before they run
    chosen = list(known) if layers is None or unnamed else layer_names("trace(layers=...)", layers, list(known))
    mixers = {name: known[name] for name in chosen}
    for name, (module, adapter) in mixers.items():
        require_supported(name, module, adapter, model)
    seen = Seen(layout=layout if isinstance(layout, TokenLayout) else None)
    doors = None
    if there.at_doors:
        watch = Watch(model, there.adapted, attention, rules=rules, modules=there.modules)
        if rules is not None and (rules.observes or rules.wants >= frozenset(KINDS)):
            watch.around = convolution_doors if rules.observes else fused_doors
        doors = DoorScans(model, watch, seen, layout, orders, refused=there.refused)
    around = Unseen(model, list(known), there.modules)
    record = Trace(list(mixers), doors, layers if unnamed else None, around, model, layout)
    with ExitStack() as stack:
        stack.enter_context(copied_untraced(model))
        there.learn_layout(stack, seen)
        quiet = bool if doors is None else lambda: doors.watch.suspended
        record.asked = install_rules(stack, model, mixers, rules, quiet)
        for name, (module, adapter) in mixers.items():
            at = None if doors is None else doors.watch
            interest = Interest(name, seen, adapter, record._store, attention, rules, record._apart.__setitem__, at)
            stack.enter_context(patched(module, interest) if mode == "route" else observed(module, interest))
        stack.callback(model.register_forward_pre_hook(record._starts, prepend=True).remove)
        stack.callback(model.register_forward_hook(record._ends, with_kwargs=True).remove)
        if doors is not None:
            doors.install(stack)
            loaded = loaded_modules(there.loaded)
            stack.enter_context(open_doors(doors.watch, loaded))
            stack.enter_context(open_softmax_doors(loaded))
            if rules is not None and rules.observes:
                stack.enter_context(AroundScans(rules, quiet))
        inside = {name: module for name, (module, _) in mixers.items() if name}  # nothing stands around a mixer alone
        if rules is None and any(isinstance(mixers[name][1], Adapter) for name in inside):
            record._ahead = Ahead(model, inside, seen, None if doors is None else doors.watch)
            record._ahead.install(stack)
        around.install(stack, quiet)
        yield record
    record._require_seen()
    if record._apart:
        warnings.warn(_apart_sentence(found, record._apart), UserWarning, stacklevel=3)
    sentence = None if record._ahead is None else record._ahead.sentence()
    if sentence is not None:
        warnings.warn(sentence, UserWarning, stacklevel=3)
    # with rules, the method that brought them looks: looking calls modules, on which another trace may have its rules
    if layers is None and rules is None and record.unseen_mixers:
        warnings.warn(unseen_sentence("trace", record.unseen_mixers), UserWarning, stacklevel=3)


def _apart_sentence(found: Mapping[str, tuple[nn.Module, AnyAdapter]], apart: Mapping[str, Verdict]) -> str:
    """What to say of mixers whose adapters compute something else."""
    name = max(apart, key=lambda name: (apart[name].adapter is not None, apart[name].number))
    module, adapter = found[name]
    more = f", and {len(apart) - 1} more like it" if len(apart) > 1 else ""
    sentence = apart[name].sentence(name, module, adapter.family).rstrip(".")
    return f"trace: {sentence}{more}. What enters a compiled scan or torch's attention is taken there instead."


def _through_tail(layer: Layer, gradient: Tensor) -> Tensor:
    """The gradient with respect to the layer's variable, from the one at the mixer's output."""
    if layer.tail is None:
        raise TraceError(f"{layer.name}: no recomputed tail.")
    with torch.enable_grad():
        variable = layer.variable.detach().requires_grad_()
        (result,) = torch.autograd.grad(layer.tail(variable), variable, gradient)
    return result
