"""Running a model with entries of its matrices removed, or with other matrices, for the length of a block."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.tracing.adapters import AnyAdapter, Seen, require_supported
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.doors import Watch, open_doors, suspended
from mamba_attn.tracing.edits import CallEdit, Edit, Knockout, Positions, Replacement, Within
from mamba_attn.tracing.layer_names import LayerNames, layer_names, listed_layers
from mamba_attn.tracing.patching import Interest, patched
from mamba_attn.tracing.replay import Replay
from mamba_attn.tracing.selective_scans import AnyInputs
from mamba_attn.tracing.softmax_layers import DoorAttention
from mamba_attn.tracing.traceable import find_traceable
from mamba_attn.tracing.tracer import trace
from mamba_attn.tracing.undisturbed import recomputing, settings, undisturbed, versions


@contextmanager
def knockout(
    model: nn.Module,
    *,
    layers: LayerNames | None = None,
    rows: Positions = None,
    columns: Positions = None,
    routes: Positions = None,
    channels: Positions = None,
    beyond: int | None = None,
) -> Iterator[None]:
    """Run a model without some entries of its attention matrices: y[rows] - M[rows, columns] u[columns], exactly.

    What is left out of ``rows``, ``columns``, ``routes`` and ``channels`` stands for all of them; D u always stays.
    Blocks may be nested: entries that several of them name are removed once. One more scan a layer removes any number
    of columns. Of softmax attention the probabilities become zero, and are not normalised again.

    A trace that is open at the same time shows the model as it is and the pass as it was: ``attention()``, rows and
    columns are those of the whole matrix; ``layer.y``, ``layer.output`` and ``trace.output`` those without the entries.

    Args:
        model: as for ``trace``; images or text.
        layers: names, patterns or numbers of layers, as ``trace`` has them. Default: all. A mixer that an adapter
            knows is changed in each of its runs.
        rows: tokens that lose what they read, in the token frame: numbers, negative ones from the end, or a mask of
            bool (tokens) or (batch, tokens).
        columns: tokens that are not read; as ``rows``.
        routes: numbers of routes.
        channels: numbers of channels; of softmax attention, of heads.
        beyond: removes what is more than so many steps back in each route's own order, instead of the entries above;
            blocks of both kinds may be nested. 0 leaves each step its own input.

    Raises:
        UnsupportedModelError: as ``trace``; attention that is seen at torch's own function, where no entry can be
            removed: name other layers; ``beyond`` of softmax attention, which has no steps.
        UnknownLayerError: a name or pattern that fits no layer, a number that is out of range.
        TypeError: layers or positions that are no numbers.
        ValueError: positions that a layer does not have, when it runs; ``beyond`` below 0, with other entries in the
            same call, or of a layer whose matrix is replaced.

    Example:
        >>> with knockout(model, layers=5, columns=range(40, 50)), torch.no_grad():
        ...     logits = model(images[:1])
    """
    entries = (rows, columns, routes, channels)
    edit: Edit = Knockout.of(*entries) if beyond is None else Within.of(beyond, entries)
    with _edited("knockout", model, layers, edit):
        yield


@contextmanager
def replace_attention(
    model: nn.Module, *, matrix: Tensor | Mapping[str, Tensor], layers: LayerNames | None = None
) -> Iterator[None]:
    """Run a model with other attention matrices: y = sum over routes of matrix @ u, + D u.

    A trace's ``layer.attention("each", routes="each")`` is the layer's own, (batch, routes, channels, tokens, tokens);
    its mean over the batch is the matrix of no image. Where blocks are nested, the innermost matrix counts, and
    ``knockout`` removes entries of it. What a trace shows meanwhile: see ``knockout``.

    Args:
        model: as for ``trace``.
        matrix: in the token frame, its rows what tokens read; broadcasts over (batch, routes, channels, tokens,
            tokens). One for all layers, or by names or patterns of layers. For softmax attention channels are heads.
        layers: as in ``knockout``. Default: those that ``matrix`` names, or all.

    Raises:
        UnsupportedModelError: as ``knockout``.
        UnknownLayerError: as ``knockout``.
        TypeError: a matrix that is no floating-point tensor.
        ValueError: a matrix that does not fit a layer, when it runs.

    Example:
        >>> with replace_attention(model, layers=5, matrix=torch.eye(197)), torch.no_grad():
        ...     logits = model(images[:1])
    """
    named = list(matrix) if isinstance(matrix, Mapping) and layers is None else layers
    with _edited("replace_attention", model, named, Replacement.of(matrix)):
        yield


class _Block:
    """One block: what it changes, and where.

    Args:
        call: its name, for messages.
        model: the model.
        edit: what it does to a layer.
        layers: as asked for.
        names: of the layers; None: not known before the model runs.
        known: mixers that adapters compute, by name.
    """

    def __init__(
        self,
        call: str,
        model: nn.Module,
        edit: Edit,
        layers: LayerNames | None,
        names: set[str] | None,
        known: Mapping[str, tuple[nn.Module, AnyAdapter]],
    ) -> None:
        self.call = call
        self.model = model
        self.edit = edit
        self.layers = layers
        self.names = names
        self.known = known
        self.watch: Watch | None = None
        self._plan = _Plan()
        self._plans: dict[Any, _Plan] = {}
        self._ran: dict[str, int] = {}
        self._thread = get_ident()

    def of_mixer(self, name: str) -> list[Edit]:
        """What is done to a mixer that an adapter computes.

        Raises:
            TraceError: which layers are meant is not known yet.
        """
        if self.edit.empty or (self.watch is not None and self.watch.suspended):
            return []
        if self.names is None:
            raise TraceError(f"{self.call}(...): call the model itself inside the block, not a part of it.")
        return [self.edit] if name in self.names else []

    def of_scan(self, module: str, inputs: AnyInputs) -> CallEdit | None:
        """What is done to the next call of a scan at a door.

        Args:
            module: name of the module that runs.
            inputs: of the call.

        Raises:
            TraceError: the model runs another way than when its scans were looked at.
            UnsupportedModelError: the call is repeated inside a backward pass.
        """
        if self.edit.empty:
            return None
        if recomputing():
            raise UnsupportedModelError(
                f"{self.call}(...): {module} repeats its scan inside a backward pass (gradient checkpointing), and "
                "which of its scans that is is not known here; switch checkpointing off."
            )
        number = self._ran[module] = self._ran.get(module, -1) + 1
        known = self._plan.calls.get(module, [])
        if number >= len(known) or known[number][0] != _signature(inputs):
            raise TraceError(
                f"{self.call}(...): {module} scans in another way than when the orders of its tokens were measured; "
                "call the model itself inside the block, not a part of it."
            )
        return known[number][1]

    def starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the scans of a model that is about to run, as a trace sees them."""
        if self.watch is None or self.watch.suspended or get_ident() != self._thread or recomputing():
            return
        self._ran.clear()
        self.watch.edited.clear()
        if self.edit.empty:
            return
        replay = Replay.of(args, kwargs)
        key = (replay.key, settings(self.model), versions(self.model))
        self._plan = self._plans.get(key) or self._looked(replay)
        if self._plan.lasts:
            self._plans[key] = self._plan
        self.names = self._plan.names
        for name, (mixer, _) in self.known.items():  # some get their tokens in another order than their adapter knows
            if any(not name or f"{door}.".startswith(f"{name}.") for door in self._plan.at_doors):
                self.watch.outside.discard(id(mixer))

    def _looked(self, replay: Replay) -> "_Plan":
        """Run the model once for the orders of its scans' tokens; nothing is changed in this pass."""
        plan = _Plan()
        with ExitStack() as stack:
            for block in (suspended(None), undisturbed(self.model, traced=True)):
                stack.enter_context(block)
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # the user's own pass gives them
            with trace(self.model, layers="*") as seen:  # named, so that nobody looks for what is not traced
                for device, dtype in replay.autocast:
                    stack.enter_context(torch.autocast(device, dtype=dtype))
                self.model(*replay.args, **replay.kwargs)
            names = list(seen)
            plan.names.update(
                names if self.layers is None else layer_names(f"{self.call}(layers=...)", self.layers, names)
            )
            done: dict[int, CallEdit] = {}
            for layer in seen.layers:
                if isinstance(layer, DoorLayer):
                    plan.at_doors.add(layer.calls[0].module)
                if layer.name not in plan.names:
                    continue
                if isinstance(layer, DoorAttention):
                    raise UnsupportedModelError(
                        f"{self.call}(...): {layer.name} is softmax attention that is seen at torch's own function, "
                        "where no entry can be taken out; name other layers with layers=."
                    )
                if isinstance(layer, DoorLayer):
                    done.update(zip(map(id, layer.calls), layer.edits(self.edit), strict=True))
                    plan.lasts &= layer.scan.read_order.ndim == 2
            for call in seen.scan_calls:
                plan.calls.setdefault(call.module, []).append((_signature(call.inputs), done.get(id(call))))
        return plan


