"""What an attribution method may change in a model's forward: activations, gates, norms, scans, attention, layers.

The families' equations (``models/``) call a Rules object inside the mixers. It is also called at every norm, activation
and linear layer of the model that it ``wants`` (``tracing.module_rules``), and, if it wants them all, at the functions
that the model calls anywhere else (``tracing.function_rules``). ``PLAIN`` changes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, ClassVar

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
        at_doors: whether they also hold where a scan is seen at its door alone, by what its backward pass returns.
        observes: whether they change nothing, and are shown what stands around scans that are seen at their doors.
    """

    wants: ClassVar[frozenset[str]] = frozenset()
    at_doors: ClassVar[bool] = False
    observes: ClassVar[bool] = False

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an element-wise activation."""
        return function(x)

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Multiply the scan's output by its gate."""
        return y * gate

    def product(self, function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        """Apply a function that is linear in each of two tensors that depend on the model's input."""
        return function(a, b)

    def fixed(self, factor: Tensor) -> Tensor:
        """Return what multiplies the tokens: a norm's denominator, softmax probabilities, a sigmoid."""
        return factor

    def added(self, name: str, y: Tensor, constant: Tensor) -> Tensor:
        """Return y, to which a constant was added.

        Args:
            name: of the constant.
            y: the sum.
            constant: in any shape that broadcasts over y.
        """
        return y

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
        """Observe the input of a mixer, by name, after the inputs of the modules around it, outermost first.

        A scan that is seen at its door shows its own input.
        """

    def scanned(self, call: object, layer: str, x: Tensor) -> None:
        """Observe a scan at its door.

        Args:
            call: what the door keeps of it.
            layer: name of the module that runs.
            x: what it scans.
        """
        self.enter(layer, x)

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> None:
        """Observe a depthwise convolution, where rules ``observes``; options as of ``torch.conv2d``."""

    def multiplied(self, a: Tensor, b: Tensor) -> None:
        """Observe a product of two tensors of one size, where rules ``observes``."""


PLAIN = Rules()


_off = local()


@contextmanager
def unruled(off: bool = True) -> Iterator[None]:
    """Leave functions as they are inside the block, since what calls them asks the rules itself.

    Args:
        off: False ends it: a module's own code runs that the rules are to see.
    """
    before = ruled_elsewhere()
    _off.value = off
    try:
        yield
    finally:
        _off.value = before


def ruled_elsewhere() -> bool:
    """Whether this thread is inside ``unruled``."""
    return bool(getattr(_off, "value", False))
