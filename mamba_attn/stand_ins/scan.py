"""The compiled selective scans on any device: ``fwd`` and ``bwd`` as their Python wrappers call them.

``selective_scan_cuda`` is Mamba's extension, ``selective_scan_cuda_oflex``, ``_core``, ``_nrow`` and ``_ndstate`` are
VMamba's, ``_oflex_rh`` is Spatial-Mamba's; ``v2dmamba_scan`` is 2DMamba's. Half precision is computed in float32 and
returned in the type that the extension returns; float64, which the extensions refuse, stays float64.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_attn import ops
from mamba_attn.tracing.selective_scans import ScanInputs, ScanStates


class Inputs(NamedTuple):
    """The tensors of a scan, as the wrappers pass them; ``delta`` is before bias and softplus."""

    u: Tensor  # (batch, channels, length)
    delta: Tensor  # (batch, channels, length)
    A: Tensor  # (channels, states), real or complex
    # (channels, states), (batch, states, length) or (batch, groups, states, length). Where A is complex, the first form
    # is complex too, and the others have real and imaginary parts in turns along a length twice as long.
    B: Tensor
    C: Tensor  # as B
    D: Tensor | None  # (channels)
    z: Tensor | None  # (batch, channels, length)
    delta_bias: Tensor | None  # (channels)

    def working(self) -> "Inputs":
        """Return all tensors in float32, or float64 if u, delta or A is; A, B and C are complex if A is."""
        double = torch.float64 in (self.u.dtype, self.delta.dtype, self.A.real.dtype)
        kind = torch.float64 if double else torch.float32
        if not self.A.is_complex():
            return Inputs(*(None if tensor is None else tensor.to(kind) for tensor in self))  # type: ignore[arg-type]
        wide = kind.to_complex()
        paired = [
            t.to(wide) if t.ndim == 2 else torch.view_as_complex(t.to(kind).unflatten(-1, (-1, 2)).contiguous())
            for t in (self.B, self.C)
        ]
        rest = [None if t is None else t.to(kind) for t in (self.u, self.delta, self.D, self.z, self.delta_bias)]
        return Inputs(*rest[:2], self.A.to(wide), *paired, *rest[2:])  # type: ignore[arg-type, call-arg]


def run(name: str, given: Inputs, softplus: object) -> tuple[Tensor, Tensor]:
    """The scan in working precision: y, and y * silu(z), or y again without z (arXiv 2312.00752, algorithm 2).

    Args:
        name: the called function, for errors.
        given: its tensors.
        softplus: whether delta goes through softplus.

    Raises:
        ValueError: the tensors do not fit together.
    """
    x = given.working()
    groups = max((t.shape[1] for t in (x.B, x.C) if t.ndim == 4), default=1)
    if given.u.shape[1] % groups:
        raise ValueError(f"{name}: {given.u.shape[1]} channels cannot be shared by {groups} groups of B and C.")
    routes = (groups, x.u.shape[1] // groups)  # a group of channels with its B and C is a route of ours
    B, C = _grouped(x, groups)
    ours = not x.A.is_complex() and bool((x.A < 0).all())
    scan = ops.selective_scan if ours else _step_by_step
    y = scan(
        x.u.unflatten(1, routes),
        steps(x, softplus).unflatten(1, routes),
        x.A.unflatten(0, routes),
        B,
        C,
        None if x.D is None else x.D.unflatten(0, routes),
    )
    out = y.reshape(x.u.shape)
    return out, out if x.z is None else out * F.silu(x.z)


def steps(x: Inputs, softplus: object) -> Tensor:
    """Return delta after bias and softplus."""
    delta = x.delta if x.delta_bias is None else x.delta + x.delta_bias[:, None]
    return F.softplus(delta) if softplus else delta


def _grouped(x: Inputs, groups: int) -> list[Tensor]:
    """Return B and C as (batch, groups, states, length), or with an extra axis of channels if either is constant."""
    batch, channels, length = x.u.shape
    width, constant = channels // groups, 2 in (x.B.ndim, x.C.ndim)
    found = []
    for t in (x.B, x.C):
        if t.ndim == 2:  # (channels, states): the same at every step
            t = t.unflatten(0, (groups, width))[None, ..., None].expand(batch, -1, -1, -1, length)
        else:
            t = t.unsqueeze(1) if t.ndim == 3 else t
            t = t.unsqueeze(2).expand(-1, -1, width, -1, -1) if constant else t
        found.append(t)
    return found


def _step_by_step(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """The same scan for an A that is complex or not negative everywhere, which ``ops.selective_scan`` refuses.

    Complex states stand for pairs of conjugates, of which one is kept: y is twice their real part.
    """
    B, C = (t.unsqueeze(2) if t.ndim == 4 else t for t in (B, C))
    state, found = A.new_zeros(1), []
    for t in range(u.shape[-1]):
        step = delta[..., t, None]
        state = torch.exp(step * A) * state + step * u[..., t, None] * B[..., t]
        found.append((state * C[..., t]).sum(-1))
    y = torch.stack(found, -1)
    y = 2 * y.real if y.is_complex() else y
    return y if D is None else y + D[..., None] * u


def _like(target: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``value`` in the type and memory layout of ``target``, as the extensions allocate their results."""
    return torch.empty_like(target, dtype=dtype or target.dtype).copy_(value)


