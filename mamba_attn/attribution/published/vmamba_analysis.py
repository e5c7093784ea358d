"""VMamba's own analysis map and rollout (arXiv 2401.10166, its analysis script), as a baseline to compare with.

Kept, because they are the baseline: exp(cumsum) apart for queries and keys with a clamp at 1e-20, which is wrong once
sum(delta |A|) passes 46; the signed mean over channels; structural zeros inside the minimum and maximum; a rollout that
divides columns, not rows, by the row sums. Not kept, because the maps' definition does not ask for them: square grids
only, a minimum and maximum over the whole batch, the first image alone.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.published.hidden_mamba import min_max
from mamba_attn.attribution.queries import Query, query_weights
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.ops.reference import merge
from mamba_attn.tracing.adapters import find_mixers
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import ScanLayer, require

_STAGE, _BLOCK = 2, 1  # the third stage's second block, which the published script shows


class _AnalysisAttribution(TokenAttribution):
    """What the two maps share.

    Args:
        model: a VMamba.
        layers: names, patterns or numbers of the mixers to use.
        steps: with the steps delta in the keys, "CwBdtw" in the script; without, "CwBw".

    Raises:
        ValueError: when called, a model that is not VMamba.
    """

    def __init__(self, model: nn.Module, *, layers: LayerNames | None = None, steps: bool = False) -> None:
        super().__init__(model, layers=layers)
        self.steps = steps

    def _scaled_map(self, layer: ScanLayer) -> Float[Tensor, "batch tokens tokens"]:
        """The analysis map scaled to 0..1, image by image."""
        return min_max(analysis_map(layer, steps=self.steps), (1, 2))

    def _layers(self, inputs: Tensor, target: Target, *, multiplied: bool) -> list[ScanLayer]:
        families = {adapter.family for _, adapter in find_mixers(self.model).values()}
        if families != {"VMamba"}:
            raise ValueError(
                f"{self.called}: this is VMamba's own analysis map, and {type(self.model).__name__} is of the family "
                f"{', '.join(sorted(families))}; use convention='exact'."
            )
        with self._traced(inputs, target, multiplied=multiplied) as (record, _):
            return require(self.called, record.layers, ScanLayer)


class VMambaAnalysisMap(_AnalysisAttribution):
    """The query's row of the analysis map of the third stage's second block, or of every layer named.

    Example:
        >>> from mamba_attn import models
        >>> vmamba = models.create("vmamba_digits", weights="demo")
        >>> VMambaAnalysisMap(vmamba, layers=-1).attribute(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 1, 64, 64])
    """

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        layers = self._layers(inputs, target, multiplied=False)
        if self.layers is None:
            stage = _stage(layers)
            layers = stage[min(_BLOCK, len(stage) - 1) :][:1]
        return [(layer.layout, _times(query_weights(layer, query), self._scaled_map(layer))) for layer in layers]


class VMambaAnalysisRollout(_AnalysisAttribution):
    """The query's row of the rollout over the third stage's blocks, or over the layers named, which are of one stage.

    Raises:
        ValueError: when called, layers on several grids.

    Example:
        >>> from mamba_attn import models
        >>> vmamba = models.create("vmamba_digits", weights="demo")
        >>> VMambaAnalysisRollout(vmamba, layers=-1).attribute(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 1, 64, 64])
    """

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        layers = self._layers(inputs, target, multiplied=True)
        layers = _stage(layers) if self.layers is None else layers
        if len({layer.layout.grid for layer in layers}) > 1:
            raise ValueError(
                f"{self.called}: this rollout stays within one stage; name the layers of one with layers=."
            )
        row = query_weights(layers[-1], query)
        for layer in reversed(layers):
            row = _times(row, rollout_step(self._scaled_map(layer)))
        return [(layers[0].layout, row)]


def rollout_step(attention: Float[Tensor, "batch tokens tokens"]) -> Float[Tensor, "batch tokens tokens"]:
    """Return (attention + I) / 2 with column j divided by the sum of row j, as published."""
    step = (attention + torch.eye(attention.shape[-1]).to(attention)) / 2
    return step / step.sum(-1).unsqueeze(1)


def analysis_map(layer: ScanLayer, *, steps: bool) -> Float[Tensor, "batch tokens tokens"]:
    """Return (C w)^T (B / w) or, with steps, (C w)^T (B delta / w): w = exp(cumsum(A delta)), channels averaged.

    Lower triangle per route, routes summed in the token frame; see the module for what is wrong with it.

    Args:
        layer: a layer of VMamba.
        steps: with delta.
    """
    layer.require_finite()
    scan = layer.scan
    routes = []
    for route in range(scan.routes):
        part = scan.select_routes(slice(route, route + 1))
        delta, A = part.delta[:, 0].unsqueeze(2), part.A[0].unsqueeze(-1)
        w = (A * delta).cumsum(-1).exp()  # (batch, channels, states, length)
        queries, keys = part.C[:, 0] * w, part.B[:, 0] / w.clamp(min=1e-20)
        keys = keys * delta if steps else keys
        routes.append((queries.flatten(1, 2).mT @ keys.flatten(1, 2)).tril() / scan.channels)
    return merge(scan, torch.stack(routes, dim=1))


def _times(row: Float[Tensor, "batch tokens"], matrix: Float[Tensor, "batch tokens tokens"]) -> Tensor:
    return (row.to(matrix).unsqueeze(1) @ matrix).squeeze(1)


def _stage(layers: Sequence[ScanLayer]) -> list[ScanLayer]:
    """The blocks of the third stage, or of the last where there are fewer."""
    stages = [list(blocks) for _, blocks in groupby(layers, key=lambda layer: layer.layout.grid)]
    return stages[min(_STAGE, len(stages) - 1)]
