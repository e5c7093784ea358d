"""What passes a compiled selective scan, in and out: the doors of Mamba, Vim and VMamba."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.tracing.chunk_scans import ChunkInputs, ScanParts


class ScanInputs(NamedTuple):
    """What code hands to a compiled scan; ``delta`` is before its bias and softplus."""

    u: Tensor  # (batch, channels, length)
    delta: Tensor  # (batch, channels, length)
    A: Tensor  # (channels, states), or (channels) of a single state
    B: Tensor  # (channels, states), (batch, states, length) or (batch, groups, states, length)
    C: Tensor  # as B
    D: Tensor | None  # (channels)
    z: Tensor | None  # (batch, channels, length)
    delta_bias: Tensor | None  # (channels)
    softplus: object = False

    @property
    def groups(self) -> int:
        """Number of groups of channels, each with its own B and C."""
        single = self.A.ndim == 1
        return max((t.shape[1] for t in (self.B, self.C) if t.ndim == 4 or single), default=1)

    def parts(self, graph: bool = False) -> ScanParts:
        """The tensors in float32, or in float64 if one of u, delta and A is, group by group.

        Args:
            graph: whether they keep their graph.

        Raises:
            UnsupportedModelError: complex A.
        """
        if self.A.is_complex():
            raise UnsupportedModelError(
                f"a scan has complex A ({self.A.dtype}): the hidden attention of scans with real states alone is known."
            )
        double = torch.float64 in (self.u.dtype, self.delta.dtype, self.A.dtype)
        groups = self.groups
        split = (groups, self.u.shape[1] // groups)

        def work(tensor: Tensor) -> Tensor:
            return (tensor if graph else tensor.detach()).to(torch.float64 if double else torch.float32)

        delta = work(self.delta)
        delta = delta if self.delta_bias is None else delta + work(self.delta_bias)[:, None]
        delta = F.softplus(delta) if self.softplus else delta
        A, B, C = work(self.A), work(self.B), work(self.C)
        if A.ndim == 1:
            A, B, C = A[:, None], B.unsqueeze(2), C.unsqueeze(2)
        constant = 2 in (B.ndim, C.ndim)
        size = (self.u.shape[0], self.u.shape[2])
        return ScanParts(
            work(self.u).unflatten(1, split),
            delta.unflatten(1, split),
            A.unflatten(0, split),
            _grouped(B, split, size, constant),
            _grouped(C, split, size, constant),
            None if self.D is None else work(self.D).unflatten(0, split),
            None if self.z is None else work(self.z).unflatten(1, split),
        )


def _grouped(t: Tensor, split: tuple[int, int], size: tuple[int, int], constant: bool) -> Tensor:
    """B or C as (batch, groups, 1, states, length); with all channels spelt out where one of them is constant."""
    if t.ndim == 2:  # (channels, states): the same at every step
        spelt_out: Tensor = t.unflatten(0, split)[None, ..., None]
        return spelt_out.expand(size[0], -1, -1, -1, size[1])
    t = (t.unsqueeze(1) if t.ndim == 3 else t).unsqueeze(2).expand(-1, split[0], -1, -1, -1)
    return t.expand(-1, -1, split[1], -1, -1) if constant else t


AnyInputs = ScanInputs | ChunkInputs


@dataclass(eq=False)
class ScanCall:
    """One call of a compiled scan.

    Args:
        module: name of the innermost module of the traced model that was running.
        run: which of that module's calls it was in, from 0.
        inputs: what was handed in.
        run_again: gives the scan's own output before its gate, (batch, channels, length). To keep it for every layer
            of a pass would cost more time than all else at the doors.
        states: what ``fwd`` handed out for ``bwd``; of a chunk scan its output.
        attention: (fold, matrix per group in scan order) when one was asked for.
        at: while orders are measured, how many tensors had been seen.
    """

    module: str
    run: int
    inputs: AnyInputs
    run_again: Callable[[], Tensor]
    states: Tensor
    attention: tuple[str, Tensor] | None = None
    at: int = 0
    sent: Tensor | None = None  # while orders are measured: what bwd hands to u, (batch, channels, length)
    again: Tensor | None = None  # the states of a recomputation
    dout: Tensor | None = None  # what bwd was given last
    node: Any = None  # of the autograd graph, that called bwd

    def __post_init__(self) -> None:
        self._versions = self._seen()

    @property
    def signature(self) -> tuple[Any, ...]:
        """What says that a call of another forward pass, of any number of images, is the same one."""
        return (self.module, self.run, tuple(self.inputs.u.shape[1:]), self.inputs.groups, self.inputs.z is None)

    @cached_property
    def y(self) -> Tensor:
        """The scan's own output before its gate, (batch, channels, length).

        Raises:
            TraceError: the model wrote over the scan's input since.
        """
        self.require_unchanged()
        with torch.no_grad():
            return detached_plain(self.run_again())

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.inputs.u.shape[0]

    @property
    def groups(self) -> int:
        """Number of groups of channels, which may be routes."""
        return self.inputs.groups

    @property
    def length(self) -> int:
        """Number of steps."""
        return self.inputs.u.shape[-1]

    @property
    def steps(self) -> int:
        """Number of steps that share no token: those of all rows."""
        return self.rows * self.length

    def require_unchanged(self) -> None:
        """Raise TraceError if the model wrote over the tensors after the scan had read them."""
        if self._seen() != self._versions:
            raise TraceError(
                f"{self.module}: the model changed the scan's input in place after the scan; read the matrix during "
                "the pass, with trace(attention=...)."
            )

    def dy(self) -> Tensor | None:
        """The gradient at the scan's output before its gate, (batch, channels, length); None: none arrived."""
        if self.dout is None:
            return None
        z = self.inputs.z
        return self.dout.detach() if z is None else self.dout.detach() * F.silu(z.detach().to(self.dout.dtype))

    def _seen(self) -> list[int]:
        tensors = (t for t in self.inputs[:8] if isinstance(t, Tensor))
        return [-1 if t.is_inference() else t._version for t in tensors]


