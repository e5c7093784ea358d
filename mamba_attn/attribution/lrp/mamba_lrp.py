"""MambaLRP: layer-wise relevance propagation through selective scans."""

from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.lrp.relevance_rules import LRPRules, RelevancePropagation
from mamba_attn.tracing.layers import ScanLayer, require
from mamba_attn.tracing.tracer import Trace


class MambaLRP(RelevancePropagation):
    """Relevance of the tokens after the patch embedding for a class: MambaLRP (arXiv 2406.07592); signed.

    R[i] = sum over features of E[i] * dlogit/dE[i], E the tokens that enter the first layer (patches with their
    position embeddings; in VMamba the tokens after the stem). The forward pass is the model's own; the gradient
    follows these rules, which propagate relevance layer by layer without creating or losing any:

    ===============  ==================================================================================================
    SiLU, GELU       y = x [act(x) / x] with the ratio fixed, in the MLPs too
    selective scan   linear in u: delta, A, B, C fixed, D u kept
    gate             y * act(z): half of the relevance to each factor, none fixed
    norms            LN-rule: the denominator is fixed, the mean of a layer norm is linear and stays
    linear, conv     LRP-0, the plain gradient; or, for ``gamma_layers``, the generalised gamma rule
    ===============  ==================================================================================================

    Stabilisers: act(x) / x is taken at +-eps, the precision's epsilon, where x is smaller; the gamma rule propagates
    nothing where its denominator, and hence the output, is exactly 0. There are no others, so relevance is conserved:
    R summed over all tokens plus the relevance kept by biases is the logit. Every call checks this, and names the
    modules in which relevance escapes. Other code than the families' is met where it calls functions of torch, compiled
    scans, fused convolutions and fused norms: softmax, sigmoid and denominators are fixed there, and a product of two
    tensors that depend on the image gives half to each.

    Not copied from the published code: a gamma rule that raises NameError on linear layers and yields NaN where its
    denominator is 0; a ratio taken at x + 1e-6 sign(x), which loses relevance near 0; an empty list of rules, which
    leaves plain gradient x input; a fast path that skips the rule of SiLU; biases set to zero, which changes the model;
    the restriction to one model and one device.

    The class token's relevance is not part of the map; ``relevances`` reports it.

    Args:
        model: a model of selective scans that ``mamba_attn.trace`` supports, with or without an adapter.
        layers: names, patterns or numbers of mixers; relevance is read before them and the maps averaged. Default: the
            first one.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        gamma_layers: names or patterns of linear layers and convolutions with the generalised gamma rule, e.g.
            ``"layers.*.in_proj"``. Default: none, LRP-0 everywhere.
        gamma: of that rule, at least 0; 0 is LRP-0.

    Raises:
        ValueError: a gamma below 0, a pattern that matches no linear layer; when called, a pixel or box.
        UnsupportedModelError: when called, layers that are softmax attention; batch statistics; ``gamma_layers`` that
            fused code does not call.
        TraceError: when called, relevance that is not conserved, and in which modules; an output of probabilities.

    Example:
        >>> MambaLRP(model, gamma_layers=["*.in_proj", "*.out_proj"]).attribute(images, target=281).shape
        torch.Size([2, 1, 224, 224])
    """

    def _rules(self) -> LinearRules:
        return LRPRules(self.model, self.gamma_layers, self.gamma)

    def _check(self, record: Trace) -> None:
        require("MambaLRP", record.layers, ScanLayer)
