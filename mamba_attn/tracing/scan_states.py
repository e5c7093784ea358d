"""The states that a compiled scan returns beside its output, computed when somebody reads them."""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mamba_attn.tracing.doors import ScanInputs


class ScanStates(Tensor):
    """(batch, channels, chunks, 2 * states): exp(A S) and the state after a chunk in turns, S the sum of delta.

    Every wrapper keeps this tensor for the backward and reads it only when asked for the last state, as
    ``x[:, :, -1, 1::2]``; computing it costs as much as the scan. The extensions have a row per 2,048 steps; a stand-in
    has one. No gradient runs through it, as in the extensions.
    """

    _pending: "ScanInputs | None"
    _found: Tensor | None

    @classmethod
    def of(cls, inputs: "ScanInputs", chunks: int = 1) -> Self:
        """The states of a scan, not computed yet."""
        batch, channels = inputs.u.shape[:2]
        kind = torch.float64 if inputs.u.dtype == torch.float64 else torch.float32
        blank = torch.full((), torch.nan, dtype=kind, device=inputs.u.device)
        width = 2 * (1 if inputs.A.ndim == 1 else inputs.A.shape[1])
        states = blank.expand(batch, channels, chunks, width).as_subclass(cls)
        states._pending, states._found = inputs, None
        return states

    def read(self) -> Tensor:
        """The numbers, as a plain tensor."""
        if self._found is None and self._pending is not None:
            self._found, self._pending = _compute(self._pending, self.shape[2]), None
        return self.as_subclass(Tensor) if self._found is None else self._found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute before anything but a look at shape, type, device or address."""
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ not in ("__get__", "data_ptr"):
                args = tuple(item.read() if isinstance(item, cls) else item for item in args)
            return func(*args, **(kwargs or {}))


@torch.no_grad()
def _compute(inputs: "ScanInputs", chunks: int) -> Tensor:
    u, delta, A, B, *_ = inputs.parts()
    total = delta.double().cumsum(-1)
    length = total.shape[-1]
    found = []
    for chunk in range(chunks):
        end = length if chunks == 1 else min(2048 * (chunk + 1), length)
        left = (total[..., end - 1 : end] - total[..., :end]).to(delta.dtype)  # what is still to come after each step
        fed = (delta * u)[..., :end]
        state = [((A[..., n, None] * left).exp() * fed * B[:, :, :, n, :end]).sum(-1) for n in range(A.shape[-1])]
        decay = torch.exp(A * total[..., end - 1 : end].to(delta.dtype))
        found.append(torch.stack([decay, torch.stack(state, -1)], dim=-1).flatten(3).flatten(1, 2))
    return torch.stack(found, dim=2)
