"""FrozenContribution: gradient x input of the tokens, through a forward whose factors are held fixed."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.lrp.linear_backward import Entrance, LinearisedAttribution
from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.maps import Target
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.layer_names import LayerNames


class Contributions(NamedTuple):
    """What a logit is the sum of.

    Args:
        tokens: the patches without their position embeddings; class tokens and registers with theirs.
        positions: the patches' position embeddings; 0 for the other tokens.
        biases: every other additive constant, by its name.
        layout: where the tokens sit.
    """

    tokens: Float[Tensor, "batch tokens"]
    positions: Float[Tensor, "batch tokens"]
    biases: dict[str, Float[Tensor, " batch"]]
    layout: TokenLayout

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The logit."""
        tokens = (self.tokens + self.positions).sum(1)
        return torch.stack([tokens, *self.biases.values()]).sum(0)


class FrozenContribution(LinearisedAttribution):
    """The share of every token in a logit when all that multiplies the tokens is held fixed; signed, and adds up.

    This is gradient x input, of the tokens behind the patch embedding, with frozen factors. Held at their values in
    this forward pass:

    ===========  ======================================================================================================
    scans        delta, A, B, C; D u stays (linear)
    gates        the gate itself, act(z) (in a ViT with gated attention, its sigmoid): all of a product goes to the
                 other factor, the scans' output
    attention    the softmax probabilities: what is read counts, why it is read does not
    norms        the denominator; the mean of a layer norm is linear and stays
    activations  the ratio act(x) / x, taken at +-eps, the precision's epsilon, where x is smaller
    ===========  ======================================================================================================

    The network is then affine in its tokens, so one backward pass gives the exact share of each in the logit: the
    shares of patches, position embeddings, class token and biases are the logit (``contributions``; every call checks
    the sum). Exact they are for the frozen network: how a token changes gates, steps or attention is left out. That is
    where ``MambaLRP``, which lets relevance through the gates too, differs.

    The map shows the patches without their position embeddings, which are no part of the image.

    Args:
        model: a model that ``mamba_attn.trace`` knows, of scans or softmax attention, with fused_add_norm=False where
            it has that.
        layers: names, patterns or numbers of mixers, before which the shares are read; maps averaged. Default: the
            first one.
        positions: add to each patch the share of its position embedding.

    Raises:
        ValueError: when called, a pixel or box.
        UnsupportedModelError: when called, norms that no rule is known for.
        TraceError: when called, shares that do not add up, because something escaped the rules.

    Example:
        >>> FrozenContribution(model).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(self, model: nn.Module, *, layers: LayerNames | None = None, positions: bool = False) -> None:
        super().__init__(model, layers=layers)
        self.positions = positions

    def contributions(self, inputs: Tensor, target: Target = None) -> Contributions:
        """Return everything that the target logit is the sum of, image by image, before the first of ``layers``.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``.

        Raises:
            ValueError: inputs that are no batch, a target that is no class.
        """
        self._size("contributions", inputs)
        rules = FrozenRules(self.model)
        (first, *_), biases = self._entrances(inputs, target, rules)
        positions = rules.position_shares(first)
        return Contributions(first.shares - positions, positions, biases, first.layer.layout)

    def _row(self, entrance: Entrance, rules: LinearRules) -> Float[Tensor, "batch tokens"]:
        if self.positions or not isinstance(rules, FrozenRules):
            return entrance.shares
        return entrance.shares - rules.position_shares(entrance)

    def _rules(self) -> LinearRules:
        return FrozenRules(self.model)


class FrozenRules(LinearRules):
    """The linear rules with gates and attention probabilities fixed too.

    Args:
        model: whose modules get names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._stem: Tensor | None = None
        self._first = ""

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Multiply by a fixed gate."""
        return y * gate.detach()

    def attention(self, record: AttentionRecord) -> AttentionRecord:
        """Fix the probabilities."""
        return replace(record, probabilities=record.probabilities.detach())

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Normalise by a fixed denominator."""
        return self._before_layers(super().norm(module, x, call))

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a linear layer."""
        return self._before_layers(super().linear(module, x, call))

    def position_shares(self, entrance: Entrance) -> Float[Tensor, "batch tokens"]:
        """Return the share of what was added to the patches behind the patch embedding; zeros where nothing was."""
        layout, shares = entrance.layer.layout, torch.zeros_like(entrance.shares)
        tokens, gradient = (part[:, layout.patches.to(part.device)] for part in (entrance.tokens, entrance.gradient))
        stem = self._stem
        if stem is None or stem.ndim != 4 or entrance.layer.name != self._first:
            return shares  # embeddings of patches that are no convolution's, or read before a later layer
        patches = stem.flatten(2).mT if tuple(stem.shape[2:]) == layout.grid else stem.flatten(1, 2)
        if patches.shape != tokens.shape:
            return shares
        added = Entrance(entrance.layer, tokens - patches.to(tokens.dtype), gradient).shares
        return shares.index_copy(1, layout.patches.to(shares.device), added)

    def enter(self, layer: str, x: Tensor) -> None:
        """Keep what entered, and who was first."""
        self._first = layer if not self.entered else self._first
        super().enter(layer, x)

    def _before_layers(self, y: Tensor) -> Tensor:
        """Keep the last output before the first layer: the patch embedding's."""
        if not self.entered:
            self._stem = y.detach()
        return y
