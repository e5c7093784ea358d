"""How far a result is from the float64 specification: nothing is timed before this is known."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from benchmarks.kernel.inputs import Shape, inputs
from benchmarks.kernel.subjects import DTYPES
from mamba_attn import ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import MambaAttnError

TOLERANCE = 1e-5  # of the sum of absolute terms, float32
RANGE = 1e-30  # what float32 cannot hold next to its smallest normal number is not an error


class Truth:
    """The float64 specification of some inputs, and the same sums with every term's absolute value.

    Args:
        delta: (batch, channels, length).
        A: (channels, states).
        B: (batch, states, length).
        C: (batch, states, length).
    """

    def __init__(self, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
        delta, A, B, C = (value.double() for value in (delta, A, B, C))
        self.attention = ops.hidden_attention(delta, A, B, C, backend="reference")
        self.terms = ops.hidden_attention(delta, A, B.abs(), C.abs(), backend="reference")

    def error(self, attention: Tensor) -> float:
        """Return what ``term_error`` does.

        Args:
            attention: (batch, length, length), to be judged.
        """
        if not torch.isfinite(attention).all() or attention.triu(1).any():
            return float("inf")
        error = (attention.double() - self.attention).abs_()
        return float(((error - RANGE).clamp_(min=0) / self.terms.clamp(min=RANGE)).max())


def term_error(attention: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> float:
    """Largest |error| of a channel mean, relative to the same sum with every term's absolute value.

    Args:
        attention: (batch, length, length), to be judged.
        delta: (batch, channels, length); the float64 specification of these inputs is the truth.
        A: (channels, states).
        B: (batch, states, length).
        C: (batch, states, length).

    Returns:
        The largest ratio over entries; infinite when an entry above the diagonal is not zero, or one is not finite.
    """
    return Truth(delta, A, B, C).error(attention)


def norm_error(attention: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> float:
    """||error|| / ||truth|| in the Frobenius norm, the truth as in ``term_error``."""
    truth = ops.hidden_attention(*(value.double() for value in (delta, A, B, C)), backend="reference")
    return float((attention.double() - truth).norm() / truth.norm())


def backend_errors(device: torch.device, dtypes: Iterable[str]) -> dict[tuple[str, str], float]:
    """Return the largest error of every backend that runs here, by (name, type), of a few channels with long steps.

    Args:
        device: where the backends run; the truth is computed on the CPU.
        dtypes: of B and C, keys of ``DTYPES``; the truth is that of the rounded numbers.
    """
    found: dict[tuple[str, str], float] = {}
    for dtype in dtypes:
        for shape in (Shape(16, 16, 197), Shape(16, 1, 784)):
            delta, A, *bc = inputs(shape, scale=10.0)
            B, C = (value.to(DTYPES[dtype]) for value in bc)
            truth, values = Truth(delta, A, B, C), [value.to(device) for value in (delta, A, B, C)]
            for name in _usable(*values):
                try:
                    error = truth.error(ops.hidden_attention(*values, backend=name).cpu())
                except MambaAttnError:
                    error = float("inf")
                found[name, dtype] = max(found.get((name, dtype), 0.0), error)
    return found


def refusals(errors: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], str]:
    """Return why the speed of a wrong backend is not reported, by (name, type).

    Args:
        errors: what ``backend_errors`` returned.
    """
    return {
        key: f"error {error:.2g} of the absolute terms is more than {TOLERANCE}: no speed is reported"
        for key, error in errors.items()
        if not error <= TOLERANCE
    }


def _usable(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> list[str]:
    B, C = (value[:, None, None] for value in (B, C))
    record = ScanRecord.from_scan(torch.zeros_like(delta)[:, None], delta[:, None], A[None], B, C)
    return [name for name, each in ops.BACKENDS.items() if name != "reference" and not each.unavailable(record)]
