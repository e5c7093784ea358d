"""What mamba_ssm's kernel for one step of the scan does, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: object = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step: state = exp(dt A) state + dt B x, in place; y = C state + D x, times silu(z).

    Args:
        state: (batch, [heads,] channels, states), moved on in place.
        x: (batch, [heads,] channels).
        dt: like x, before bias and softplus.
        A: ([heads,] channels, states).
        B: (batch, [groups,] states).
        C: as B.
        D: ([heads,] channels), or None.
        z: like x, or None.
        dt_bias: as D.
        dt_softplus: whether dt goes through softplus.
        state_batch_indices: must be None here.

    Returns:
        y, like x.

    Raises:
        NotImplementedError: indexed states.
    """
    if state_batch_indices is not None:
        raise NotImplementedError(
            "selective_state_update: state_batch_indices has no stand-in in mamba_attn.cpu_stand_ins()."
        )
    work = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    step = F.softplus(step) if dt_softplus else step
    if x.ndim == 3:  # heads share the B and C of their group
        B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], dim=1).unsqueeze(2) for t in (B, C))
    else:
        B, C = (t.reshape(len(t), 1, -1) for t in (B, C))
    B, C = B.to(work), C.to(work)
    wide, step = x.to(work), step.unsqueeze(-1)
    moved = torch.exp(step * A.to(work)) * state.to(work) + step * B * wide.unsqueeze(-1)
    state.copy_(moved)
    y = (moved * C).sum(-1)
    y = y if D is None else y + D.to(work) * wide
    return (y if z is None else y * F.silu(z.to(work))).to(x.dtype)
