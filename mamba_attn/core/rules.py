"""What an attribution method may change in a model's forward: activations, gates, norms, scans, attention, layers.

The families' equations (``models/``) call a Rules object inside the mixers. It is also called at every norm, activation
and linear layer of the model that it ``wants`` (``tracing.module_rules``). ``PLAIN`` changes nothing.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.scan_record import ScanRecord

NORM, ACTIVATION, LINEAR, TOKENS = KINDS = ("norm", "activation", "linear", "tokens")


class Rules:
    """The unchanged forward; attribution methods override what they change.

    An override keeps the values of the forward and changes gradients only.

    Attributes:
        wants: the ``KINDS`` that the rules also handle outside the mixers' equations: "norm" and "activation"
            modules anywhere in the model, "linear" and convolution modules anywhere, those inside mixers included, and
            the "tokens" that enter each layer.
    """

    wants: ClassVar[frozenset[str]] = frozenset()

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an element-wise activation."""
        return function(x)

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Multiply the scan's output by its gate."""
        return y * gate

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Apply a normalisation layer.

        Args:
            module: the layer.
            x: its input.
            call: its own forward, if the rule replaces it. Default: call the module.
        """
        return (call or module)(x)

    def linear(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a linear or convolution layer, whose own forward is ``call``."""
        return call(x)

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Return the record that the scan runs on."""
        return record

    def attention(self, record: AttentionRecord) -> AttentionRecord:
        """Return the record that softmax attention runs on."""
        return record

    def enter(self, layer: str, x: Tensor) -> None:
        """Observe the input of a mixer, by name, after the inputs of the modules around it, outermost first."""


PLAIN = Rules()
