"""Base class of MambaLRP and FrozenContribution: one backward pass through linear rules, and a check of its sum."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.maps import Row, TokenAttribution
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.errors import TraceError
from mamba_attn.tracing.adapters import find_mixers
from mamba_attn.tracing.layer_names import LayerNames, layer_names, listed_layers
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.module_rules import check_rules_apply
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
    """

    reads_rows: ClassVar[bool] = False
    takes_parts: ClassVar[bool] = False  # shares add up over all that the model is given

    def __init__(self, model: nn.Module, *, layers: LayerNames | None = None) -> None:
        super().__init__(model)  # traces all layers
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

        Raises:
            TraceError: the shares do not sum to the logit; the input of a layer is not a tensor of its tokens.
        """
        rules.batch = len(inputs)
        with self._traced(inputs, target, gradients=True, rules=rules) as (record, logit):
            self._check(record)
            chosen = self._chosen(record)
            tensors = [self._tokens(record[name], rules.entered.get(name, ())) for name in chosen]
            gradients = torch.autograd.grad(logit, tensors, allow_unused=True)
            entrances = []
            for name, tensor, gradient in zip(chosen, tensors, gradients, strict=True):
                if gradient is None:
                    raise TraceError(f"{type(self).__name__}: the target does not depend on what enters {name}.")
                parts = (token_frame(record[name], part).detach() for part in (tensor, gradient))
                entrances.append(Entrance(record[name], *parts))
                record[name].require_finite()
            rules.entered.clear()
            self._balance(entrances[0].shares, entrances[0].tokens.dtype, rules.constants, logit)
        return entrances, dict(rules.constants)

    def _chosen(self, record: Trace) -> list[str]:
        call = f"{type(self).__name__}(layers=...)"
        asked = list(record)[:1] if self.before is None else layer_names(call, self.before, record.names)
        chosen = [name for name in record if name in asked]
        if not chosen:
            raise TraceError(f"{call}: the model's forward called none of {', '.join(asked)}.")
        return chosen

    def _tokens(self, layer: Layer, entered: Sequence[Tensor]) -> Tensor:
        """Return the outermost tensor that holds the layer's tokens, which includes their residual stream."""
        for tensor in entered:
            if holds_tokens(layer, tensor):
                return tensor
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in entered) or "nothing"
        raise TraceError(
            f"{type(self).__name__}: what enters {layer.name} and the modules around it ({shapes}) does not have its "
            f"{layer.tokens} tokens, so relevance cannot be read there; choose other layers with layers=."
        )

    def _balance(self, shares: Tensor, dtype: torch.dtype, constants: dict[str, Tensor], logit: Tensor) -> None:
        """Refuse shares that do not sum to the logit: a sign that something escaped the rules."""
        parts = [part.detach().double() for part in (shares, *constants.values())]
        total, size = sum(float(part.sum()) for part in parts), sum(float(part.abs().sum()) for part in parts)
        tolerance = max(_TOLERANCE[each] for each in (dtype, logit.dtype, _autocast(shares.device.type)))
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        tolerance = max(tolerance, _TF32) if shares.is_cuda and tf32 else tolerance
        gap = abs(total - float(logit.detach()))
        if gap > tolerance * max(size, abs(float(logit.detach()))):
            raise TraceError(
                f"{type(self).__name__}: the shares of tokens and constants sum to {total:.6g}, the target to "
                f"{float(logit.detach()):.6g}, so something in {type(self.model).__name__} escaped the rules: a norm, "
                "an activation or a gate called as a function instead of a module, or a target that is not linear in "
                "the output."
            )


def require_known(model: nn.Module) -> None:
    """Refuse a model with norms that have no known rule.

    Raises:
        UnsupportedModelError: the model has such a norm.
    """
    check_rules_apply(model, find_mixers(model), LinearRules(model))


def _autocast(kind: str) -> torch.dtype:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float64


def holds_tokens(layer: Layer, x: Tensor) -> bool:
    """Whether a tensor holds a feature vector for every token of a layer, in a shape that ``token_frame`` takes."""
    if x.ndim == 3:
        windows = len(layer.layout.windows()) if layer.has_layout else 1
        return x.shape[0] * x.shape[1] == layer.batch * layer.tokens and x.shape[0] == layer.batch * windows
    return x.ndim == 4 and layer.layout.grid in (x.shape[1:3], x.shape[2:])


def token_frame(layer: Layer, x: Tensor) -> Float[Tensor, "batch tokens features"]:
    """Convert tokens to the token frame, from windows, (batch, rows, columns, features) or channels first."""
    if x.ndim == 3:
        return layer.layout.from_windows(x, axis=1) if layer.has_layout else x
    layout = layer.layout
    patches = x.flatten(1, 2) if layout.grid == tuple(x.shape[1:3]) else x.flatten(2).mT
    frame = patches.new_zeros(len(patches), layout.tokens, patches.shape[2])  # windows may be padded
    return frame.index_copy(1, layout.patches.to(x.device), patches)
