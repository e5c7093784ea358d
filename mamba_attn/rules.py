"""What an attribution method may change in a mixer's forward: its activations, gate, norms and scan.

The families' equations (``models/``) ask a Rules object at these four places. ``PLAIN`` changes nothing.
"""

from collections.abc import Callable

from torch import Tensor, nn

from mamba_attn.scan import ScanRecord


class Rules:
    """The unchanged forward; attribution methods override what they change.

    An override keeps the values of the forward and changes gradients only.
    """

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply an element-wise activation."""
        return function(x)

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Multiply the scan's output by its gate."""
        return y * gate

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """Apply a normalisation layer."""
        output: Tensor = module(x)
        return output

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Return the record that the scan runs on."""
        return record


PLAIN = Rules()
