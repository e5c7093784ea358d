"""LibraGrad: balanced gradients of a transformer, and the maps that its authors make of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.lrp.linear_backward import LinearisedAttribution
from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.lrp.relevance_rules import LRPRules
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.errors import nearest
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames
from mamba_attn.tracing.layers import require
from mamba_attn.tracing.softmax_layers import AttentionLayer
from mamba_attn.tracing.tracer import Trace

COMBINATIONS = ("input_x_gradient", "full_gradient", "full_gradient_plus")


class LibraGrad(LinearisedAttribution):
    """Contributions of the tokens by gradients that are balanced: LibraGrad (arXiv 2411.16760, CVPR 2025); signed.

    The forward pass is the model's own. Backward paths are pruned or scaled until what leaves a layer is what entered
    it: probabilities of the attention, denominators of norms and the ratios f(x) / x of activations are held fixed
    (pruned), and a product of two branches hands half to each (scaled). The network is then affine in its tokens, so
    that tokens and biases add up to the logit (FullGrad-completeness); every call checks this. Of these gradients:

    ==========================  =======================================================================================
    ``combine``                 map of token i
    ==========================  =======================================================================================
    ``"input_x_gradient"``      E[i] . dlogit/dE[i], E the tokens that enter the first layer; what
                                ``FrozenContribution(positions=True)`` shows, but for products of branches
    ``"full_gradient"``         the same plus b . dlogit/dy[i] of every bias b that is added to y[i] after it
    ``"full_gradient_plus"``    the sum of the first over all layers, in place of the first layer's alone, plus the
                                biases; divided by the number of layers
    ==========================  =======================================================================================

    Biases that belong to no single token (of a head, of a norm after pooling) are in no map. ``contributions`` gives
    the summands.

    Args:
        model: a model of softmax attention that ``mamba_attn.trace`` supports by an adapter.
        layers: names, patterns or numbers of attention layers, in place of the first or, for ``full_gradient_plus``,
            of all; the biases are those after the first of them.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        combine: one of the above.

    Raises:
        ValueError: another ``combine``; when called, a pixel or box.
        UnsupportedModelError: when called, layers that are selective scans.
        TraceError: when called, contributions that do not add up, and in which modules; an output of probabilities.

    Example:
        >>> LibraGrad(vit).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    takes_parts: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        combine: str = "full_gradient_plus",
    ) -> None:
        if combine not in COMBINATIONS:
            raise ValueError(f"LibraGrad(combine={combine!r}): {nearest(combine, COMBINATIONS)}")
        every = layers is None and combine == "full_gradient_plus"
        super().__init__(model, layers="*" if every else layers, layout=layout, orders=orders)
        self.combine = combine

    def contributions(
        self, inputs: Tensor, target: Target = None
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"], Float[Tensor, " batch"]]:
        """Return what tokens, the biases added at each token, and the other biases contribute; they sum to the logit.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch, or the target is not a class.
        """
        rules = LibraRules(self.model)
        (first, *_), constants = self._called_with("contributions", inputs)._entrances(inputs, target, rules)
        biases = rules.of_tokens(first.shares)
        return first.shares, biases, torch.stack(list(constants.values())).sum(0) - biases.sum(1)

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        rules = LibraRules(self.model)
        entrances, _ = self._entrances(inputs, target, rules)
        rows = [(entrance.layer.layout, entrance.shares) for entrance in entrances]
        if self.combine == "input_x_gradient":
            return rows
        biases = rules.of_tokens(entrances[0].shares) / len(rows)  # maps are averaged
        return [(layout, shares + biases) for layout, shares in rows]

    def _rules(self) -> LinearRules:
        return LibraRules(self.model)

    def _check(self, record: Trace) -> None:
        require("LibraGrad", record.layers, AttentionLayer)


class LibraRules(LRPRules):
    """The rules of LRP with the attention's probabilities fixed; they keep biases token by token.

    Args:
        model: provides the names of its modules.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, called="LibraGrad")
        self._by_token: dict[str, list[Tensor]] = {}

    def attention(self, record: AttentionRecord) -> AttentionRecord:
        """Detach the probabilities: what is read counts, why it is read does not."""
        return replace(record, probabilities=record.probabilities.detach())

    def added(self, name: str, y: Tensor, constant: Tensor) -> Tensor:
        """Record the constant's share, and, where y holds tokens, that of every token."""
        y = super().added(name, y, constant)
        if y.requires_grad and y.ndim == 3:
            fixed, kept = constant.detach(), self._by_token

            def note(gradient: Tensor) -> None:
                product = gradient * fixed
                kept.setdefault(name, []).append(
                    product.sum(2, dtype=torch.promote_types(product.dtype, torch.float32))
                )

            y.register_hook(note)
        return y

    def starts(self, tensors: Sequence[Tensor]) -> None:
        """Forget what was recorded before: the backward pass that counts comes next."""
        self._by_token.clear()

    def of_tokens(self, shares: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """Return the sum of the constants that were added at each token.

        Args:
            shares: of the tokens, for their number.
        """
        found = (each for name in self.constants for each in self._by_token.get(name, ()))
        return sum((each for each in found if each.shape == shares.shape), torch.zeros_like(shares))
