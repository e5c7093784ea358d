"""Rules and interventions at a scan's door: what its backward pass returns under them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn.core.rules import Rules, unruled
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops import selective_scan
from mamba_attn.tracing.chunk_scans import RETURNED
from mamba_attn.tracing.edits import CallEdit, edited_call


def ruled_backward(
    own: Callable[..., Any], args: tuple[Any, ...], y: Tensor, rules: Rules, *, gated: bool
) -> list[Tensor | None]:
    """What ``bwd`` returns where rules hold: of y the gate's part, of every input what the scan's rule leaves.

    Args:
        own: the extension's ``bwd``.
        args: what it was called with.
        y: the scan's output before its gate, (batch, channels, length).
        rules: the rules.
        gated: whether it is the ``bwd`` that takes a gate.
    """
    at = 8 if gated else 7
    z, dout = (args[6] if gated else None), args[at]
    dy, dz, out = _through_gate(rules, y, z, dout)
    changed = list(args)
    changed[at] = dy.to(dout.dtype).contiguous()
    if gated:
        changed[6], changed[11], changed[13] = None, None, False  # as a scan without a gate
    found = list(own(*changed))[:7]
    for i, kept in enumerate(_kept(rules)):
        found[i] = found[i] if kept or found[i] is None else torch.zeros_like(found[i])
    if z is not None:
        found.append(dz.to(z.dtype) if args[11] is None else args[11].copy_(dz))
        if args[13]:
            found.append(out.to(z.dtype))
    return found


def ruled_chunk_backward(own: Callable[..., Any], given: dict[str, Any], rules: Rules) -> tuple[Any, ...]:
    """The same of a chunk scan: what ``_mamba_chunk_scan_combined_bwd`` returns where rules hold.

    Args:
        own: that function.
        given: what it was called with, by name.
        rules: the rules.
    """
    z, dout = given.get("z"), given["dout"]
    dy, dz, out = _through_gate(rules, given["out"], z, dout)
    changed = {**given, "dout": dy.to(dout.dtype).contiguous(), "z": None, "dz": None, "recompute_output": False}
    found = list(own(**{name: value for name, value in changed.items() if name in given}))[: len(RETURNED)]
    kept = dict(zip(("x", "dt", "A", "B", "C", "D", "dt_bias"), _kept(rules), strict=True))
    for i, name in enumerate(RETURNED):
        if found[i] is not None and not kept.get(name, False):
            found[i] = found[i].zero_()  # a part of one tensor that the caller allocated, perhaps
    if z is not None:
        found[RETURNED.index("z")] = dz.to(z.dtype) if given.get("dz") is None else given["dz"].copy_(dz)
    return (*found, out.to(given["x"].dtype)) if given.get("recompute_output") else tuple(found)


def edited_backward(
    args: tuple[Any, ...], inputs: Any, edits: Sequence[CallEdit], *, gated: bool
) -> list[Tensor | None]:
    """What ``bwd`` returns of a call that interventions changed, by the operators' own gradients.

    Args:
        args: what it was called with.
        inputs: what ``fwd`` was called with, ``ScanInputs``.
        edits: what was done to the call.
        gated: whether it is the ``bwd`` that takes a gate.
    """
    dout = args[8 if gated else 7]
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else None for t in inputs[:8]]
    with torch.enable_grad(), unruled():
        given = inputs._replace(**dict(zip(inputs._fields, leaves, strict=False)))
        parts = given.parts(graph=True)
        y = edited_call(parts, selective_scan(*parts[:6]).flatten(1, 2), edits)
        out = y if given.z is None else y * F.silu(given.z.to(y))
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(out, wanted, dout.to(out.dtype), allow_unused=True))
    found = [None if leaf is None else next(gradients) for leaf in leaves]
    found = [
        torch.zeros_like(leaf) if leaf is not None and gradient is None else gradient
        for leaf, gradient in zip(leaves, found, strict=True)
    ]
    dz = found.pop(6)
    if gated and dz is not None:
        found.append(dz if args[11] is None else args[11].copy_(dz))
        if args[13]:
            found.append(out.detach().to(dz.dtype))
    return found


def _through_gate(rules: Rules, y: Tensor, z: Tensor | None, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and z, and y * silu(z); dout itself without a gate."""
    if z is None:
        return dout, dout, dout
    work = torch.promote_types(torch.promote_types(y.dtype, z.dtype), torch.float32)
    with torch.enable_grad(), unruled():
        leaves = [t.detach().to(work).requires_grad_() for t in (y, z)]
        out = rules.gate(leaves[0], rules.activation(F.silu, leaves[1]))
        found = torch.autograd.grad(out, leaves, dout.to(work), allow_unused=True)
    dy, dz = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))
    return dy, dz, out.detach()


def _kept(rules: Rules) -> list[bool]:
    """Which gradients the rule of scans lets pass: of u, delta, A, B, C, D and delta's bias."""
    with torch.enable_grad():
        sizes = (4, 4, 3, 5, 5, 2)  # numbers of axes
        one = [torch.full((1,) * axes, -1.0 if i == 2 else 1.0, requires_grad=True) for i, axes in enumerate(sizes)]
        record = rules.scan(ScanRecord.from_scan(*one))
    fields = (record.source_u, record.source_delta, record.A, record.source_B, record.source_C, record.D)
    kept = [isinstance(t, Tensor) and t.requires_grad for t in fields]
    return [*kept, kept[1]]