def _forward(name: str, given: Inputs, softplus: object, dtype: torch.dtype | None) -> list[Tensor]:
    with torch.no_grad():
        y, gated = run(name, given, softplus)
        # as the extensions: the layout of delta, the type of u
        kept = _last_states(given, softplus) if given.A.is_complex() else ScanStates.of(ScanInputs(*given, softplus))
        found = [_like(given.delta, y, dtype or given.u.dtype), kept]
        return found if given.z is None else [*found, _like(given.z, gated)]


def _backward(name: str, given: Inputs, dout: Tensor, softplus: object) -> tuple[list[Tensor | None], Tensor]:
    """Gradients by autograd through the recomputed scan, in the order of ``Inputs``, and y * silu(z)."""
    wanted = [i for i, tensor in enumerate(given) if tensor is not None]
    with torch.enable_grad():
        leaves = Inputs(*(None if t is None else t.detach().requires_grad_() for t in given))  # type: ignore[arg-type]
        _, gated = run(name, leaves, softplus)
    found = torch.autograd.grad(gated, [cast(Tensor, leaves[i]) for i in wanted], dout.to(gated.dtype))
    gradients: list[Tensor | None] = [None] * len(given)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = _like(cast(Tensor, given[i]), gradient)
    return gradients, gated.detach()


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: object,
) -> list[Tensor]:
    """``selective_scan_cuda.fwd``: [out, states], and out * silu(z) where there is a z."""
    return _forward("selective_scan_cuda.fwd", Inputs(u, delta, A, B, C, D, z, delta_bias), delta_softplus, None)


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: object,
    recompute_out_z: object,
) -> list[Tensor | None]:
    """``selective_scan_cuda.bwd``: [du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz and out_z where there is a z.

    ``x`` and ``out``, kept by the extension for speed, are not read; a given ``dz`` is written to and returned.
    """
    given = Inputs(u, delta, A, B, C, D, z, delta_bias)
    found, gated = _backward("selective_scan_cuda.bwd", given, dout, delta_softplus)
    results = [*found[:6], found[7]]
    if z is not None:
        results.append(found[6] if dz is None else dz.copy_(cast(Tensor, found[6])))
        if recompute_out_z:
            results.append(_like(z, gated))
    return results


def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: object,
    nrows: int = 1,
    out_float: object = True,
) -> list[Tensor]:
    """``selective_scan_cuda_oflex.fwd``: [out, states]; out is float32 with ``out_float``, else as u."""
    given = Inputs(u, delta, A, B, C, D, None, delta_bias)
    dtype = torch.float32 if out_float and u.dtype != torch.float64 else None
    return _forward("selective_scan_cuda_oflex.fwd", given, delta_softplus, dtype)


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: object,
    nrows: int = 1,
) -> list[Tensor]:
    """``selective_scan_cuda_core.fwd``: [out, states]."""
    given = Inputs(u, delta, A, B, C, D, None, delta_bias)
    return _forward("selective_scan_cuda_core.fwd", given, delta_softplus, None)


def ndstate_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: object,
    nrows: int = 1,
) -> list[Tensor]:
    """``selective_scan_cuda_ndstate.fwd``: ``core_fwd`` of one state, of which A, B and C have no axis."""
    return core_fwd(u, delta, A[:, None], B.unsqueeze(2), C.unsqueeze(2), D, delta_bias, delta_softplus)


def ndstate_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: object,
    nrows: int = 1,
) -> list[Tensor | None]:
    """``selective_scan_cuda_ndstate.bwd``: [du, ddelta, dA, dB, dC, dD, ddelta_bias], shaped like the arguments."""
    found = core_bwd(u, delta, A[:, None], B.unsqueeze(2), C.unsqueeze(2), D, delta_bias, dout, x, delta_softplus)
    for i, given in ((2, A), (3, B), (4, C)):
        found[i] = cast(Tensor, found[i]).reshape(given.shape)
    return found


