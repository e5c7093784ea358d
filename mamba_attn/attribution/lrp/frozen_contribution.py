"""FrozenContribution: gradient x input of the tokens, through a forward whose factors are held fixed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.lrp.linear_backward import Entrance, LinearisedAttribution
from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.targets import Target
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.tracing.dependence import behind
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames


class Contributions(NamedTuple):
    """The summands of a logit.

    Args:
        tokens: the patches without their position embeddings; class tokens and registers with theirs.
        positions: the patches' position embeddings; 0 for the other tokens.
        biases: every other additive constant, by its name, and what reaches the logit without passing the first layer,
            as over skip connections.
        layout: of the tokens.
    """

    tokens: Float[Tensor, "batch tokens"]
    positions: Float[Tensor, "batch tokens"]
    biases: dict[str, Float[Tensor, " batch"]]
    layout: TokenLayout

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The sum of all contributions: the logit."""
        tokens = (self.tokens + self.positions).sum(1)
        return torch.stack([tokens, *self.biases.values()]).sum(0)


class FrozenContribution(LinearisedAttribution):
    """The contribution of every token to a logit when everything that multiplies the tokens is held fixed; signed.

    This is gradient x input of the tokens after the patch embedding, with frozen factors. Held at their values in this
    forward pass:

    ===========  ======================================================================================================
    scans        delta, A, B, C; D u stays (linear)
    gates        the gate itself, act(z) (in a ViT with gated attention, its sigmoid): all of a product goes to the
                 other factor, the scans' output
    attention    the softmax probabilities: what is read counts, why it is read does not
    norms        the denominator; the mean of a layer norm is linear and stays
    activations  the ratio act(x) / x, taken at +-eps, the precision's epsilon, where x is smaller
    ===========  ======================================================================================================

    The network is then affine in its tokens, so one backward pass gives the exact contribution of each to the logit:
    those of patches, position embeddings, class token and biases sum to the logit (``contributions``; every call checks
    this). They are exact for the frozen network and ignore how a token changes gates, steps or attention. ``MambaLRP``
    differs here: it lets relevance through the gates too.

    The map shows the patches without their position embeddings, which are not part of the image.

    Args:
        model: a model that ``mamba_attn.trace`` supports, of scans or softmax attention, with or without an adapter. In
            code that no adapter knows the gate of a product is what comes out of an activation, else the second factor.
        layers: names, patterns or numbers of mixers; contributions are read before them and the maps averaged.
            Default: the first one.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        positions: add to each patch the contribution of its position embedding.

    Raises:
        ValueError: when called, a pixel or box.
        UnsupportedModelError: when called, batch statistics.
        TraceError: when called, contributions that do not add up, because something escaped the rules, and where; an
            output of probabilities.

    Example:
        >>> FrozenContribution(model).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        positions: bool = False,
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        self.positions = positions

    def contributions(self, inputs: Tensor, target: Target = None) -> Contributions:
        """Return all summands of the target logit, per image, before the first of ``layers``.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch, or the target is not a class.
        """
        rules = FrozenRules(self.model)
        (first, *_), biases = self._called_with("contributions", inputs)._entrances(inputs, target, rules)
        positions = rules.position_shares(first)
        return Contributions(first.shares - positions, positions, biases, first.layer.layout)

    def _row(self, entrance: Entrance, rules: LinearRules) -> Float[Tensor, "batch tokens"]:
        if self.positions or not isinstance(rules, FrozenRules):
            return entrance.shares
        return entrance.shares - rules.position_shares(entrance)

    def _rules(self) -> LinearRules:
        return FrozenRules(self.model)


class FrozenRules(LinearRules):
    """The linear rules, with gates and attention probabilities fixed too.

    Args:
        model: provides the names of its modules.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._outputs: list[tuple[Tensor, Any]] = []
        self._first = ""
        self._stem: Tensor | None = None

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Multiply by the gate without its gradient."""
        return y * gate.detach()

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an activation, whose output is known again as a gate."""
        y = super().activation(function, x)
        node: Any = y.grad_fn
        if node is not None:
            node.metadata[_GATE] = True
        return y

    def product(self, function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        """Apply it without the gradient of the gate: what comes out of an activation, else the second factor."""
        return function(a.detach(), b) if _is_gate(a) and not _is_gate(b) else function(a, b.detach())

    def attention(self, record: AttentionRecord) -> AttentionRecord:
        """Detach the probabilities: relevance passes through the values only."""
        return replace(record, probabilities=record.probabilities.detach())

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Normalise by a fixed denominator."""
        return self._before_layers(super().norm(module, x, call))

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a linear layer."""
        return self._before_layers(super().linear(module, x, call))

    def position_shares(self, entrance: Entrance) -> Float[Tensor, "batch tokens"]:
        """Return the contribution of what was added to the patches after the patch embedding; zeros if nothing was."""
        layout, shares = entrance.layer.layout, torch.zeros_like(entrance.shares)
        tokens, gradient = (part[:, layout.patches.to(part.device)] for part in (entrance.tokens, entrance.gradient))
        stem = self._stem
        if stem is None or stem.ndim != 4 or entrance.layer.name != self._first:
            return shares  # patches not embedded by a convolution, or contributions read before a later layer
        patches = stem.flatten(2).mT if tuple(stem.shape[2:]) == layout.grid else stem.flatten(1, 2)
        if patches.shape != tokens.shape:
            return shares
        added = Entrance(entrance.layer, tokens - patches.to(tokens.dtype), gradient).shares
        return shares.index_copy(1, layout.patches.to(shares.device), added)

    def enter(self, layer: str, x: Tensor) -> None:
        """Remember which layer came first."""
        self._first = self._first or layer

    def starts(self, tensors: Sequence[Tensor]) -> None:
        """The patch embedding's output is the last of a norm or a linear layer that these were computed from."""
        nodes = behind(tensors)
        self._stem = next((y for y, node in reversed(self._outputs) if node in nodes), None)
        self._outputs.clear()

    def _before_layers(self, y: Tensor) -> Tensor:
        """Record outputs before the first layer."""
        if not self._first:
            self._outputs.append((y.detach(), y.grad_fn))
        return y


def _is_gate(x: Tensor) -> bool:
    """Whether a tensor is an activation's output, perhaps in another shape."""
    node: Any = x.grad_fn
    while node is not None and _GATE not in node.metadata:
        node = node.next_functions[0][0] if node.name().startswith(_SHAPES) and node.next_functions else None
    return node is not None


_GATE = "mamba_attn: an activation"
_SHAPES = (
    "ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "PermuteBackward", "TransposeBackward", "TBackward",
    "UnsqueezeBackward", "SqueezeBackward", "ExpandBackward", "CloneBackward", "ToCopyBackward", "SplitBackward",
    "SliceBackward", "SelectBackward", "AliasBackward",
)  # fmt: skip
