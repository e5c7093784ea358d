"""What passes mamba_ssm's chunk scans, the doors of Mamba-2: tensors with an axis of heads, tokens before channels."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn.errors import UnsupportedModelError


class ScanParts(NamedTuple):
    """A call's tensors as the operators take them: ``delta`` is after bias and softplus."""

    u: Tensor  # (batch, groups, width, length)
    delta: Tensor  # (batch, groups, width, length)
    A: Tensor  # (groups, width, states)
    B: Tensor  # (batch, groups, 1 or width, states, length)
    C: Tensor  # as B
    D: Tensor | None  # (groups, width)
    z: Tensor | None  # (batch, groups, width, length)


class ChunkInputs(NamedTuple):
    """What code hands to a chunk scan; ``delta`` is before its bias, softplus and limits."""

    u: Tensor  # (batch, heads * width, length)
    delta: Tensor  # (batch, heads, length)
    A: Tensor  # (heads)
    B: Tensor  # (batch, length, groups, states)
    C: Tensor  # as B
    D: Tensor | None  # (heads) or (heads, width)
    z: Tensor | None  # as u
    delta_bias: Tensor | None  # (heads)
    softplus: object = False
    limits: tuple[float, float] = (0.0, math.inf)

    @property
    def groups(self) -> int:
        """Number of groups of heads, each with its own B and C."""
        return self.B.shape[2]

    def parts(self) -> ScanParts:
        """The tensors as a record's routes take them, one group of heads after the other; delta and A per head.

        In float32, or in float64 if one of u, delta and A is, and without a graph.
        """
        double = torch.float64 in (self.u.dtype, self.delta.dtype, self.A.dtype)

        def work(tensor: Tensor) -> Tensor:
            return tensor.detach().to(torch.float64 if double else torch.float32)

        groups, heads = self.groups, len(self.A)
        delta = work(self.delta)
        delta = delta if self.delta_bias is None else delta + work(self.delta_bias)[:, None]
        delta = F.softplus(delta) if self.softplus else delta
        D = None if self.D is None else work(self.D).view(heads, -1).expand(heads, self.u.shape[1] // heads)
        B, C = (work(t).permute(0, 2, 3, 1).unsqueeze(2) for t in (self.B, self.C))
        return ScanParts(
            work(self.u).unflatten(1, (groups, -1)),
            delta.clamp(*self.limits).unflatten(1, (groups, -1)),
            work(self.A).view(groups, -1, 1),
            B,
            C,
            None if D is None else D.reshape(groups, -1),
            None if self.z is None else work(self.z).unflatten(1, (groups, -1)),
        )


def forward_inputs(module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChunkInputs:
    """Return what was handed to ``_mamba_chunk_scan_combined_fwd``.

    Args:
        module: name of the module that runs, for the message.
        args: of the call.
        kwargs: of the call.

    Raises:
        UnsupportedModelError: states from outside, or several sequences in one row.
    """
    given = _named(_FORWARD, args, kwargs)
    outside = [name for name in ("initial_states", "seq_idx", "cu_seqlens") if given.get(name) is not None]
    if outside:
        raise UnsupportedModelError(
            f"{module}: its chunk scan is called with {outside[0]}, so that its states do not begin at its own first "
            "token; trace whole sequences, one in each row."
        )
    x, z = given["x"], given.get("z")
    return ChunkInputs(
        x.flatten(2).mT,
        given["dt"].mT,
        given["A"],
        given["B"],
        given["C"],
        given.get("D"),
        None if z is None else z.flatten(2).mT,
        given.get("dt_bias"),
        given.get("dt_softplus", False),
        tuple(given.get("dt_limit", (0.0, math.inf))),
    )


def scanned(found: tuple[Any, ...]) -> Tensor:
    """Return the scan's output before its gate, (batch, length, heads, width), of what the function returned."""
    before: Tensor = found[0] if found[1] is None else found[1]
    return before


def with_output(found: tuple[Any, ...], y: Tensor, z: Tensor | None) -> tuple[Any, ...]:
    """Return what that function returned, with another output before its gate.

    Args:
        found: what it returned.
        y: (batch, length, heads, width).
        z: of the gate, (batch, channels, length), or None.
    """
    if z is None or found[1] is None:
        return (y, *found[1:])
    return ((y * F.silu(z.mT.unflatten(2, y.shape[2:]).to(y))).to(found[0].dtype), y, *found[2:])


def backward_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what ``_mamba_chunk_scan_combined_bwd`` got, by name; ``out`` is the output before its gate."""
    return _named(_BACKWARD, args, kwargs)


def zeros(given: dict[str, Any], found: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """Return what that function returns when no gradient passes the scan.

    Args:
        given: what it got.
        found: what it returned, where it was asked for the output, too.
    """
    gradients: list[Tensor | None] = []
    for name in RETURNED:
        tensor, buffer = given.get(name), given.get(f"d{name}")
        blank = None if tensor is None else torch.zeros_like(tensor)
        gradients.append(blank if buffer is None or tensor is None else buffer.zero_())
    return (*gradients, *(found or ())[len(RETURNED) :])


def _named(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names.split(), args, strict=False)) | kwargs


RETURNED = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")  # gradients of these, in this order
_FORWARD = "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit state_dtype"
_BACKWARD = (
    "dout x dt A B C out chunk_size D z dt_bias initial_states dfinal_states seq_idx dt_softplus dt_limit "
    "dx ddt dB dC dz recompute_output state_dtype"
)
