"""The three maps of the code published with arXiv 2403.01590, made from the class token's rows; for Vim.

Published code runs one image at a time: where it takes a minimum or a maximum of a tensor, here it is per image.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.attribution.activation_recorder import ActivationRecorder
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.tracing.layers import ScanLayer, require

Vectors = list[Float[Tensor, "batch channels tokens"]]  # the class token's row, layer by layer


class ClassTokenAttribution(TokenAttribution):
    """A map made from the class token's rows in the late layers, computed as in published code.

    Args:
        model: a Vim with one class token.
        layers: names, patterns or numbers of the mixers to use. Default: the late ones, see ``late_layers``.

    Raises:
        ValueError: when called, a model without a class token or with several; a pixel or box.
        UnsupportedModelError: when called, layers that are softmax attention.
    """

    multiplies: ClassVar[bool] = True  # whether the layers' rows are multiplied
    gradients: ClassVar[bool] = False  # whether the map needs the gradients at the mixers' outputs

    @abstractmethod
    def _combine(self, rows: Vectors, gradients: Sequence[Tensor], token: int) -> Float[Tensor, "batch tokens"]:
        """Return the map made from the rows and the gradients at the mixers' outputs."""

    def _recorder(self) -> ActivationRecorder | None:
        """Return the recorder that the rows need; None for none."""
        return None

    def _class_row(
        self, layer: ScanLayer, token: int, recorder: ActivationRecorder | None
    ) -> Float[Tensor, "batch channels tokens"]:
        """Return the class token's row of every channel."""
        return hidden_mamba_row(layer, token)

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        recorder = self._recorder()
        options = {"gradients": self.gradients, "multiplied": self.multiplies}
        with self._traced(inputs, target, rules=recorder, **options) as (record, logit):
            layers = require(self.called, record.layers, ScanLayer)
            token = self._class_token(layers, query)
            found: Mapping[str, Tensor] = record.gradients(logit, of="output") if self.gradients else {}
        chosen = layers if self.layers is not None else late_layers(layers)
        rows = [self._class_row(layer, token, recorder) for layer in chosen]
        return [(chosen[0].layout, self._combine(rows, [found[layer.name] for layer in chosen if found], token))]

    def _class_token(self, layers: Sequence[ScanLayer], query: Query | None) -> int:
        """Return the class token's index; refuse models without one, like VMamba, and pixels or boxes."""
        tokens = layers[0].layout.class_tokens
        if len(tokens) != 1:
            raise ValueError(
                f"{self.called}: this convention reads the class token's row, and {type(self.model).__name__} has "
                f"{len(tokens) or 'no'} class token{'s' if len(tokens) > 1 else ''}; use convention='exact'."
            )
        if query is not None:
            raise ValueError(
                f"{self.called}: this convention computes only the class token's row, not one for {query}; "
                f"leave {query.kind} out, or use convention='exact'."
            )
        return tokens[0]


class HiddenMambaRawAttention(ClassTokenAttribution):
    """Per layer the rows scaled to 0..1 over channels and tokens together, the mean over channels; their mean.

    Example:
        >>> HiddenMambaRawAttention(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """

    multiplies: ClassVar[bool] = False

    def _combine(self, rows: Vectors, gradients: Sequence[Tensor], token: int) -> Float[Tensor, "batch tokens"]:
        return torch.stack([min_max(row, (1, 2)).mean(1) for row in rows]).mean(0).clamp(min=0)


class HiddenMambaAttentionRollout(ClassTokenAttribution):
    """The positive part of the broadcast rollout of the rows' signed means over channels.

    Broadcast: the row stands in all rows of its layer's matrix, see ``broadcast_rollout``.

    Example:
        >>> HiddenMambaAttentionRollout(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """

    def _combine(self, rows: Vectors, gradients: Sequence[Tensor], token: int) -> Float[Tensor, "batch tokens"]:
        return broadcast_rollout([row.mean(1) for row in rows], token).clamp(min=0)


