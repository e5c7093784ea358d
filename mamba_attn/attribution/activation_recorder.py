"""Records values of a forward pass that scan records do not hold: inputs of activations, gated outputs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.tracing.layers import ScanLayer


class ActivationRecorder(Rules):
    """Records values of a forward pass without changing them. Use one recorder per pass.

    It sees calls in order, without names, so it assigns a call to the neighbouring scan: activations to the next scan,
    norm and gate to the previous one.

    Attributes:
        activated: per record, the inputs of the mixer's activations: for Vim one per route, then the gate's.
        gated: per record, the scans' output after the mixer's norm and gate, if it has them, in its own shape.
    """

    def __init__(self) -> None:
        self.activated: dict[ScanRecord, list[Tensor]] = {}
        self.gated: dict[ScanRecord, Tensor] = {}
        self._pending: list[Tensor] = []
        self._record: ScanRecord | None = None

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Record the activation's input."""
        self._pending.append(x)
        return super().activation(function, x)

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Assign the activations since the last scan to this one."""
        self.activated[record], self._pending = self._pending, []
        self._record = record
        return super().scan(record)

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Record the norm's output."""
        return self._keep(super().norm(module, x, call))

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Record the gated product."""
        return self._keep(super().gate(y, gate))

    def _keep(self, output: Tensor) -> Tensor:
        if self._record is not None:
            self.gated[self._record] = output
        return output


def gated_gradients(layers: Sequence[ScanLayer], logit: Tensor, recorder: ActivationRecorder) -> dict[str, Tensor]:
    """Return the logit's gradient at every layer's normed and gated output, (batch, channels, tokens).

    Args:
        layers: of a pass with gradients.
        logit: a scalar.
        recorder: of the pass.
    """
    outputs = [recorder.gated.get(layer.scan, layer.y) for layer in layers]
    found = torch.autograd.grad(logit, outputs, allow_unused=True)
    gradients = {}
    for layer, output, gradient in zip(layers, outputs, found, strict=True):
        filled = torch.zeros_like(output) if gradient is None else gradient
        gradients[layer.name] = filled if filled.ndim == 3 else filled.flatten(1, -2).mT  # VMamba's: channels last
    return gradients
