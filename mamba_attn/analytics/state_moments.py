"""The moments of a scan's hidden state over a batch, along each route, in time linear in the length."""

import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord

Moment = Float[Tensor, "routes channels length"]


def state_moments(record: ScanRecord) -> tuple[Moment, Moment]:
    """Return the mean, and the mean square, of the state h after every step, over the batch and the states.

    h = exp(delta A) h + delta B u (arXiv 2312.00752, eq. 2a), in scan order. The second, summed over channels and times
    the number of states, is the mean squared norm of the whole state at that step.

    Args:
        record: of a mixer's call.
    """
    u, delta, B = record.u, record.delta, record.B
    shape = (record.routes, record.channels, record.length)
    mean, square = torch.zeros(2, *shape, device=delta.device, dtype=torch.promote_types(delta.dtype, torch.float32))
    for state in range(record.states):  # one state alone, read as it is (C = 1), is the output of a scan
        own = slice(state, state + 1)
        A = record.A if record.A.shape[2] == 1 else record.A[..., own]
        h = ops.selective_scan(u, delta, A, B[..., own, :], torch.ones_like(B[..., own, :]))
        for image in h:  # several times faster than a mean over the first axis
            mean += image
            square.addcmul_(image, image)
    count = record.batch * record.states
    return mean / count, square / count
