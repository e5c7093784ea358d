"""What the compiled causal convolution does: ``causal_conv1d_cuda`` in every signature it has had.

Sums are taken in float32 or better and returned in the type of x.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of a convolution."""

    x: Tensor  # (batch, channels, length)
    weight: Tensor  # (channels, width)
    bias: Tensor | None = None  # (channels)
    initial_states: Tensor | None = None  # (batch, channels, width - 1): what came before


def convolve(given: Inputs, seq_idx: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The convolution, and what a next call would need as initial states, both in working precision.

    Step t sees steps t - width + 1 .. t.

    Args:
        given: the tensors.
        seq_idx: (batch, length), or None; steps see only steps of their own sequence, and those below 0 give zero.
        silu: whether the output goes through SiLU.
    """
    kind = torch.promote_types(torch.promote_types(given.x.dtype, given.weight.dtype), torch.float32)
    x, weight = given.x.to(kind), given.weight.to(kind)
    width, length = weight.shape[1], x.shape[2]
    before = x.new_zeros(*x.shape[:2], width - 1) if given.initial_states is None else given.initial_states.to(kind)
    padded = torch.cat([before, x], dim=-1)
    y = torch.zeros_like(x) if given.bias is None else given.bias.to(kind)[:, None].expand_as(x)
    for tap in range(width):
        term = padded[..., tap : tap + length] * weight[:, tap, None]
        y = y + (term if seq_idx is None else term * _same(seq_idx, width - 1 - tap)[:, None])
    y = F.silu(y) if silu else y
    return (y if seq_idx is None else y * (seq_idx >= 0)[:, None]), padded[..., length:]


def _same(seq_idx: Tensor, shift: int) -> Tensor:
    """Whether a step and the one ``shift`` before it belong to one sequence: (batch, length)."""
    return F.pad(seq_idx, (shift, 0), value=-(2**30))[..., : seq_idx.shape[-1]] == seq_idx


# What stands between the fixed first arguments and silu, by the number of arguments, oldest release first.
_FORWARD: dict[int, tuple[str, ...]] = {
    4: (),
    5: ("seq_idx",),
    7: ("seq_idx", "initial_states", "final_states_out"),
    8: ("seq_idx", "initial_states", "out", "final_states_out"),
}
_BACKWARD: dict[int, tuple[str, ...]] = {
    6: ("dx",),
    7: ("seq_idx", "dx"),
    10: ("seq_idx", "initial_states", "dfinal_states", "dx", "return_dinitial_states"),
    12: ("seq_idx", "initial_states", "dfinal_states", "dx", "dweight", "dbias", "dinitial_states"),
}


def _named(name: str, known: dict[int, tuple[str, ...]], fixed: int, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if len(arguments) not in known:
        raise TypeError(
            f"{name} got {len(arguments)} arguments; mamba_attn.cpu_stand_ins() knows the releases that take "
            f"{', '.join(map(str, known))}."
        )
    return dict(zip((*known[len(arguments)], "silu"), arguments[fixed:], strict=True))


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor | None:
    """The convolution of causal_conv1d 1.0 (4 arguments), 1.1 (5), 1.2 to 1.5 (7) and 1.6 (8, writes to ``out``)."""
    more = _named("causal_conv1d_cuda.causal_conv1d_fwd", _FORWARD, 3, (x, weight, bias, *rest))
    with torch.no_grad():
        given = Inputs(x, weight, bias, more.get("initial_states"))
        y, last = convolve(given, more.get("seq_idx"), more["silu"])
        if more.get("final_states_out") is not None:
            more["final_states_out"].copy_(last)
        if more.get("out") is None:
            return torch.empty_like(x).copy_(y)
        more["out"].copy_(y)
        return None


def causal_conv1d_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest: Any
) -> tuple[Tensor | None, ...] | None:
    """Its gradients: dx, dweight, dbias, and with 10 arguments dinitial_states; with 12 all are written in place."""
    more = _named("causal_conv1d_cuda.causal_conv1d_bwd", _BACKWARD, 4, (x, weight, bias, dout, *rest))
    given = Inputs(x, weight, bias, more.get("initial_states"))
    present = [i for i, tensor in enumerate(given) if tensor is not None]
    with torch.enable_grad():
        leaves = [given[i].detach().requires_grad_() for i in present]  # type: ignore[union-attr]
        named = dict(zip((Inputs._fields[i] for i in present), leaves, strict=True))
        y, last = convolve(Inputs(**named), more.get("seq_idx"), more["silu"])
        outputs, seeds = [y], [dout.to(y.dtype)]
        if more.get("dfinal_states") is not None:
            outputs, seeds = [y, last], [seeds[0], more["dfinal_states"].to(y.dtype)]
    found = dict(zip(named, torch.autograd.grad(outputs, leaves, seeds), strict=True))
    targets = {"x": "dx", "weight": "dweight", "bias": "dbias", "initial_states": "dinitial_states"}
    results: list[Tensor | None] = []
    for name, tensor in zip(Inputs._fields, given, strict=True):
        gradient, into = found.get(name), more.get(targets[name])
        if gradient is None or tensor is None:
            results.append(None)
        else:
            results.append((torch.empty_like(tensor) if into is None else into).copy_(gradient))
    if "dweight" in more:
        return None
    return tuple(results if "return_dinitial_states" in more else results[:3])


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor | None:
    """One or several steps; reads and moves on ``conv_state`` (batch, channels, at least width - 1) in place.

    Releases differ in what follows: silu; silu, cache_seqlens; silu, cache_seqlens, indices; or out before these.

    Raises:
        NotImplementedError: circular buffers (cache_seqlens) or indexed states.
    """
    out, flags = (rest[0], rest[1:]) if isinstance(rest[0], Tensor) else (None, rest)
    if any(item is not None for item in flags[1:]):
        raise NotImplementedError(
            "causal_conv1d_update: cache_seqlens and conv_state_indices have no stand-in in mamba_attn.cpu_stand_ins()."
        )
    with torch.no_grad():
        steps = x.unsqueeze(-1) if x.ndim == 2 else x
        width = weight.shape[1]
        before = conv_state[..., conv_state.shape[-1] - (width - 1) :]
        # the oldest releases keep `width` steps, of which the first is about to leave
        y, _ = convolve(Inputs(steps, weight, bias, before), None, bool(flags[0]))
        conv_state.copy_(torch.cat([conv_state, steps.to(conv_state.dtype)], dim=-1)[..., -conv_state.shape[-1] :])
        result = y.to(x.dtype).reshape(x.shape)
        return result if out is None else out.copy_(result)
