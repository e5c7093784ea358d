"""Layer-wise relevance propagation: the rules that its methods share, the gamma rule, and their base class."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.lrp.linear_backward import LinearisedAttribution
from mamba_attn.attribution.lrp.linear_rules import (
    LinearRules,
    added_bias,
    bare_layer,
    fitting,
    own_weight,
)
from mamba_attn.attribution.targets import Target
from mamba_attn.errors import UnsupportedModelError, nearest
from mamba_attn.tracing.dependence import behind
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.function_rules import straight
from mamba_attn.tracing.layer_names import ByLayer, LayerNames

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class RelevancePropagation(LinearisedAttribution):
    """Relevance of tokens by rules, with the generalised gamma rule on request.

    Args:
        model: a model that ``mamba_attn.trace`` supports.
        layers: as in ``LinearisedAttribution``.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        gamma_layers: names or patterns of linear layers and convolutions with the gamma rule; others have LRP-0.
        gamma: of that rule, at least 0; 0 is LRP-0.

    Raises:
        ValueError: a gamma below 0, a pattern that matches no linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        gamma_layers: Iterable[str] | str | None = None,
        gamma: float = 0.25,
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        patterns = (gamma_layers,) if isinstance(gamma_layers, str) else tuple(gamma_layers or ())
        check_gamma_layers(type(self).__name__, model, patterns, gamma)
        self.gamma_layers = patterns
        self.gamma = gamma

    def relevances(self, inputs: Tensor, target: Target = None) -> ByLayer[Float[Tensor, "batch tokens"]]:
        """Return the relevance of all tokens, class tokens included, by the names of the layers that they enter.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch, or the target is not a class.
        """
        entrances, _ = self._called_with("relevances", inputs)._entrances(inputs, target, self._rules())
        return ByLayer({entrance.layer.name: entrance.shares for entrance in entrances})

    def bias_relevances(self, inputs: Tensor, target: Target = None) -> dict[str, Float[Tensor, " batch"]]:
        """Return the relevance kept by the biases after the first of ``layers``, by parameter name.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch, or the target is not a class.
        """
        return self._called_with("bias_relevances", inputs)._entrances(inputs, target, self._rules())[1]


class LRPRules(LinearRules):
    """The linear rules, with half of the relevance to each factor of a gate, and the gamma rule.

    Args:
        model: provides the names of its modules.
        gamma_layers: patterns of names.
        gamma: of the gamma rule.
        called: the name of the method, for messages.
    """

    def __init__(
        self, model: nn.Module, gamma_layers: tuple[str, ...] = (), gamma: float = 0.25, called: str = "MambaLRP"
    ) -> None:
        super().__init__(model)
        self._called = called
        self.gamma_layers = gamma_layers
        self.gamma = gamma
        self._model = model
        self._asked: set[str] = set()

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Multiply, with half of the gradient.

        For y = x g, x dy/dx + g dy/dg is 2 y: the plain gradient would double the relevance.
        """
        return self.product(torch.mul, y, gate)

    def product(self, function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        """Apply a function that is linear in both, with half of the gradient."""
        half = 0.5 * function(a, b)
        return half + half.detach()

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply LRP-0, or the gamma rule to the layers named for it."""
        if not self.gamma or not fitting(self.names.get(module, ""), self.gamma_layers):
            return super().linear(module, x, call)
        self._asked.add(self.names[module])
        y, constant = generalised_gamma(module, x, call, self.gamma)
        return self._noted(module, y, constant)

    def require_asked(self, end: Tensor) -> None:
        """Refuse gamma layers whose weights fused code reads without calling them."""
        if not self.gamma or not self.gamma_layers:
            return
        used = {id(variable) for node in behind([end]) if (variable := getattr(node, "variable", None)) is not None}
        missed = [
            name
            for name, module in self._model.named_modules()
            if isinstance(module, _KINDS) and fitting(name, self.gamma_layers) and name not in self._asked
            if id(module.weight) in used
        ]
        if missed:
            raise UnsupportedModelError(
                f"{self._called}(gamma_layers={list(self.gamma_layers)!r}): {', '.join(missed[:3])}"
                f"{f' and {len(missed) - 3} more' if len(missed) > 3 else ''}: the model's own code reads the weight "
                "and does not call the layer, so the gamma rule cannot be applied there; leave it out of gamma_layers."
            )


def generalised_gamma(
    module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor], gamma: float
) -> tuple[Tensor, Tensor | None]:
    """Return the layer's output with the gradient of the rule, and what its bias adds there.

    With w+ = max(w, 0), w- = min(w, 0), and x and b split in the same way (arXiv 2406.07592): where the output z is
    positive, z' = (w + gamma w+) x+ + (w + gamma w-) x- + b + gamma b+; elsewhere w+ and w-, b+ and b- change places.
    The gradient is that of z' (z / z'), the ratio fixed. z' is z and gamma times its terms of z's own sign, so
    |z'| >= |z|: where z' is 0 so is z, and the layer hands on nothing.

    Args:
        module: the layer.
        x: its input.
        call: its own forward.
        gamma: at least 0.
    """
    with torch.no_grad():
        z = call(x)
    weight, bias = own_weight("the gamma rule", module), added_bias(module, x, z)
    raised, lowered = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
    plus, minus = torch.where(x > 0, x, 0), torch.where(x < 0, x, 0)
    by_raised, by_lowered = bare_layer(module, raised), bare_layer(module, lowered)
    constant: Tensor | None = None
    changed = torch.where(z > 0, by_raised(plus) + by_lowered(minus), by_lowered(plus) + by_raised(minus))
    if bias is not None:
        b = bias.detach()
        constant = torch.where(z > 0, b + gamma * b.clamp(min=0), b + gamma * b.clamp(max=0))
        changed = changed + constant
    zero = changed.detach() == 0
    ratio = torch.where(zero, 0, z / torch.where(zero, 1, changed.detach()))
    y = straight(z, changed * ratio)
    return y, None if constant is None else constant * ratio


def check_gamma_layers(call: str, model: nn.Module, patterns: tuple[str, ...], gamma: float) -> None:
    """Refuse a gamma below 0, and patterns that match no linear layer or convolution.

    Args:
        call: the name of the method, for the message.
        model: whose layers.
        patterns: of names.
        gamma: of the rule.

    Raises:
        ValueError: gamma is below 0, or a pattern matches nothing.
    """
    if not gamma >= 0:
        raise ValueError(f"{call}(gamma={gamma!r}): expected a number of at least 0.")
    names = [name for name, module in model.named_modules() if isinstance(module, _KINDS)]
    for pattern in patterns:
        if not any(fitting(name, (pattern,)) for name in names):
            raise ValueError(
                f"{call}(gamma_layers={pattern!r}): matches no linear layer and no convolution. "
                f"{nearest(pattern, names)}"
            )
