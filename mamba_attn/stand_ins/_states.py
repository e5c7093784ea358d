"""The states that the compiled scans return beside their output, computed when somebody reads them."""

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mamba_attn.stand_ins._scan import Inputs


class ScanStates(Tensor):
    """(batch, channels, 1, 2 * states): exp(A S) and the state after the last step in turns, S the sum of delta.

    Every wrapper keeps this tensor for the backward and reads it only when asked for the last state, as
    ``x[:, :, -1, 1::2]``; computing it costs as much as the scan. The extensions have one row per chunk of steps; here
    the sequence is one chunk. No gradient runs through it, as in the extensions.
    """

    _pending: tuple["Inputs", object] | None
    _found: Tensor | None

    @classmethod
    def of(cls, given: "Inputs", softplus: object) -> Self:
        """The states of a scan, not computed yet."""
        batch, channels = given.u.shape[:2]
        kind = torch.float64 if given.u.dtype == torch.float64 else torch.float32
        blank = torch.full((), torch.nan, dtype=kind, device=given.u.device)
        states = blank.expand(batch, channels, 1, 2 * given.A.shape[1]).as_subclass(cls)
        states._pending, states._found = (given, softplus), None
        return states

    def _read(self) -> Tensor:
        if self._found is None and self._pending is not None:
            self._found, self._pending = _compute(*self._pending), None
        return self.as_subclass(Tensor) if self._found is None else self._found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute before anything but a look at shape, type or device."""
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ != "__get__":
                args = tuple(item._read() if isinstance(item, cls) else item for item in args)
            return func(*args, **(kwargs or {}))


@torch.no_grad()
def _compute(given: "Inputs", softplus: object) -> Tensor:
    x = given.working()
    delta = x.delta if x.delta_bias is None else x.delta + x.delta_bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    total = delta.double().cumsum(-1)
    left = (total[..., -1:] - total).to(delta.dtype)  # what is still to come after each step
    channels = x.u.shape[1]
    if x.B.ndim == 2:
        B = x.B[None, :, :, None]
    else:
        B = x.B.unsqueeze(1) if x.B.ndim == 3 else x.B.repeat_interleave(channels // x.B.shape[1], dim=1)
    state = torch.stack(
        [((x.A[:, n, None] * left).exp() * delta * x.u * B[:, :, n]).sum(-1) for n in range(x.A.shape[1])], dim=-1
    )
    decay = torch.exp(x.A * total[..., -1:].to(delta.dtype))
    return torch.stack([decay, state], dim=-1).flatten(2).unsqueeze(2)
