"""Layers made of what a trace saw at the doors, put in the token frame when that is first asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.tracing.adapters import Seen
from mamba_attn.tracing.doors import Watch
from mamba_attn.tracing.edits import CallEdit, Edit, Knockout, Within, in_scan_order
from mamba_attn.tracing.frames import Place
from mamba_attn.tracing.layer_names import by_pattern
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.nearest_layout import nearest_layout
from mamba_attn.tracing.placed import Placed, place, same_route
from mamba_attn.tracing.replay import Replay
from mamba_attn.tracing.running import modules_of
from mamba_attn.tracing.selective_scans import ScanCall
from mamba_attn.tracing.softmax_calls import SoftmaxCall
from mamba_attn.tracing.softmax_layers import DoorAttention, PlacedAttention, place_attention
from mamba_attn.tracing.standing import standing
from mamba_attn.tracing.steps import Found, Steps, steps_of
from mamba_attn.tracing.undisturbed import recomputing

AnyLayout = TokenLayout | Mapping[str, TokenLayout] | Callable[[str, int], TokenLayout | None]
AnyOrders = Tensor | Mapping[str, Tensor] | Callable[[str, int, int], Tensor | None]


def given_layout(layout: AnyLayout | None, name: str, tokens: int) -> TokenLayout | None:
    """Return the token frame that a user gave for a layer, if one fits it.

    Args:
        layout: one for all layers, by patterns of names, or a function of name and number of tokens.
        name: of the layer.
        tokens: that it has.
    """
    given = by_pattern(layout, name) if isinstance(layout, Mapping) else layout
    if callable(given):
        given = given(name, tokens)
    return given if given is not None and given.tokens == tokens else None


class DoorLayer(ScanLayer):
    """The scans of one run of a module, seen at their doors: exact whatever code stands around them.

    The order of the tokens is measured when something in the token frame is first asked for; ``scan_frame`` is there
    without it.

    Args:
        name: the module's name in the model, with a number from the second time that it ran.
        calls: its scans.
        placed: gives the record in the token frame of these calls.
    """

    def __init__(self, name: str, calls: Sequence[ScanCall], placed: "Callable[[DoorLayer], Placed]") -> None:
        self.name = name
        self.tail = None
        self.calls = list(calls)
        self._place = placed
        self._output = None
        self._ready = {}

    @cached_property
    def _placed(self) -> "Placed":
        return self._place(self)

    @property
    def scan(self) -> ScanRecord:
        """Everything that the scans depended on, in the token frame.

        Raises:
            TraceError: the order of the tokens cannot be measured; what was seen, and what to pass.
        """
        return self._placed.record

    @property
    def share(self) -> float:
        """Part of a step's gradient that came from its own token when the order was measured; 1 when it was given."""
        return self._placed.share

    @property
    def padding(self) -> int:
        """Number of its last tokens that stand for padding, which the scan takes in."""
        return self._placed.padding

    @property
    def grouped(self) -> bool:
        """Whether the groups of a scan are groups of channels of one route, and not routes."""
        return self._placed.grouped

    def rows_of(self, number: int) -> int:
        """Number of sequences of one image in a scan, each of which is a route.

        Args:
            number: of the scan among ``calls``.
        """
        return self._placed.index[number].shape[1]

    def by_image(self, parts: Sequence[Tensor]) -> Float[Tensor, "batch routes channels length"]:
        """Values of all scans by images and routes, each in its own order.

        Args:
            parts: of each scan, (rows, groups, width, length).
        """
        return self._placed.by_image(parts)

    @cached_property
    def scan_frame(self) -> ScanRecord:
        """Everything that the first scan depended on, every route in its own order; nothing is measured."""
        self.calls[0].require_unchanged()
        u, delta, A, B, C, D, _ = self.calls[0].inputs.parts()
        return ScanRecord.from_scan(u, delta, A, B, C, D)

    @property
    def y(self) -> Float[Tensor, "batch channels tokens"]:
        """The scans' own output, routes summed in the token frame; before norm and gate."""
        return self._placed.merged([call.y.unflatten(1, (call.inputs.groups, -1)) for call in self.calls])

    @property
    def output(self) -> NoReturn:
        """Not there: a door shows what the scan returned, and not what its module made of it.

        Raises:
            TraceError: always.
        """
        self.require_output()

    def require_output(self) -> NoReturn:
        """Raise TraceError: there is none."""
        raise TraceError(f"{self.name}: it was traced at the scan's door, where the module's output is not seen.")

    def attention(self, fold: str = "mean", routes: str | int = "sum", **options: Any) -> Tensor:
        """As of any layer of scans; a matrix that was computed during the pass is put in the token frame."""
        plain = routes == "sum" and all(value is None for value in options.values())
        if plain and fold not in self._ready and all(c.attention and c.attention[0] == fold for c in self.calls):
            self._ready[fold] = self._placed.merged_matrix([c.attention[1] for c in self.calls if c.attention], fold)
        return super().attention(fold, routes, **options)

    def take_gradient(self) -> Tensor:
        """The gradient of the backward pass that just ran at ``y``: (batch, channels, tokens).

        Where the model weighs its routes apart behind the scan, theirs differ: (batch, routes, channels, length) then.
        """
        parts = []
        for call in self.calls:
            dy = call.dy()
            if dy is None:
                kind = torch.promote_types(call.inputs.u.dtype, torch.float32)
                dy = call.inputs.u.new_zeros(call.inputs.u.shape, dtype=kind)
            call.dout = None
            parts.append(dy.unflatten(1, (call.inputs.groups, -1)))
        return self._placed.gradient(parts)

    def edits(self, edit: Edit) -> list[CallEdit]:
        """What an intervention in the token frame does to each of the calls."""
        record, placed = self.scan, self._placed

        def spread(values: Tensor) -> list[Tensor]:
            whole = values.expand(record.batch, record.routes, *values.shape[2:])
            return [placed.of_call(number, call.groups, whole) for number, call in enumerate(self.calls)]

        if isinstance(edit, Within):
            return [CallEdit(within=edit.steps) for _ in self.calls]
        if isinstance(edit, Knockout):
            rows, columns = edit.removed(self.name, record)
            lost = spread(in_scan_order(rows[:, None, None], record.write_order))
            inputs = spread(in_scan_order(columns, record.read_order))
            lengths = [call.length for call in self.calls]
            each = zip(lost, inputs, lengths, strict=True)
            return [CallEdit((rows[:, :, 0, :n], columns[..., :n])) for rows, columns, n in each]
        matrix = edit.of_layer(self.name, record)
        matrix = in_scan_order(matrix.flatten(2, 3), record.read_order).unflatten(2, matrix.shape[2:4])
        order = record.write_order
        matrix = in_scan_order(matrix.mT.flatten(2, 3), order).unflatten(2, (-1, record.length)).mT
        return [
            CallEdit(matrix=its[..., : c.length, : c.length]) for its, c in zip(spread(matrix), self.calls, strict=True)
        ]

    @cached_property
    def _not_finite(self) -> list[str]:
        return ScanLayer(self.name, self.scan)._not_finite


