"""What each token hands every other through one mixer, as vectors: T_i(x_j), whose sizes LaTIM shows.

``InteractionRecorder`` also keeps the norms and projections of a pass, among which the mixer's own are found by number.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float, Int
from mamba_attn.attribution.implicit_at_doors import ACTIVATIONS, as_tokens, plain
from mamba_attn.attribution.implicit_map import Implicit, MixerRecorder
from mamba_attn.core.rules import LINEAR, NORM, TOKENS
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.ops.row_blocks import row_blocks
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.layers import ScanLayer


class Event(NamedTuple):
    """A norm or linear layer with its input and output, or, without a module, a product of two tensors."""

    module: Any
    x: Tensor
    y: Tensor


class InteractionRecorder(MixerRecorder):
    """Records norms, linear layers and products too, and where among them the scans are."""

    wants: ClassVar[frozenset[str]] = frozenset({LINEAR, TOKENS, NORM})

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Event] = []
        self._places: dict[object, int] = {}

    def before(self, layer: ScanLayer) -> list[Event]:
        """Return what was computed between the scan before a layer's and its own, the last first."""
        own = self._places[_scans(layer)[0]]
        start = max((place for place in self._places.values() if place < own), default=0)
        return self._events[start:own][::-1]

    def after(self, layer: ScanLayer) -> list[Event]:
        """Return what was computed between a layer's scan and the next."""
        own = self._places[_scans(layer)[-1]]
        return self._events[own : min((place for place in self._places.values() if place > own), default=None)]

    def scanned(self, call: object, layer: str, x: Tensor) -> None:
        """Note the place of a scan at a door."""
        super().scanned(call, layer, x)
        self._places[call] = len(self._events)

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Note the place of a scan."""
        self._places[record] = len(self._events)
        return super().scan(record)

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Record a norm's input, a copy, since residual streams are added to in place, and its output."""
        given = x.detach().clone()
        y = super().norm(module, x, call)
        self._events.append(Event(module, given, y.detach()))
        return y

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Record a linear layer's input and output."""
        y = super().linear(module, x, call)
        if _projects(module):
            self._events.append(Event(module, x.detach(), y.detach()))
        return y

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Record a gate's factors."""
        self._events.append(Event(None, y.detach(), gate.detach()))
        return super().gate(y, gate)

    def multiplied(self, a: Tensor, b: Tensor) -> None:
        """Record a product."""
        super().multiplied(a, b)
        self._events.append(Event(None, a.detach(), b.detach()))


def _scans(layer: ScanLayer) -> list[Any]:
    return list(layer.calls) if isinstance(layer, DoorLayer) else [layer.scan]


