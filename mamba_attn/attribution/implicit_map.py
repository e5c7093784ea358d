"""The linear map of one mixer that ImplicitAttention shows: its gate, scans, activation and convolution.

Depthwise convolutions are weighted shifts of tokens here (``Taps``), which is the form a matrix needs. ``Implicit`` is
the map, ``MixerRecorder`` keeps the values of a pass that it depends on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn._types import Float, Int
from mamba_attn.attribution.activation_recorder import ActivationRecorder
from mamba_attn.attribution.implicit_at_doors import Around, ConvolutionCall, as_module, at_doors, plain
from mamba_attn.core.rules import LINEAR, TOKENS
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.ops import selective_scan
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.layers import ScanLayer


@dataclass(frozen=True, eq=False)
class Taps:
    """A convolution shared by some routes, as shifts of tokens.

    Args:
        routes: the routes that share it.
        weight: one per channel and tap.
        source: per tap, the token that each token reads.
        inside: per tap, whether that token exists.
    """

    routes: slice
    weight: Float[Tensor, "channels taps"]
    source: Int[Tensor, "taps tokens"]
    inside: Tensor


def shifts(
    routes: slice, module: nn.Conv1d | nn.Conv2d, place: Tensor, *, conv: bool, called: str = "ImplicitAttention"
) -> Taps:
    """Return the taps along a line of tokens (causal) or over a grid of them; sources ordered as in ``place``.

    Args:
        routes: the routes that share them.
        module: the convolution.
        place: (tokens) or (rows, columns), the token at each place.
        conv: False uses the identity instead.
        called: the name of the method, for messages.

    Raises:
        UnsupportedModelError: a padding that is not a number.
    """
    channels = module.weight.shape[0]
    if not conv:
        one = module.weight.detach().new_ones(channels, 1)
        return Taps(routes, one, place.flatten()[None], torch.ones_like(place.flatten()[None], dtype=torch.bool))
    weight = module.weight.detach().clone().flatten(2)[:, 0]
    sources = []
    if isinstance(module, nn.Conv1d):
        width = weight.shape[1]
        padded = F.pad(place, (width - 1, 0), value=-1)
        sources = [padded[tap : tap + len(place)] for tap in range(width)]
    else:
        (up, left), (down, across) = _pair(module.padding, called), _pair(module.dilation, called)
        padded = F.pad(place, (left, left, up, up), value=-1)
        rows, columns = module.kernel_size
        sources = [
            padded[r * down : r * down + place.shape[0], c * across : c * across + place.shape[1]].flatten()
            for r in range(rows)
            for c in range(columns)
        ]
    source = torch.stack(sources)
    return Taps(routes, weight, source.clamp(min=0), source >= 0)


def _pair(value: int | str | tuple[int, ...], called: str) -> tuple[int, int]:
    if isinstance(value, str):
        raise UnsupportedModelError(f"{called}: a convolution with padding={value!r} is not known.")
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class MixerRecorder(ActivationRecorder):
    """Records the depthwise convolutions before a scan, and the gated output if no norm comes first.

    Attributes:
        convolutions: per record, the calls.
        around: per scan at a door, in order, what was computed around it.
    """

    wants: ClassVar[frozenset[str]] = frozenset({LINEAR, TOKENS})
    at_doors: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: dict[ScanRecord, list[ConvolutionCall]] = {}
        self.around: dict[object, Around] = {}
        self._calls: list[ConvolutionCall] = []
        self._before: list[tuple[nn.Conv1d | nn.Conv2d, Tensor]] = []

    def scanned(self, call: object, layer: str, x: Tensor) -> None:
        """Assign the convolutions since the last scan at a door to this one."""
        self.around[call] = Around(self._before)
        self._before = []

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> None:
        """Record a depthwise convolution that may feed a scan at a door."""
        self._before.append((as_module(weight, bias, **options), x.detach()))

    def multiplied(self, a: Tensor, b: Tensor) -> None:
        """Record a product that may be a scan's output with its gate."""
        if self.around:
            next(reversed(self.around.values())).products.append((a.detach(), b.detach()))

    def enter(self, layer: str, x: Tensor) -> None:
        """Drop the convolutions of mixers that are not traced."""
        self._calls = []

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Record a depthwise convolution's input and output."""
        y = super().linear(module, x, call)
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels == module.out_channels:
            self._calls.append(ConvolutionCall(module, x, y))
        return y

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply the activation and record nothing: M needs only inputs and outputs of convolutions."""
        return function(x)

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Assign the calls since the last scan to this one."""
        self.convolutions[record], self._calls = self._calls, []
        return super().scan(record)

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Stop looking for a gate: one that comes after a norm is not part of a linear map."""
        self._record = None
        return super().norm(module, x, call)


class Implicit:
    """M of one layer, per channel, and a constant: M x + constant is the layer's output before norm or out_proj.

    M = scale * diag(gate) sum_r (alpha_r + diag(D_r)) diag(s_r) T_r in the token frame; alpha_r the hidden attention
    along route r, s_r = act(p) / p with p the convolution's output, for SiLU sigmoid(p), T_r the convolution along the
    route or, in VMamba, over the grid; x what the convolution receives.

    Args:
        layer: the layer.
        recorder: of its pass.
        skip: keep D.
        gate: keep the gate.
        conv: keep the convolution; without it T is the identity.
        activation: keep s; without it it is 1.
        called: the name of the method, for messages.

    Attributes:
        scan: the record, with the gate that follows it.
        gate: what multiplies the scans' output, or None.
        p: the convolutions' output, as the scan's input stands.

    Raises:
        UnsupportedModelError: the mixer lacks the depthwise convolution of Vim or VMamba.
    """

    def __init__(
        self,
        layer: ScanLayer,
        recorder: MixerRecorder,
        *,
        skip: bool = True,
        gate: bool = True,
        conv: bool = True,
        activation: bool = True,
        called: str = "ImplicitAttention",
    ) -> None:
        layer.require_finite()
        self.layer, self.conv, self.called, dtype = layer, conv, called, layer.dtype
        if not layer.scan.shares_orders or (layer.scan.D is not None and layer.scan.D.ndim == 3):
            raise UnsupportedModelError(
                f"{called}: {layer.name} walks another order in every image, has steps without a token or a D "
                "of tokens, through which its convolutions are not followed; use MambaAttribution or RawAttention."
            )
        calls: Sequence[ConvolutionCall]
        if isinstance(layer, DoorLayer):
            scan, calls = at_doors(layer, recorder.around, called)
            gated = scan.gate is not None
        else:
            scan, calls = layer.scan.map_tensors(Tensor.detach), recorder.convolutions.get(layer.scan, ())
            gated = layer.scan in recorder.gated
        self.scan = scan if skip else scan.replace(D=None)
        self._calls = [call._replace(x=call.x.detach().to(dtype), p=call.p.detach().to(dtype)) for call in calls]
        self._require_known()
        self.p = self._in_source(lambda call: call.p)
        # silu(p) / p tends to 1/2 where p tends to 0, and 0 / 0 would be NaN
        away = self.p.abs() >= torch.finfo(dtype).eps
        ratio = torch.where(away, scan.source_u / torch.where(away, self.p, 1), 0.5)
        self._ratio = ratio if activation else torch.ones_like(ratio)
        # a gate after a norm, as in VMamba's first generation, is not part of a linear map
        self._own_gate = scan.gate.to(dtype) if scan.gate is not None and gated else None
        self.gate = self._own_gate if gate else None

    @cached_property
    def x(self) -> Float[Tensor, "batch channels tokens"]:
        """What the convolution receives, in the token frame."""
        x = self._calls[0].x
        if x.ndim == 4:
            return x.flatten(2)
        return torch.zeros_like(x).index_copy(2, self.scan.read_order[0], x)

    def behind_gate(self, gradient: Float[Tensor, "batch channels tokens"]) -> Float[Tensor, "batch channels tokens"]:
        """Return the gradient behind the mixer's gate, of the one in front of it, which is the gate times as large."""
        if self._own_gate is None:
            return gradient
        return torch.where(self._own_gate == 0, 0, gradient / self._own_gate)

    def apply(self, x: Float[Tensor, "batch channels tokens"]) -> Float[Tensor, "batch channels tokens"]:
        """Return M x, channel by channel."""
        return self._after(self._mixed(x))

    def constant(self) -> Float[Tensor, "batch channels tokens"]:
        """Return the contribution of the convolution's bias."""
        return self._after(self._in_source(self._bias)) if self.conv else torch.zeros_like(self.x)

    def rows(self, vector: Float[Tensor, "batch channels tokens"]) -> Float[Tensor, "batch channels tokens"]:
        """Return vector M, channel by channel, in linear time: the vector-Jacobian product of ``apply``."""
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros_like(self.x).requires_grad_()
            (result,) = torch.autograd.grad(self.apply(x), x, vector.to(x).clone())
        return result

    def matrix(
        self, row_weight: Float[Tensor, "batch channels tokens"], col_weight: Float[Tensor, "batch channels tokens"]
    ) -> Float[Tensor, "batch tokens tokens"]:
        """Return sum_c row_weight[c, i] M_c[i, j] col_weight[c, j]: one folded matrix per route and tap."""
        # the convolution is few taps, so M's columns are those of alpha, scaled and moved: no matrix per channel
        rows = row_weight if self.gate is None else row_weight * self.gate
        tokens = self.scan.tokens
        total = rows.new_zeros(rows.shape[0], tokens, tokens)
        for taps in self.taps():
            part = self.scan.select_routes(taps.routes)
            ratio, skip = self.placed(self._ratio, taps), self.skip_of(part)
            for weight, source, inside in zip(taps.weight.unbind(1), taps.source, taps.inside, strict=True):
                columns = ratio * weight[:, None] * col_weight[:, :, source]
                folded = ops.hidden_attention(part, row_weight=rows, col_weight=columns, fold="sum").to(total)
                if skip is not None:
                    folded = folded + torch.diag_embed((rows * skip[:, None] * columns).sum(1))
                total = total.index_add(2, source[inside], folded[:, :, inside])
        return total

    def _mixed(self, x: Tensor) -> Tensor:
        """T x, where the scan's input stands."""
        if self._calls[0].x.ndim == 4:
            (call,) = self._calls
            grid = x.view(call.x.shape)
            return (self._convolved(call.module, grid) if self.conv else grid).flatten(2).unsqueeze(1)
        routes = (x.index_select(2, order) for order in self.scan.read_order)
        return torch.stack(
            [self._convolved(c.module, r) if self.conv else r for c, r in zip(self._calls, routes, strict=True)], dim=1
        )

    @staticmethod
    def _bias(call: ConvolutionCall) -> Tensor:
        bias = call.module.bias
        if bias is None:
            return torch.zeros_like(call.p)
        return plain(bias, call.p).view(-1, *[1] * (call.p.ndim - 2)).expand_as(call.p)

    def _convolved(self, module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
        weight = plain(module.weight, x)
        if isinstance(module, nn.Conv1d):
            return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, groups=module.groups)
        return F.conv2d(x, weight, None, module.stride, module.padding, module.dilation, module.groups)

    def _after(self, mixed: Tensor) -> Tensor:
        """Ratio, scan and gate."""
        y = selective_scan(self.scan.replace(source_u=self._ratio * mixed)).to(mixed)
        return y if self.gate is None else y * self.gate

    def _in_source(self, tensor: Callable[[ConvolutionCall], Tensor]) -> Float[Tensor, "batch _ channels positions"]:
        """One tensor per convolution, as the scan's input stands."""
        if self._calls[0].x.ndim == 4:
            return tensor(self._calls[0]).flatten(2).unsqueeze(1)
        return torch.stack([tensor(call)[..., : self.scan.length] for call in self._calls], dim=1)

    def taps(self) -> Iterator[Taps]:
        """Yield the convolutions as shifts of tokens; sources in the token frame."""
        tokens, device = self.scan.tokens, self.x.device
        if self._calls[0].x.ndim == 4:
            (call,) = self._calls
            height, width = call.x.shape[2:]
            place = torch.arange(tokens, device=device).view(height, width)
            yield shifts(slice(None), call.module, place, conv=self.conv, called=self.called)
            return
        for route, call in enumerate(self._calls):
            order = self.scan.read_order[route]
            taps = shifts(slice(route, route + 1), call.module, order, conv=self.conv, called=self.called)
            step = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=device))
            yield Taps(taps.routes, taps.weight, taps.source[:, step], taps.inside[:, step])

    def placed(self, values: Float[Tensor, "batch _ channels positions"], taps: Taps) -> Tensor:
        """Return values that stand as the scan's input does, of the routes of one convolution, in the token frame."""
        if values.shape[1] == 1 and self._calls[0].x.ndim == 4:
            return values[:, 0]
        own = values[:, taps.routes][:, 0]
        return torch.zeros_like(own).index_copy(2, self.scan.read_order[taps.routes][0], own)

    def skip_of(self, part: ScanRecord) -> Float[Tensor, " channels"] | None:
        """Return D of some routes, summed, times the mixer's scale."""
        return None if part.D is None else part.D.sum(0).to(self.x) * part.scale

    def _require_known(self) -> None:
        calls, scan = self._calls, self.scan
        still = all(call.x.shape[2:] == call.p.shape[2:] for call in calls if call.x.ndim == 4)  # stride 1, padded
        grid = (
            still
            and len(calls) == 1
            and calls[0].x.ndim == 4
            and scan.source_frame == "tokens"
            and scan.source_u.shape[1] == 1
        )
        line = len(calls) == scan.routes and all(call.x.ndim == 3 for call in calls) and scan.source_frame == "scan"
        if not (grid or line) or scan.heads != scan.channels or calls[0].x.shape[1] != scan.channels:
            raise UnsupportedModelError(
                f"{self.called}: {self.layer.name} is no mixer of Vim or VMamba, with one depthwise convolution "
                "per route or one over the grid before the scans; use MambaAttribution or RawAttention, or name other "
                "layers with layers=."
            )