def _every_state(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None) -> Inputs:
    """A scan whose output is the states: each is a channel of one state, of a group of its own, read by C = 1."""
    states = A.shape[1]
    batch, groups, _, length = B.shape
    wide = u.repeat_interleave(states, 1), delta.repeat_interleave(states, 1)
    # channels (channel, state): the B of channel c and state n is B[:, group of c, n]
    narrow = B.repeat_interleave(u.shape[1] // groups, 1).reshape(batch, -1, 1, length)
    bias = None if delta_bias is None else delta_bias.repeat_interleave(states, 0)
    return Inputs(*wide, A.reshape(-1, 1), narrow, torch.ones_like(narrow), None, None, bias)


def states_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: object,
    nrows: int = 1,
    out_float: object = True,
) -> list[Tensor]:
    """``selective_scan_cuda_oflex_rh.fwd``: [states of every step (batch, channels, states, length), last states].

    Args:
        u: (batch, channels, length).
        delta: like u, before bias and softplus.
        A: (channels, states).
        B: (batch, groups, states, length).
        D: without effect, as in the extension.
        delta_bias: (channels), or None.
        delta_softplus: whether delta goes through softplus.
        nrows: without effect.
        out_float: return float32 whatever the type of u is.
    """
    dtype = torch.float32 if out_float and u.dtype != torch.float64 else u.dtype
    with torch.no_grad():
        y, _ = run("selective_scan_cuda_oflex_rh.fwd", _every_state(u, delta, A, B, delta_bias), delta_softplus)
    states = y.unflatten(1, (-1, A.shape[1])).to(dtype)
    return [states, ScanStates.of(ScanInputs(u, delta, A, B, B, None, None, delta_bias, delta_softplus))]


def states_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: object,
    nrows: int = 1,
) -> list[Tensor | None]:
    """``selective_scan_cuda_oflex_rh.bwd``: [du, ddelta, dA, dB, dD, ddelta_bias]; dD is zero."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, delta_bias)]
    with torch.enable_grad():
        y, _ = run("selective_scan_cuda_oflex_rh.bwd", _every_state(*leaves), delta_softplus)  # type: ignore[arg-type]
    wanted = [t for t in leaves if t is not None]
    found = list(torch.autograd.grad(y, wanted, dout.flatten(1, 2).to(y.dtype)))
    dbias = None if delta_bias is None else found.pop()
    return [*found, None if D is None else torch.zeros_like(D), dbias]


def _both_axes(name: str, given: Inputs, softplus: object, rows: int, columns: int) -> Tensor:
    """2DMamba's recurrence (arXiv 2412.00678, section 3.2): states run along the rows, and their sums down the columns.

    Raises:
        ValueError: the grid does not have as many cells as the scan has steps.
    """
    if rows * columns != given.u.shape[-1]:
        raise ValueError(f"{name}: a scan of {given.u.shape[-1]} steps has no grid of {rows} x {columns}.")
    x, grid = given.working(), (rows, columns)
    delta = steps(x, softplus)
    width = x.u.shape[1] // x.B.shape[1]
    B, C = (t.repeat_interleave(width, 1).unflatten(-1, grid) for t in (x.B, x.C))
    decay = torch.exp(delta.unsqueeze(2) * x.A[:, :, None]).unflatten(-1, grid)
    state = (delta * x.u).unflatten(-1, grid).unsqueeze(2) * B
    for axis in (-1, -2):
        along = [state.select(axis, 0)]
        for step in range(1, state.shape[axis]):
            along.append(decay.select(axis, step) * along[-1] + state.select(axis, step))
        state = torch.stack(along, axis)
    y: Tensor = (state * C).sum(2).flatten(-2)
    return y if x.D is None else y + x.D[:, None] * x.u


def grid_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: None,
    delta_bias: Tensor | None,
    delta_softplus: object,
    rows: int,
    columns: int,
) -> list[Tensor]:
    """``v2dmamba_scan.fwd``: [out, nothing that is read]; B and C (batch, groups, states, length), no gate."""
    given = Inputs(u, delta, A, B, C, D, None, delta_bias)
    with torch.no_grad():
        y = _both_axes("v2dmamba_scan.fwd", given, delta_softplus, rows, columns)
    return [_like(delta, y, u.dtype), u.new_empty(0)]


def grid_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: None,
    delta_softplus: object,
    recompute_out_z: object,
    rows: int,
    columns: int,
) -> list[Tensor | None]:
    """``v2dmamba_scan.bwd``: [du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, C, D, None, delta_bias)]
    with torch.enable_grad():
        y = _both_axes("v2dmamba_scan.bwd", Inputs(*leaves), delta_softplus, rows, columns)  # type: ignore[arg-type]
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, dout.to(y.dtype)))
    return [None if t is None else _like(t, next(found)) for t in (*leaves[:6], leaves[7])]


def core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: object,
    nrows: int = 1,
) -> list[Tensor | None]:
    """``bwd`` of both of VMamba's extensions: [du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    given = Inputs(u, delta, A, B, C, D, None, delta_bias)
    found, _ = _backward("selective_scan_cuda_core.bwd", given, dout, delta_softplus)
    return [*found[:6], found[7]]


def _last_states(given: Inputs, softplus: object) -> Tensor:
    """Return the last states for complex A, which no trace reads."""
    x = given.working()
    delta = steps(x, softplus)
    total = delta.double().cumsum(-1)
    left = (total[..., -1:] - total).to(delta.dtype)  # remaining decay after each step
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