class Interactions:
    """The vectors of one mixer, and the residual stream around it.

    In the token frame,

        T_i(x_j) = W (z_i * sum_r sum_taps (alpha_r + diag(D_r))[i, k] f(w_tap x_j))

    with f the activation between convolution and scan, of every tap alone, k the token whose tap reads j, z the gate,
    and W the projection. A norm before it is linear too with its denominator held fixed. The sum over j is the mixer's
    output less what biases give, exactly where f is linear or one tap stands alone.

    Args:
        layer: the layer.
        recorder: of its pass.
        called: the name of the method, for messages.

    Attributes:
        stream: (batch, features, tokens), what enters the block: its residual stream.
        output: (batch, features, tokens), what the mixer returned.

    Raises:
        UnsupportedModelError: no such convolution, projection or stream was found.
    """

    def __init__(self, layer: ScanLayer, recorder: InteractionRecorder, called: str) -> None:
        self._layer, self._called = layer, called
        self._implicit = Implicit(layer, recorder, called=called)
        # half of the digits of what the model computed in
        self._rounding = torch.finfo(layer.scan.source_u.dtype).eps ** 0.5
        self._taps = list(self._surrogates())
        self._steps: list[Tensor | None] = []  # behind the gate: a factor, or None for the mean over channels
        self._weight, self.output = self._projection(recorder.after(layer))
        self.stream = self._stream(recorder.before(layer))

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self._implicit.scan.tokens

    @property
    def width(self) -> int:
        """How many numbers a pair of tokens takes."""
        return max(self._implicit.scan.channels, len(self._weight))

    def vectors(self, image: int, rows: Int[Tensor, " rows"]) -> Float[Tensor, "features rows tokens"]:
        """Return T_i(x_j) of some tokens i and all j of one image.

        Args:
            image: its number.
            rows: tokens, each once.
        """
        implicit = self._implicit
        scan = implicit.scan.select_images(slice(image, image + 1))
        total = implicit.x.new_zeros(scan.channels, len(rows), self.tokens)
        gate = None if implicit.gate is None else implicit.gate[image][:, rows, None]
        for routes, stays, taps in self._taps:
            part = scan.select_routes(routes)
            stay = None if stays is None else stays[image, :, None]
            for block in row_blocks(part, rows):
                places, queries, keys, square = block.places, block.queries[0], block.keys[0], block.square[0]
                if places[0] > places[-1]:  # a route from the last token to the first
                    places, queries, square = places.flip(0), queries.flip(1), square.flip(1)
                if gate is not None:
                    queries, square = queries * gate[:, places], square * gate[:, places]
                if stay is not None:
                    keys, square = keys * stay, square * stay[..., block.columns]
                handed = torch.zeros_like(keys)
                for tap in taps:
                    tap.hand_on(keys, None, handed, image)
                added = queries @ handed
                for tap in taps:
                    tap.hand_on(square, block.columns, added, image)
                line = _line(places)
                if line is None:
                    total.index_add_(1, places, added)
                else:
                    total[:, line.start : line.stop] += added
            skip = implicit.skip_of(part)
            if skip is not None:
                own = torch.diag_embed(skip[:, None].expand(-1, len(rows)))
                own = own if gate is None else own * gate
                own = own if stay is None else own * stay[..., rows]
                for tap in taps:
                    tap.hand_on(own, rows, total, image)
        for step in self._steps:
            if step is None:
                total -= total.mean(0)
            else:
                total *= step[image][:, rows, None]
        vectors: Tensor = (self._weight @ total.flatten(1)).unflatten(1, total.shape[1:])
        return vectors

    def _surrogates(self) -> Iterator[tuple[slice, Tensor | None, list["_Tap"]]]:
        """Per convolution: the routes that it feeds, which of its outputs they take in, and what taps hand on."""
        implicit = self._implicit
        for taps in implicit.taps():
            p, u = (implicit.placed(values, taps) for values in (implicit.p, implicit.scan.source_u.to(implicit.p)))
            stays = (u != 0) | (p == 0)  # texts: the scan takes in zeros where there is padding
            act = self._activation(p[stays], u[stays])
            weight = taps.weight.to(p).unsqueeze(2)
            found = [
                _tap(source[inside], inside.nonzero().flatten(), act(weight[:, tap] * implicit.x))
                for tap, (source, inside) in enumerate(zip(taps.source, taps.inside, strict=True))
                if bool(inside.any())
            ]
            yield taps.routes, None if bool(stays.all()) else stays, found

    def _activation(self, p: Tensor, u: Tensor) -> Callable[[Tensor], Tensor]:
        """The activation between a convolution and the scan."""
        error, act = min(((float((act(p) - u).abs().max()), act) for act in ACTIVATIONS), key=lambda pair: pair[0])
        if error > self._rounding * float(u.abs().max()):
            raise UnsupportedModelError(
                f"{self._called}: what the scans of {self._layer.name} take in is no SiLU, GELU or ReLU of their "
                "convolution's output; use ImplicitAttention, or name other layers with layers=."
            )
        return act

    def _projection(self, after: list[Event]) -> tuple[Tensor, Tensor]:
        """The projection's weight and what the mixer returned; notes what is multiplied in between."""
        now = self._implicit.apply(self._implicit.x) + self._implicit.constant()
        for module, x, y in after:
            factor, number = (None, 0) if module is None else self._times(now, x)
            if module is None:
                now = self._multiplied(now, x, y)
            elif factor is not None and _projects(module):
                weight = plain(module.weight, now).flatten(1)
                return self._returned(weight * factor, weight @ (now * factor) + _bias(module, now))
            elif factor is not None:
                now = self._normed(now, as_tokens(y, now)[number].to(now), module)
        raise UnsupportedModelError(
            f"{self._called}: no linear layer was seen that receives what the scans of {self._layer.name} give, with "
            "gates and one layer norm or RMS norm between them at most; use ImplicitAttention, or name other layers "
            "with layers=."
        )

    def _normed(self, now: Tensor, normed: Tensor, module: nn.Module) -> Tensor:
        """What a norm makes of it, if that is its own factor for every token times the weight, centred or not."""
        weight: Any = getattr(module, "weight", None)
        weight = 1 if weight is None else plain(weight, now)[:, None]
        linear = normed - _bias(module, now)
        for centred in (True, False):
            base = weight * (now - now.mean(1, keepdim=True) if centred else now)
            over = (linear * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True)
            if self._same(base * over, linear):
                self._steps += [None] if centred else []
                self._steps.append((over * weight).expand_as(now))
                return normed
        return now

    def _multiplied(self, now: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The product of two factors if one of them is what there is now."""
        for own, other in ((a, b), (b, a)):
            factor, number = self._times(now, own)
            if factor is not None:
                step = as_tokens(other, now)[number].to(now) * factor
                self._steps.append(step)
                return now * step
        return now

    def _returned(self, weight: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """A projection's weight and output, times the mixer's layer scale."""
        try:
            output = self._layer.output
        except TraceError:  # at a door, or a mixer that returns several
            return weight, mixed
        for its in as_tokens(output, mixed):
            scale = (its.to(mixed) * mixed).sum((0, 2)) / mixed.square().sum((0, 2))
            if self._same(its, mixed):
                return weight, mixed
            if self._same(its, mixed * scale[:, None]):
                return weight * scale[:, None], mixed * scale[:, None]
        raise UnsupportedModelError(
            f"{self._called}: what {self._layer.name} returns is not the output of the linear layer behind its scans; "
            "use ImplicitAttention, or name other layers with layers=."
        )

    def _stream(self, before: list[Event]) -> Tensor:
        """The input of the norm whose output the mixer's own linear layers receive."""
        linear: list[tuple[nn.Module, Tensor]] = []
        for module, given, y in before:
            if module is None:
                continue
            if _projects(module):
                linear.append((module, given))
                continue
            found = as_tokens(given, self.output)
            for its, x in linear if found else ():
                if x.numel() == y.numel() and self._same(x, y.reshape(x.shape)):
                    return found[0 if isinstance(its, nn.Linear) else -1].to(self.output)
        raise UnsupportedModelError(
            f"{self._called}: the residual stream around {self._layer.name} was not seen, because no norm module makes "
            "what the mixer receives; use ImplicitAttention, or name other layers with layers=."
        )

    def _times(self, now: Tensor, x: Tensor) -> tuple[Tensor | None, int]:
        """How many times as large x is, and how it is read as tokens; None if it is something else."""
        size = now.square().sum()
        for number, its in enumerate(as_tokens(x, now)):
            factor = torch.where(size > 0, (its.to(now) * now).sum() / size, 1)
            if bool(factor != 0) and self._same(its, now * factor):
                return factor, number
        return None, 0

    def _same(self, a: Tensor, b: Tensor) -> bool:
        return bool((a.to(b) - b).abs().max() <= self._rounding * b.abs().max())


def _projects(module: Any) -> bool:
    """Whether it is a linear layer of single tokens."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == module.weight[0, 0].numel() == 1
    return isinstance(module, nn.Linear)


def _bias(module: nn.Module, like: Tensor) -> Tensor | int:
    """A module's bias, one per channel; 0 without one."""
    bias: Any = getattr(module, "bias", None)
    return 0 if bias is None else plain(bias, like)[:, None]


class _Tap(NamedTuple):
    """What one tap of a convolution hands on: f(w x) of the tokens that are read, to those that read them.

    Args:
        columns: the tokens that are read.
        readers: who reads each; a slice where all are as far apart, as along the order of tokens or the grid.
        values: f(w x), 0 where nobody reads.
    """

    columns: slice
    readers: slice | Int[Tensor, " columns"]
    values: Float[Tensor, "batch channels columns"]

    def hand_on(self, alpha: Tensor, tokens: Int[Tensor, " _some"] | None, total: Tensor, image: int) -> None:
        """Add to ``total``, in the columns that are read, alpha in those of their readers times the values.

        Args:
            alpha: (channels, rows, tokens or some of them).
            tokens: which; None for all.
            total: (channels, rows, tokens).
            image: whose values.
        """
        values, columns, readers = self.values[image, :, None], self.columns, self.readers
        if tokens is not None:
            line = _line(tokens)
            if line is None or not isinstance(readers, slice):
                alpha = alpha.new_zeros(total.shape).index_copy_(2, tokens, alpha)
            else:
                alpha = alpha if line.step > 0 else alpha.flip(2)
                start, stop = max(readers.start, line.start), min(readers.stop, line.stop)
                if start >= stop:
                    return
                shift = columns.start - readers.start
                values = values[..., start - readers.start : stop - readers.start]
                columns, readers = slice(start + shift, stop + shift), slice(start - line.start, stop - line.start)
        total[..., columns].addcmul_(alpha[..., readers], values)


class _Line(NamedTuple):
    start: int
    stop: int
    step: int


def _line(tokens: Int[Tensor, " _some"]) -> _Line | None:
    """Where tokens follow each other, from the first to the last or back: their range."""
    first, last = int(tokens[0]), int(tokens[-1])
    step = 1 if last >= first else -1
    if abs(last - first) + 1 != len(tokens) or not bool((tokens.diff() == step).all()):
        return None
    return _Line(min(first, last), max(first, last) + 1, step)


def _tap(columns: Tensor, readers: Tensor, values: Float[Tensor, "batch channels tokens"]) -> _Tap:
    masked = torch.zeros_like(values).index_copy(2, columns, values.index_select(2, columns))
    apart = (readers - columns).unique()
    if len(apart) == 1:
        low, high, step = int(columns.min()), int(columns.max()) + 1, int(apart)
        return _Tap(slice(low, high), slice(low + step, high + step), masked[..., low:high])
    every = torch.zeros(values.shape[2], dtype=torch.long, device=columns.device).index_copy(0, columns, readers)
    return _Tap(slice(0, values.shape[2]), every, masked)
