"""Base class of MambaLRP and FrozenContribution: one backward pass through linear rules, and a check of its sum."""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.core.tf32 import tf32_allowed
from mamba_attn.errors import TraceError
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.escapes import Meter
from mamba_attn.tracing.layer_names import LayerNames, layer_names, listed_layers
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.module_rules import Asked
from mamba_attn.tracing.tracer import Trace

# relative to all shares: rounding leaves 1e-7, one GELU that escapes the rules 1e-3. float64 models may compute in
# float32 somewhere
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.3}
_TF32 = 1e-3


class Entrance(NamedTuple):
    """The input of one layer, and the gradient there.

    Args:
        layer: the layer.
        tokens: including their residual stream.
        gradient: of the logit, through the linear rules.
    """

    layer: Layer
    tokens: Float[Tensor, "batch tokens features"]
    gradient: Float[Tensor, "batch tokens features"]

    @property
    def shares(self) -> Float[Tensor, "batch tokens"]:
        """The share of each token: the sum over features of tokens * gradient."""
        product = self.tokens * self.gradient
        return product.sum(-1, dtype=torch.promote_types(product.dtype, torch.float32))


class LinearisedAttribution(TokenAttribution):
    """Shares of the tokens in a logit, from one backward pass through a forward pass that rules make linear.

    Args:
        model: a model that ``mamba_attn.trace`` supports.
        layers: names, patterns or numbers of mixers; shares are read before them and the maps averaged. The rules apply
            to all mixers in any case. Default: the first one, after the patch embedding.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
    """

    reads_rows: ClassVar[bool] = False
    reads_traces: ClassVar[bool] = False  # its rules change the pass
    takes_parts: ClassVar[bool] = False  # shares add up over all that the model is given

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
    ) -> None:
        super().__init__(model, layout=layout, orders=orders)  # traces all layers
        self.before = listed_layers(f"{type(self).__name__}(layers=...)", layers)

    @abstractmethod
    def _rules(self) -> LinearRules:
        """Return the rules of one pass."""

    def _check(self, record: Trace) -> None:
        """Refuse layers that the method does not support."""

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        rules = self._rules()
        entrances, _ = self._entrances(inputs, target, rules)
        return [(entrance.layer.layout, self._row(entrance, rules)) for entrance in entrances]

    def _row(self, entrance: Entrance, rules: LinearRules) -> Float[Tensor, "batch tokens"]:
        """Return the numbers of the map."""
        return entrance.shares

    def _entrances(
        self, inputs: Tensor, target: Target, rules: LinearRules
    ) -> tuple[list[Entrance], dict[str, Float[Tensor, " batch"]]]:
        """Return the inputs of the chosen layers with gradients, and the constants' shares after the first of them.

        Where something reaches the target without passing the first layer, as over a U-Net's skip connections, its
        share stands among the constants', and the sum is checked at what the model was given.

        Raises:
            TraceError: the shares do not sum to the logit; the input of a layer is not a tensor of its tokens.
        """
        rules.batch = len(inputs)
        with self._traced(inputs, target, gradients=True, rules=rules) as (record, logit):
            self._check(record)
            rules.require_asked(logit)
            chosen = self._chosen(record)
            found = [self._entering(record, name, logit) for name in chosen]
            rules.starts(found[0][0])
            rules.constants.clear()
            flat = [tensor for tensors, _ in found for tensor in tensors]
            gradients = iter(torch.autograd.grad(logit, flat, retain_graph=not found[0][1], allow_unused=True))
            entrances = []
            for name, (tensors, _) in zip(chosen, found, strict=True):
                pairs = [(tensor, next(gradients)) for tensor in tensors]
                if all(gradient is None for _, gradient in pairs):
                    raise TraceError(f"{type(self).__name__}: the target does not depend on what enters {name}.")
                pairs = [(t, torch.zeros_like(t) if g is None else g) for t, g in pairs]
                parts = [[token_frame(record[name], x).detach() for x in each] for each in zip(*pairs, strict=True)]
                entrances.append(Entrance(record[name], *(torch.cat(each, -1) for each in parts)))
                record[name].require_finite()
            constants, gap = self._summed(record, entrances[0], rules, logit, whole=found[0][1])
        if gap is not None:
            raise TraceError(f"{type(self).__name__}: {self._escaped(inputs, target, gap)}")
        return entrances, constants

    def _summed(
        self, record: Trace, entrance: Entrance, rules: LinearRules, logit: Tensor, *, whole: bool
    ) -> tuple[dict[str, Tensor], "_Gap | None"]:
        """Return the constants' shares, and by how much the sum misses the target, if it does."""
        shares, constants = entrance.shares, dict(rules.constants)
        if whole:
            return constants, self._gap(shares, entrance.tokens.dtype, constants, logit)
        rules.constants.clear()
        starts = _asked(record).arrivals.sources.tensors
        found = torch.autograd.grad(logit, starts, allow_unused=True)
        given = [(t.detach() * g) for t, g in zip(starts, found, strict=True) if g is not None]
        start = torch.stack([each.double().reshape(rules.batch, -1).sum(1) for each in given]).sum(0)
        everything = {name: share.detach() for name, share in rules.constants.items()}
        rest = sum([*everything.values(), *(-share.detach() for share in constants.values())], start - shares.sum(1))
        gap = self._gap(start, entrance.tokens.dtype, everything, logit)
        return {**constants, f"what does not pass {entrance.layer.name}": rest}, gap

    def _entering(self, record: Trace, name: str, logit: Tensor) -> tuple[list[Tensor], bool]:
        """Return the tensors that hold a layer's tokens, and whether all of the target came through them."""
        layer, layers = record[name], record.layers
        arrivals, functions = _asked(record).arrivals, _asked(record).functions
        if logit not in arrivals.sources:
            raise TraceError(f"{type(self).__name__}: {_why_not(functions.last_probabilities)}")
        earlier = layers[: [each.name for each in layers].index(name)]
        return arrivals.entrance(layer, earlier, logit, lambda tensor: holds_tokens(layer, tensor))

    def _chosen(self, record: Trace) -> list[str]:
        call = f"{type(self).__name__}(layers=...)"
        asked = list(record)[:1] if self.before is None else layer_names(call, self.before, record.names)
        chosen = [name for name in record if name in asked]
        if not chosen:
            raise TraceError(f"{call}: the model's forward called none of {', '.join(asked)}.")
        return chosen

    def _gap(self, shares: Tensor, dtype: torch.dtype, constants: dict[str, Tensor], logit: Tensor) -> "_Gap | None":
        """Return by how much the shares miss the logit, if by more than rounding: something escaped the rules."""
        parts = [part.detach().double() for part in (shares, *constants.values())]
        total, size = sum(float(part.sum()) for part in parts), sum(float(part.abs().sum()) for part in parts)
        tolerance = max(_TOLERANCE[each] for each in (dtype, logit.dtype, _autocast(shares.device.type)))
        tolerance = max(tolerance, _TF32) if shares.is_cuda and tf32_allowed() else tolerance
        value = float(logit.detach())
        allowed = tolerance * max(size, abs(value))
        return None if abs(total - value) <= allowed else _Gap(total, value, allowed)

    def _escaped(self, inputs: Tensor, target: Target, gap: "_Gap") -> str:
        """Say where relevance was lost, module by module, in a further pass."""
        rules, meter = self._rules(), Meter(self.model)
        rules.batch = len(inputs)
        with meter.measuring(), self._traced(inputs, target, gradients=True, rules=rules) as (record, logit):
            starts = _asked(record).arrivals.sources.tensors
            rules.constants.clear()
            torch.autograd.grad(logit, starts, allow_unused=True)
        leaks = meter.leaks(rules.constants, gap.allowed)
        where = ", ".join(leaks[:3]) + (f" and {len(leaks) - 3} more" if len(leaks) > 3 else "")
        reason = (
            f"so something escaped the rules in {where}: a norm, an activation or a gate that is no function of torch, "
            "an autograd.Function whose backward pass is not that of a linear map, or constants that are written into "
            "its tensors"
            if leaks
            else "though no module lost any: the target is not linear in the output; explain the logit itself"
        )
        return f"the shares of tokens and constants sum to {gap.total:.6g}, the target to {gap.value:.6g}, {reason}."