class HiddenMambaAttribution(ClassTokenAttribution):
    """The broadcast rollout of the rows' positive parts, scaled to 0..1 over channels and tokens, channels averaged.

    Each row is multiplied by the weights of the tokens, see ``token_weight``; depends on the class.

    Example:
        >>> HiddenMambaAttribution(model).attribute(images[:1]).shape
        torch.Size([1, 1, 224, 224])
    """

    gradients: ClassVar[bool] = True

    def _combine(self, rows: Vectors, gradients: Sequence[Tensor], token: int) -> Float[Tensor, "batch tokens"]:
        pairs = zip(rows, gradients, strict=True)
        fused = [self._fused(row.clamp(min=0), token_weight(gradient)) for row, gradient in pairs]
        return broadcast_rollout(fused, token).clamp(min=0)

    def _fused(self, positive: Float[Tensor, "batch channels tokens"], weight: Float[Tensor, "batch tokens"]) -> Tensor:
        """Return the vector that fills all rows of the layer's matrix."""
        return min_max(positive, (1, 2)).mean(1) * weight


def hidden_mamba_row(layer: ScanLayer, token: int) -> Float[Tensor, "batch channels tokens"]:
    """Return the class token's row without its own decay and with a zero self term; the two routes are not halved.

    Args:
        layer: the layer.
        token: index of the class token.
    """
    layer.require_finite()
    scan: ScanRecord = layer.scan
    delta, gain = scan.source_delta.clone(), None if scan.source_gain is None else scan.source_gain.clone()
    # delta = 0 at the class token's step does both: exp(0 A) = 1 is no decay, and delta u = 0 writes nothing
    for steps in (delta,) if gain is None else (delta, gain):
        if scan.source_frame == "tokens":
            steps[..., token] = 0
        else:
            steps[(scan.read_order == token).expand_as(steps[:, :, 0]).unsqueeze(2).expand_as(steps)] = 0
    return ops.attention_row(scan.replace(source_delta=delta, source_gain=gain, scale=1.0), row=token, fold="each")


def late_layers(layers: Sequence[ScanLayer]) -> list[ScanLayer]:
    """Return the layers that published code uses: from number round(15 / 24 depth) on, at least the last.

    The published number is 15 of 24. Halves round to even, as Python's ``round`` does.
    """
    return list(layers[min(round(len(layers) * 15 / 24), len(layers) - 1) :])


def token_weight(gradient: Float[Tensor, "batch *grid features"]) -> Float[Tensor, "batch tokens"]:
    """Return the published weight of every token: the gradient's positive part, its largest feature, scaled to 0..1.

    Args:
        gradient: of the target logit with respect to the mixer's output.
    """
    return min_max(gradient.flatten(1, -2).clamp(min=0).amax(2), (1,))


def min_max(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """(values - min) / (max - min) over some axes; 0 where all are equal, where published code has NaN."""
    low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
    spread = high - low
    return (values - low) / torch.where(spread > 0, spread, 1)


def broadcast_rollout(vectors: Sequence[Float[Tensor, "batch tokens"]], token: int) -> Float[Tensor, "batch tokens"]:
    """Return the class token's row of the published rollout, whose matrices hold one vector in all their rows.

    With every row of I + 1 v^T divided by its sum 1 + s, s = sum(v), and the matrices multiplied from the last layer to
    the first, that row is e / prod(1 + s_k) + sum_k v_k / prod_{m <= k}(1 + s_m).

    Args:
        vectors: one per layer, first to last.
        token: index of the class token.
    """
    total = torch.ones_like(vectors[0][:, :1])
    row = torch.zeros_like(vectors[0])
    for vector in vectors:
        total = total * (1 + vector.sum(1, keepdim=True))
        row = row + vector / total
    return row.index_add(1, torch.tensor([token], device=row.device), 1 / total)
