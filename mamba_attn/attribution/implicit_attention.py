"""ImplicitAttention: the attention matrix of a whole mixer, including its gate, activation and convolution.

Below the method: depthwise convolutions as weighted shifts of tokens (``Taps``), which is the form a matrix needs; and
the linear map of one layer (``Implicit``), with a recorder of the activations it depends on.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn._types import Float, Int
from mamba_attn.attribution.activation_recorder import ActivationRecorder, gated_gradients
from mamba_attn.attribution.attention_rollout import Product, dense, of_one_token, roll_out_weighted
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.maps import Positions, TokenAttribution
from mamba_attn.attribution.queries import Place, Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.core.rules import LINEAR, TOKENS
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.ops import selective_scan
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import ByLayer, LayerNames
from mamba_attn.tracing.layers import ScanLayer, require

PARTS = ("skip", "gate", "conv", "activation")


class ImplicitAttention(TokenAttribution):
    """The query's row of the mixers' implicit attention, the unified formulation of arXiv 2405.16504.

    A mixer's channel c is linear in what its convolution receives, x, when the data-dependent factors are held fixed:

        M_c = diag(silu(z)) sum_r (alpha_r + diag(D)) diag(sigmoid(p_r)) T_r        M_c x + constant = the gated output

    (arXiv 2405.16504, plus the skip D and, in the constant, the convolution's bias, which the paper omits).
    alpha_r is the hidden attention along route r, T_r the causal convolution along it, p_r its output, z the gate; in
    the token frame, times the mixer's scale (1/2 in Vim). In VMamba T is the 2-d convolution over the grid, and what
    M x + constant equals is what enters out_norm: the gate of its first generation comes after that norm, so it is not
    part of M.

    ==============================  ===================================================================================
    ``gradient=True``               W = sum_c dlogit/dM_c * M_c, dlogit/dM_c[i, j] = dlogit/do_c[i] x_c[j], o the gated
                                    output (VMamba: what enters out_norm); depends on the class
    ``gradient=False``              W = mean_c M_c; independent of the class
    ``rollout=True``                the query's row of the product of I + W^+ over the layers, last to first, minus
                                    what the residual streams alone carry; nothing is normalised. Dense, one matrix at
                                    a time
    ``rollout=False``               the query's rows of W, their positive part, averaged over the layers; a coarse
                                    token's value spreads over the area that it covers. Linear time
    ``signed=True``                 no positive part; linear in time with either
    ==============================  ===================================================================================

    The positive part is taken after the sum over channels, routes and taps; without rollout after the mean over the
    query's tokens too. With ``gradient=True`` W before its positive part sums to dlogit/do * (o - constant), the
    layer's contribution to the logit to first order. In a model that averages over patches, gradients are multiplied by
    the number of patches, as in ``MambaAttribution``, whose W has alpha and u in place of M and x.

    ``skip``, ``gate``, ``conv`` and ``activation`` remove a factor from M for ablations (D: 0; the others: the
    identity); x and dlogit/do stay the same. ``convention="implicit_unified"`` of the other methods is the
    published code's map: no D, its class token's row in all rows, its own weights and scales.

    Args:
        model: Vim or VMamba.
        layers: names, patterns or numbers of the mixers to use; the others act as the identity. Default: all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        gradient: see above.
        rollout: see above.
        signed: see above.
        skip: keep D.
        gate: keep diag(silu(z)).
        conv: keep T.
        activation: keep diag(sigmoid(p)).

    Raises:
        UnsupportedModelError: when called, layers that are softmax attention, or mixers of another make.

    Example:
        >>> ImplicitAttention(model, gradient=False, rollout=False).attribute(images).shape
        torch.Size([2, 1, 224, 224])
    """

    reads_traces: ClassVar[bool] = False  # it watches the pass

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        gradient: bool = True,
        rollout: bool = True,
        signed: bool = False,
        skip: bool = True,
        gate: bool = True,
        conv: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        self.gradient = gradient
        self.rollout = rollout
        self.signed = signed
        self.parts = dict(zip(PARTS, (skip, gate, conv, activation), strict=True))

    def rows(
        self,
        inputs: Tensor,
        query: Positions = None,
        *,
        pixel: Place | None = None,
        box: Place | None = None,
    ) -> ByLayer[Float[Tensor, "batch tokens"]]:
        """Return the query's signed row of mean_c M_c in every layer by the layers' names, in linear time.

        Args:
            inputs: as in ``attribute``.
            query: as in ``attribute``.
            pixel: as in ``attribute``.
            box: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch; a pixel or box is outside the image, or both are given.
        """
        bound = self._called_with("rows", inputs)
        asked = self._asked("rows", inputs, query, pixel, box, bound._call.text)
        with torch.no_grad():
            weighted = bound._weighted(inputs, None, gradient=False)
            return ByLayer({part.layer.name: part.row(query_weights(part.layer, asked)) for part in weighted})

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        weighted = self._weighted(inputs, target, gradient=self.gradient, multiplied=self.rollout)
        if not self.rollout:
            rows = ((part.layer, part.row(query_weights(part.layer, query))) for part in weighted)
            return [(layer.layout, row if self.signed else row.clamp(min=0)) for layer, row in rows]
        by_name = {part.layer.name: part for part in weighted}

        def step(layer: ScanLayer) -> tuple[Product, float]:
            part = by_name[layer.name]
            return (part.row, 1.0) if self.signed else dense(part.matrix().clamp(min=0))

        layers = [part.layer for part in weighted]
        return [(layers[0].layout, roll_out_weighted(layers, query_weights(layers[-1], query), step))]

    def _weighted(
        self, inputs: Tensor, target: Target, *, gradient: bool, multiplied: bool = False
    ) -> list["_Weighted"]:
        """Return W of every layer, as its factors."""
        recorder = MixerRecorder()
        options = {"gradients": gradient, "multiplied": multiplied}
        with self._traced(inputs, target, rules=recorder, **options) as (record, logit):
            layers = require(self.called, record.layers, ScanLayer)
            found: Mapping[str, Tensor] = gated_gradients(layers, logit, recorder) if gradient else {}
            weighted = []
            for layer in layers:
                implicit = Implicit(layer, recorder, **self.parts)
                if gradient:
                    rows, columns = of_one_token(layer, found[layer.name]).to(implicit.x), implicit.x
                else:
                    rows, columns = torch.full_like(implicit.x, 1 / layer.scan.channels), torch.ones_like(implicit.x)
                weighted.append(_Weighted(layer, implicit, rows, columns))
        return weighted


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


def plain(parameter: Tensor, like: Tensor) -> Tensor:
    """Return a parameter's values, usable in autograd even where the model was made in inference mode."""
    return parameter.detach().to(like).clone()


def shifts(routes: slice, module: nn.Conv1d | nn.Conv2d, place: Tensor, *, conv: bool) -> Taps:
    """Return the taps along a line of tokens (causal) or over a grid of them; sources ordered as in ``place``.

    Args:
        routes: the routes that share them.
        module: the convolution.
        place: (tokens) or (rows, columns), the token at each place.
        conv: False uses the identity instead.

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
        (up, left), (down, across) = _pair(module.padding), _pair(module.dilation)
        padded = F.pad(place, (left, left, up, up), value=-1)
        rows, columns = module.kernel_size
        sources = [
            padded[r * down : r * down + place.shape[0], c * across : c * across + place.shape[1]].flatten()
            for r in range(rows)
            for c in range(columns)
        ]
    source = torch.stack(sources)
    return Taps(routes, weight, source.clamp(min=0), source >= 0)


def _pair(value: int | str | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, str):
        raise UnsupportedModelError(f"ImplicitAttention: a convolution with padding={value!r} is not known.")
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _Call(NamedTuple):
    """One call of a depthwise convolution."""

    module: nn.Conv1d | nn.Conv2d
    x: Tensor
    p: Tensor


class MixerRecorder(ActivationRecorder):
    """Records the depthwise convolutions before a scan, and the gated output if no norm comes first.

    Attributes:
        convolutions: per record, the calls.
    """

    wants: ClassVar[frozenset[str]] = frozenset({LINEAR, TOKENS})

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: dict[ScanRecord, list[_Call]] = {}
        self._calls: list[_Call] = []

    def enter(self, layer: str, x: Tensor) -> None:
        """Drop the convolutions of mixers that are not traced."""
        self._calls = []

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Record a depthwise convolution's input and output."""
        y = super().linear(module, x, call)
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == module.in_channels == module.out_channels:
            self._calls.append(_Call(module, x, y))
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
    ) -> None:
        layer.require_finite()
        self.layer, self.conv, dtype = layer, conv, layer.dtype
        if not layer.scan.shares_orders or (layer.scan.D is not None and layer.scan.D.ndim == 3):
            raise UnsupportedModelError(
                f"ImplicitAttention: {layer.name} walks another order in every image, has steps without a token or a D "
                "of tokens, through which its convolutions are not followed; use MambaAttribution or RawAttention."
            )
        scan = layer.scan.map_tensors(Tensor.detach)
        self.scan = scan if skip else scan.replace(D=None)
        self._calls = [
            _Call(call.module, call.x.detach().to(dtype), call.p.detach().to(dtype))
            for call in recorder.convolutions.get(layer.scan, ())
        ]
        self._require_known()
        self._p = self._in_source(lambda call: call.p)
        # silu(p) / p tends to 1/2 where p tends to 0, and 0 / 0 would be NaN
        away = self._p.abs() >= torch.finfo(dtype).eps
        ratio = torch.where(away, scan.source_u / torch.where(away, self._p, 1), 0.5)
        self._ratio = ratio if activation else torch.ones_like(ratio)
        # a gate after a norm, as in VMamba's first generation, is not part of a linear map
        self._gate = scan.gate.to(dtype) if gate and scan.gate is not None and layer.scan in recorder.gated else None

    @cached_property
    def x(self) -> Float[Tensor, "batch channels tokens"]:
        """What the convolution receives, in the token frame."""
        x = self._calls[0].x
        if x.ndim == 4:
            return x.flatten(2)
        return torch.zeros_like(x).index_copy(2, self.scan.read_order[0], x)

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
        rows = row_weight if self._gate is None else row_weight * self._gate
        tokens = self.scan.tokens
        total = rows.new_zeros(rows.shape[0], tokens, tokens)
        for taps in self._taps():
            part = self.scan.select_routes(taps.routes)
            ratio, skip = self._ratio_of(taps), self._skip_of(part)
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
    def _bias(call: _Call) -> Tensor:
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
        return y if self._gate is None else y * self._gate

    def _in_source(self, tensor: Callable[[_Call], Tensor]) -> Float[Tensor, "batch _ channels positions"]:
        """One tensor per convolution, as the scan's input stands."""
        if self._calls[0].x.ndim == 4:
            return tensor(self._calls[0]).flatten(2).unsqueeze(1)
        return torch.stack([tensor(call)[..., : self.scan.length] for call in self._calls], dim=1)

    def _taps(self) -> Iterator[Taps]:
        tokens, device = self.scan.tokens, self.x.device
        if self._calls[0].x.ndim == 4:
            (call,) = self._calls
            height, width = call.x.shape[2:]
            place = torch.arange(tokens, device=device).view(height, width)
            yield shifts(slice(None), call.module, place, conv=self.conv)
            return
        for route, call in enumerate(self._calls):
            order = self.scan.read_order[route]
            taps = shifts(slice(route, route + 1), call.module, order, conv=self.conv)
            step = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=device))
            yield Taps(taps.routes, taps.weight, taps.source[:, step], taps.inside[:, step])

    def _ratio_of(self, taps: Taps) -> Tensor:
        """In the token frame."""
        if self._ratio.shape[1] == 1 and self._calls[0].x.ndim == 4:
            return self._ratio[:, 0]
        ratio = self._ratio[:, taps.routes][:, 0]
        return torch.zeros_like(ratio).index_copy(2, self.scan.read_order[taps.routes][0], ratio)

    def _skip_of(self, part: ScanRecord) -> Tensor | None:
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
                f"ImplicitAttention: {self.layer.name} is no mixer of Vim or VMamba, with one depthwise convolution "
                "per route or one over the grid before the scans; use MambaAttribution or RawAttention, or name other "
                "layers with layers=."
            )


class _Weighted(NamedTuple):
    """W = sum_c rows_c[i] M_c[i, j] columns_c[j] of one layer."""

    layer: ScanLayer
    implicit: Implicit
    rows: Float[Tensor, "batch channels tokens"]
    columns: Float[Tensor, "batch channels tokens"]

    def row(self, vector: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """Return vector W, in linear time."""
        product: Tensor = self.implicit.rows(vector.unsqueeze(1).to(self.rows) * self.rows) * self.columns
        return product.sum(1)

    def matrix(self) -> Float[Tensor, "batch tokens tokens"]:
        """Return W of the layer, (batch, tokens, tokens)."""
        return self.implicit.matrix(self.rows, self.columns)