class _Gap(NamedTuple):
    """What the shares sum to, the target, and by how much they may differ."""

    total: float
    value: float
    allowed: float


def _why_not(function: str) -> str:
    """Why a target has no shares."""
    if not function:
        return "the target does not depend on what the model was given, or is not differentiable."
    return (
        f"the output comes out of {function}, and a probability is no sum of what tokens contribute; explain the logit "
        "in front of it: let the model return its logits, e.g. with nn.Identity() in that layer's place."
    )


def _asked(record: Trace) -> Asked:
    if record.asked is None:
        raise TraceError("the pass was traced without rules for the whole model.")
    return record.asked


def _autocast(kind: str) -> torch.dtype:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float64


def holds_tokens(layer: Layer, x: Tensor) -> bool:
    """Whether a tensor holds a feature vector for every token of a layer, in a shape that ``token_frame`` takes."""
    if x.ndim == 3:
        windows = len(layer.layout.windows()) if layer.has_layout else 1
        if x.shape[0] != layer.batch * windows:
            return False
        return windows * x.shape[1] in (layer.tokens, layer.tokens - layer.padding) or _features_first(layer, x)
    if not layer.has_layout or x.ndim < 4 or len(x) != layer.batch:
        return False
    return layer.layout.grid in (tuple(x.shape[1:-1]), tuple(x.shape[2:]))


def token_frame(layer: Layer, x: Tensor) -> Float[Tensor, "batch tokens features"]:
    """Convert tokens to the token frame, from windows, (batch, *grid, features) or features first."""
    if x.ndim == 3:
        x = x.mT if _features_first(layer, x) and x.shape[1] != layer.tokens else x
        if len(x) == layer.batch and x.shape[1] < layer.tokens:
            return F.pad(x, (0, 0, 0, layer.tokens - x.shape[1]))
        return layer.layout.from_windows(x, axis=1) if layer.has_layout else x
    layout = layer.layout
    patches = x.flatten(1, -2) if layout.grid == tuple(x.shape[1:-1]) else x.flatten(2).mT
    frame = patches.new_zeros(len(patches), layout.tokens, patches.shape[2])  # windows may be padded
    return frame.index_copy(1, layout.patches.to(x.device), patches)


def _features_first(layer: Layer, x: Tensor) -> bool:
    """Whether a tensor is (batch, features, tokens)."""
    return len(x) == layer.batch and x.shape[2] in (layer.tokens, layer.tokens - layer.padding)