class DoorScans:
    """What a trace saw at the doors, as layers.

    Args:
        model: that is traced.
        watch: at its doors.
        seen: what the forward pass has shown of the image.
        layout: the token frame, one for all layers, by patterns of names, or a function of name and number of tokens.
        orders: token of every step, (routes, length) or (batch, routes, length): one for all layers, by patterns of
            names, or a function of name, number of routes and length.
        refused: why an adapter refuses a mixer, by the mixer's name.
    """

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        seen: Seen,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.watch = watch
        self.runs = 0
        self.finished = 0  # of these runs; a forward that raised shows nothing
        self.leaves: list[Tensor] = []  # of the model's input, for gradients
        self._refused = refused or {}
        self._seen = seen
        self._layout = layout
        self._orders = orders
        self._replay: Replay | None = None
        self._end: int | None = None
        self._found: tuple[Found | None] | None = None
        self._layers: list[tuple[int, DoorLayer | DoorAttention]] = []
        self._of = -1

    def install(self, stack: ExitStack) -> None:
        """Learn how the model is called, and how often."""
        stack.callback(self.watch.close)
        hook = self.model.register_forward_pre_hook(self._starts, with_kwargs=True, prepend=True)
        stack.callback(hook.remove)
        stack.callback(self.model.register_forward_hook(self._ends).remove)

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self.finished += get_ident() == self.watch.thread

    def _starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != self.watch.thread or recomputing() or self.watch.suspended:
            return
        self.runs += 1
        if self.runs == 1:
            self._replay = Replay.of(args, kwargs)
            self.leaves = [value for value in Replay(args, kwargs).tensors if value.requires_grad]
        elif self.runs == 2:
            self._end = len(self.watch.calls)

    def require_seen(self) -> None:
        """Raise UnsupportedModelError, with the reason, if a scan that was to be seen did not come through a door."""
        ran = [call.module for call in self.watch.calls]
        for name, reason in self._refused.items():
            if not any(f"{other}.".startswith(f"{name}.") or not name for other in ran):
                raise UnsupportedModelError(f"{name or type(self.model).__name__}: {reason}")
        another = self.watch.another_recurrence()
        if another is not None and not ran:
            raise UnsupportedModelError(f"{type(self.model).__name__}: {another}")

    def differentiable(self) -> list[Tensor]:
        """What a backward pass may end at."""
        return [*self.leaves, *(parameter for parameter in self.model.parameters() if parameter.requires_grad)]

    def layers(self) -> list[tuple[int, DoorLayer | DoorAttention]]:
        """The layers of the first forward pass, each with the number of its first scan."""
        self.require_seen()
        calls = self.watch.calls[: self._end]
        if self._of != len(calls):
            self._of, self._layers, self._found = len(calls), [], None
            times: dict[str, int] = {}
            for members in self._parallel(calls):
                base = calls[members[0]].module or "model"
                times[base] = times.get(base, 0) + 1
                name = base if times[base] == 1 else f"{base}#{times[base]}"
                self._layers.append((members[0], self._layer(name, tuple(members))))
        return self._layers

    def _layer(self, name: str, members: tuple[int, ...]) -> DoorLayer | DoorAttention:
        calls = [self.watch.calls[i] for i in members]
        if isinstance(calls[0], SoftmaxCall):
            return DoorAttention(name, calls[0], partial(self._placed_attention, members=members))
        scans = [call for call in calls if isinstance(call, ScanCall)]
        return DoorLayer(name, scans, partial(self._placed, members=members))

    def _parallel(self, calls: Sequence[ScanCall | SoftmaxCall]) -> Iterator[list[int]]:
        """The scans that are routes of one layer: of one run of a module, in one frame, none behind another."""
        runs: dict[tuple[str, int], list[int]] = {}
        for i, call in enumerate(calls):
            runs.setdefault((call.module, call.run), []).append(i)
        several = [members for members in runs.values() if len(members) > 1]
        found = self._measured() if several and self._orders is None else None
        for members in runs.values():
            layer: list[int] = []
            for i in members:
                if layer and not (found and all(_one_layer(calls, found, j, i) for j in layer)):
                    yield layer
                    layer = []
                layer.append(i)
            yield layer

    def _measured(self) -> Found | None:
        if self._found is None:
            calls = self.watch.calls[: self._end]
            self._found = (None if self._replay is None else steps_of(self.model, self._replay, calls),)
        return self._found[0]

    def _placed(self, layer: DoorLayer, members: tuple[int, ...]) -> Placed:
        steps = self._steps(layer, layer.calls[0], members)
        return place(layer.name, layer.calls, steps, self._layout_of(layer.name, layer.calls[0].module, steps[0]))

    def _placed_attention(self, layer: DoorAttention, members: tuple[int, ...]) -> PlacedAttention:
        (steps,) = self._steps(layer, layer.call, members)
        if self._found and self._found[0] and members[0] in self._found[0].measured.other_keys:
            raise UnsupportedModelError(
                f"{layer.name}: its keys were not found to come from the tokens of its queries, so it is attention to "
                "another sequence: no matrix of one token frame. layer.row_frame has it as the module does; name other "
                "layers with layers=, or give the order with orders=."
            )
        layout = self._layout_of(layer.name, layer.call.module, steps)
        return place_attention(layer.call, layer.name, steps, layout, self._seen.real)

    def _steps(
        self, layer: DoorLayer | DoorAttention, first: ScanCall | SoftmaxCall, members: tuple[int, ...]
    ) -> list[Steps]:
        given = self._given_orders(layer.name, first)
        if given is not None:
            return [given]
        found = self._measured()
        steps = [] if found is None else [step for i in members if (step := found.steps[i]) is not None]
        if len(steps) < len(members):
            raise TraceError(f"{layer.name}: {self._why(layer, found, members)}")
        return steps

    def _why(self, layer: Layer, found: Found | None, members: tuple[int, ...]) -> str:
        """Why there is no order."""
        if self._replay is None:
            reason = "the traced model itself was not called, so that it cannot be called again to measure it"
        elif found is None:
            reason = "called again with the same input, the model ran another way"
        else:
            nearest = [found.measured.nearest[i] for i in members if i in found.measured.nearest]
            seen = f"; nearest: {nearest[0]}" if nearest else ""
            reason = f"there is no tensor in the forward pass in which each of its steps answers to one token{seen}"
        what, own = ("scan", "scan_frame") if isinstance(layer, DoorLayer) else ("attention", "row_frame")
        return (
            f"the order of its {what}'s tokens is not known: {reason}. Pass orders={{'name': tensor of "
            f"(routes, length)}} to trace(); layer.{own} has the {what} in its own order."
        )

    def _given_orders(self, name: str, call: ScanCall | SoftmaxCall) -> Steps | None:
        rows, length, groups = call.rows, call.length, call.groups
        given = self._orders
        if callable(given):
            given = given(name, groups, length)
        elif isinstance(given, Mapping):
            given = by_pattern(given, name)
        if given is None:
            return None
        order = given if given.ndim == 3 else given[None]
        if (
            order.dtype != torch.int64
            or order.ndim != 3
            or order.shape[0] not in (1, rows)
            or (order.shape[1] not in (1, groups) or order.shape[2] != length or int(order.min()) < 0)
        ):
            raise ValueError(
                f"trace(orders=...): {name} has {groups} routes of {length} steps and a batch of {rows}: "
                f"expected int64 (routes, length) or (batch, routes, length), got {given.dtype} {tuple(given.shape)}."
            )
        summed = order.shape[1] == groups
        order = order.expand(-1, groups, -1).unsqueeze(1).cpu()
        where = Place(order[:, 0], -1, (rows, int(order.max()) + 1, 1), 2, summed, 1.0, "orders=")
        return Steps(torch.arange(rows)[:, None], order, int(order.max()) + 1, where)

    def _layout_of(self, name: str, module: str, steps: Steps) -> TokenLayout | None:
        """Given, read from the patch embedding, or that of the nearest tensor with as many cells."""
        for layout in (given_layout(self._layout, name, steps.tokens), self._seen.layout, self._seen.embedded):
            if layout is not None and layout.tokens == steps.tokens:
                return layout
        batch = None if self._replay is None else self._replay.batch
        if batch is not None and len(steps.rows) != batch:
            return None  # the frame is a part of an image
        maps = self._found[0].measured.maps if self._found and self._found[0] else {}
        nearest = nearest_layout(module, steps.tokens, maps, self._replay, self._seen, steps.place.grid)
        return nearest or self._embedded(module, steps.tokens)

    def _embedded(self, module: str, tokens: int) -> TokenLayout | None:
        """Measured from the patches' convolution to the first module at a door: class tokens have no cell in a map."""
        modules = modules_of(self.model)
        at_doors = {call.module: modules[call.module] for call in self.watch.calls[: self._end] if call.module}
        if self._replay is None or module not in at_doors:
            return None
        found = standing(self.model, self._replay, at_doors, doors=False)
        if not {next(iter(at_doors)), module} <= set(found.whole):
            return None
        return found.embedded if found.embedded is not None and found.embedded.tokens == tokens else None


def _one_layer(calls: Sequence[ScanCall | SoftmaxCall], found: Found, earlier: int, later: int) -> bool:
    """Whether two scans of one run are routes of one layer."""
    a, b = found.steps[earlier], found.steps[later]
    if a is None or b is None or (earlier, later) in found.measured.chained:
        return False
    same_frame = a.place.tensor == b.place.tensor and a.rows.shape == b.rows.shape
    one, other = calls[earlier], calls[later]
    if not isinstance(one, ScanCall) or not isinstance(other, ScanCall) or type(one.inputs) is not type(other.inputs):
        return False
    first, second = one.inputs, other.inputs
    alike = (
        first.u.shape[:2] == second.u.shape[:2] and first.A.shape == second.A.shape and first.groups == second.groups
    )
    return same_frame and alike and (first.z is None) == (second.z is None) and same_route(a) == same_route(b)