def _signature(inputs: AnyInputs) -> tuple[Any, ...]:
    return (tuple(inputs.u.shape), inputs.groups)


@dataclass
class _Plan:
    """What one way of calling a model needs at its doors.

    Args:
        names: of the layers that are changed.
        calls: by module, in order: what says that it is the same call, and what is done to it.
        at_doors: names of modules whose scans are seen there.
        lasts: whether the next images have the same orders.
    """

    names: set[str] = field(default_factory=set)
    calls: dict[str, list[tuple[tuple[Any, ...], CallEdit | None]]] = field(default_factory=dict)
    at_doors: set[str] = field(default_factory=set)
    lasts: bool = True


@contextmanager
def _edited(call: str, model: nn.Module, layers: LayerNames | None, edit: Edit) -> Iterator[None]:
    found = find_traceable(model)
    model, known = found.model, found.known
    names = None
    if not found.at_doors:
        names = set(known if layers is None else layer_names(f"{call}(layers=...)", layers, list(known)))
    block = _Block(call, model, edit, listed_layers(f"{call}(layers=...)", layers), names, known)
    seen = Seen()
    with ExitStack() as stack:
        found.learn_layout(stack, seen)
        if found.at_doors:
            block.watch = Watch(model, found.adapted, edits=block.of_scan)
            stack.callback(model.register_forward_pre_hook(block.starts, with_kwargs=True, prepend=True).remove)
            stack.enter_context(open_doors(block.watch))
        for name, (module, adapter) in known.items():
            if names is None or name in names:
                require_supported(name, module, adapter, model)
                interest = Interest(name, seen, adapter, watch=block.watch, edits=block.of_mixer)
                stack.enter_context(patched(module, interest))
        yield
