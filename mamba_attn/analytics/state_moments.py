"""The moments of a scan's hidden state over a batch, along each route, in time linear in the length."""

import torch
from torch import Tensor

from mamba_attn._types import Float
from mamba_attn.scan import ScanRecord

Moment = Float[Tensor, "routes channels length"]


def state_moments(record: ScanRecord) -> tuple[Moment, Moment]:
    """Return the mean, and the mean square, of the state h after every step, over the batch and the states.

    h = exp(delta A) h + delta B u (arXiv 2312.00752, eq. 2a), in scan order. The second, summed over channels and times
    the number of states, is the mean squared norm of the whole state at that step.

    Args:
        record: of a mixer's call.
    """
    batch, routes, groups, states = record.source_B.shape[0], record.routes, record.source_B.shape[2], record.states
    shape = (batch, routes, groups, record.channels // groups, -1)
    repeat = record.channels // record.heads
    delta = _steps_first(record.delta.repeat_interleave(repeat, dim=2))
    drive = _steps_first(record.u) * delta
    B = _steps_first(record.B)
    A = record.A.repeat_interleave(repeat, dim=1).unflatten(1, (groups, -1)).unsqueeze(0)
    h = torch.zeros((*shape[:-1], states), dtype=delta.dtype, device=delta.device)
    means, squares = [], []
    for t in range(record.length):
        h = torch.exp(delta[t].view(shape) * A) * h + drive[t].view(shape) * B[t].unsqueeze(3)
        means.append(h.mean((0, -1)).flatten(1))
        squares.append(h.square().mean((0, -1)).flatten(1))
    return torch.stack(means, -1), torch.stack(squares, -1)


def _steps_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous()
