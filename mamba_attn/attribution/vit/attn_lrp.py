"""AttnLRP: layer-wise relevance propagation through softmax attention, its queries and keys included."""

from dataclasses import replace

import torch
from torch import Tensor

from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.lrp.relevance_rules import LRPRules, RelevancePropagation
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.tracing.layers import require
from mamba_attn.tracing.softmax_layers import AttentionLayer
from mamba_attn.tracing.tracer import Trace


class AttnLRP(RelevancePropagation):
    """Relevance of the tokens after the patch embedding for a class: AttnLRP (arXiv 2402.05602); signed.

    R[i] = sum over features of E[i] * dlogit/dE[i], E the tokens that enter the first layer (patches with their
    position embeddings). The forward pass is the model's own; the gradient follows the paper's rules (its section 3):

    =============  ====================================================================================================
    products       queries with keys, probabilities with values, a gate with what it multiplies: half of the relevance
                   to each factor (uniform rule, proposition 3.3)
    softmax        p = softmax(s): R(s_j) = s_j (R(p_j) - p_j sum_k R(p_k)), the Taylor expansion at s (proposition
                   3.1). What the expansion leaves over belongs to no token
    activations    y = x [f(x) / x] with the ratio fixed (identity rule)
    norms          the denominator is fixed (identity rule); the mean of a layer norm is linear and stays
    linear, conv   LRP-0, the plain gradient; or, for ``gamma_layers``, the generalised gamma rule, which the paper
                   recommends for vision transformers
    =============  ====================================================================================================

    R summed over all tokens, plus what biases keep and what every softmax leaves over, is the logit; every call checks
    this, and ``bias_relevances`` has the summands. ``LibraGrad`` is the same without a way through the softmax, which
    others call CP-LRP.

    Args:
        model: a model of softmax attention that ``mamba_attn.trace`` supports by an adapter.
        layers: names, patterns or numbers of attention layers; relevance is read before them and the maps averaged.
            Default: the first one.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        gamma_layers: names or patterns of linear layers and convolutions with the gamma rule, e.g. ``"*"``. Default:
            none, LRP-0 everywhere.
        gamma: of that rule, at least 0; 0 is LRP-0.

    Raises:
        ValueError: a gamma below 0, a pattern that matches no linear layer; when called, a pixel or box.
        UnsupportedModelError: when called, layers that are selective scans.
        TraceError: when called, relevance that is not conserved, and in which modules; an output of probabilities.

    Example:
        >>> AttnLRP(vit, gamma_layers="*", gamma=0.05).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    def _rules(self) -> LinearRules:
        return AttnLRPRules(self.model, self.gamma_layers, self.gamma, "AttnLRP")

    def _check(self, record: Trace) -> None:
        require("AttnLRP", record.layers, AttentionLayer)


class AttnLRPRules(LRPRules):
    """The rules of LRP, with a way through the softmax to queries and keys."""

    _layer = ""

    def enter(self, layer: str, x: Tensor) -> None:
        """Remember whose softmax comes next."""
        self._layer = layer

    def attention(self, record: AttentionRecord) -> AttentionRecord:
        """Halve the gradient at both products; record what the softmax leaves over."""
        probabilities = _halved(record.probabilities)  # queries with keys; the scale is a number
        p = probabilities.detach()
        # s minus its mean under p is log p minus its mean, whatever was added to s
        own = torch.special.xlogy(p, p)
        rest = p - (own - p * own.sum(-1, keepdim=True))
        probabilities = self.added(f"{self._layer}.softmax", probabilities, rest)
        return replace(record, probabilities=_halved(probabilities), value=_halved(record.value))


def _halved(x: Tensor) -> Tensor:
    """Return x, with half of the gradient."""
    return 0.5 * x + 0.5 * x.detach()
