"""The mean of all rows of gradient-weighted attention, from the backward pass that gives the gradients anyway.

Summed over its rows, the gradient-weighted attention of a layer is u times M^T dlogit/dy: the gradient of the logit
with respect to u as the scan alone reads it, less the skip D's part. Nothing is scanned again for it.
"""

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import TraceError
from mamba_attn.tracing.layers import ScanLayer


class OwnInputs(Rules):
    """Changes no value: every scan reads its u as a tensor of its own, apart from the u that delta, B and C are of."""

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Rename u."""
        u = record.source_u
        if torch.is_grad_enabled() and not u.requires_grad:  # a frozen model
            u = u.detach().requires_grad_()
        return record.replace(source_u=u.view_as(u))


def reads_all(layer: ScanLayer) -> bool:
    """Whether the default query of a layer is the mean over all its tokens."""
    return len(layer.layout.patches) == layer.tokens


def gradients(layers: list[ScanLayer], logit: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return dlogit/dy of every layer, and dlogit/du of its scan alone.

    Args:
        layers: of a pass with ``OwnInputs``.
        logit: a scalar.

    Raises:
        TraceError: the scalar does not depend on the pass.
    """
    tensors = [*(layer.y for layer in layers), *(layer.scan.source_u for layer in layers)]
    if not logit.requires_grad:
        raise TraceError("gradients: what is explained does not depend on this forward pass; take it from its output.")
    found = torch.autograd.grad(logit, tensors, allow_unused=True)
    filled = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(tensors, found, strict=True)
    ]
    return filled[: len(layers)], filled[len(layers) :]


def summed_rows(
    layer: ScanLayer, gradient: Float[Tensor, "batch channels tokens"], own: Tensor
) -> Float[Tensor, "batch tokens"]:
    """Return sum_i sum_c dlogit/dy_c[i] M_c[i, j] u_c[j] for every token j.

    Args:
        layer: the layer.
        gradient: dlogit/dy.
        own: dlogit/du of its scan alone, in u's shape.
    """
    scan = layer.scan
    u, own, gradient = (x.detach().to(layer.dtype) for x in (scan.source_u, own, gradient))
    D = None if scan.D is None else scan.D.detach().to(layer.dtype) * scan.scale
    if scan.source_frame == "tokens" and u.shape[1] == 1 and _everywhere_alike(scan):
        direct = own if D is None else own - (gradient * D.sum(0).unsqueeze(1)).unsqueeze(1)
        return (u * direct).sum((1, 2))
    total = torch.zeros(layer.batch, layer.tokens, dtype=layer.dtype, device=layer.device)
    if scan.source_frame == "tokens":
        total = total + (u * own).sum((1, 2))
    for route in range(scan.routes):
        reads, writes = scan.read_order[route], scan.write_order[route]
        source = u[:, min(route, u.shape[1] - 1)]
        source = source[..., reads] if scan.source_frame == "tokens" else source
        values = torch.zeros_like(source) if scan.source_frame == "tokens" else own[:, route]
        values = values if D is None else values - gradient[..., writes] * D[route].unsqueeze(1)
        total = total.index_add(1, reads, (source * values).sum(1))
    return total


def _everywhere_alike(scan: ScanRecord) -> bool:
    """Whether every route visits every token, and reads where it writes."""
    return scan.length == scan.tokens and torch.equal(scan.read_order, scan.write_order)