class ScanStates(Tensor):
    """(batch, channels, chunks, 2 * states): exp(A S) and the state after a chunk in turns, S the sum of delta.

    Every wrapper keeps this tensor for the backward and reads it only when asked for the last state, as
    ``x[:, :, -1, 1::2]``; computing it costs as much as the scan. The extensions have a row per 2,048 steps; a stand-in
    has one. No gradient runs through it, as in the extensions.
    """

    _pending: ScanInputs | None
    _found: Tensor | None

    @classmethod
    def of(cls, inputs: ScanInputs, chunks: int = 1) -> Self:
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
def _compute(inputs: ScanInputs, chunks: int) -> Tensor:
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


def detached_plain(t: Tensor) -> Tensor:
    """Without its graph, and without what a subclass of somebody's code does with functions of torch."""
    t = t.detach() if t.requires_grad else t
    return t if type(t) is Tensor else t.as_subclass(Tensor)


def zeros_of(args: tuple[Any, ...], gated: bool) -> list[Tensor | None]:
    """What ``bwd`` returns when no gradient passes the scan."""
    z, bias, dz = (args[6], args[7], args[11]) if gated else (None, args[6], None)
    found = [None if t is None else torch.zeros_like(t) for t in (*args[:6], bias)]
    if z is not None:
        found.append(torch.zeros_like(z) if dz is None else dz.zero_())
        if args[13]:
            found.append(torch.zeros_like(z))
    return found


def first_flag(args: tuple[Any, ...]) -> int:
    """The first argument that is no tensor: where softplus stands tells the extensions' signatures apart."""
    return next((i for i, value in enumerate(args) if value is not None and not isinstance(value, Tensor)), -1)


def scan_inputs(args: tuple[Any, ...]) -> ScanInputs | None:
    """What was handed to ``fwd``: with z in Mamba's own extension, without in the others; None: to another scan."""
    first = first_flag(args)
    if first == 8 and len(args) == 9:  # 2DMamba's goes on with the size of a grid
        return ScanInputs._make(args[:9])
    return ScanInputs._make((*args[:6], None, *args[6:8])) if first == 7 else None


def replaceable(inputs: ScanInputs) -> bool:
    """Whether our operator computes this scan."""
    return not inputs.A.is_complex() and bool((inputs.A < 0).all())


def as_extension(name: str, args: tuple[Any, ...], inputs: ScanInputs, y: Tensor) -> list[Tensor]:
    """What the extension would return: the layout of delta and the type of u, or float32 where it is asked for."""
    u, delta, z = inputs.u, inputs.delta, inputs.z
    wide = name.endswith("oflex") and (len(args) < 10 or args[9])
    kind = torch.promote_types(u.dtype, torch.float32) if wide else u.dtype
    chunks = 1 if delta.device.type == "cpu" else -(-delta.shape[-1] // 2048)
    found = [torch.empty_like(delta, dtype=kind).copy_(y), ScanStates.of(inputs, chunks)]
    return found if z is None else [*found, torch.empty_like(z).copy_(y * F.silu(z.detach().to(y)))]
