"""The causal convolution in plain PyTorch: the extension ``causal_conv1d_cuda``, in all its signatures; the package.

Sums are taken in float32 or better and returned in the type of x. Autograd differentiates the package's functions.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

__version__ = "1.5.0"  # the release whose signatures these are
# Arguments between the fixed first ones and silu, by the number of arguments, oldest release first.
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


class Inputs(NamedTuple):
    """The input tensors of a convolution."""

    x: Tensor  # (batch, channels, length)
    weight: Tensor  # (channels, width)
    bias: Tensor | None = None  # (channels)
    initial_states: Tensor | None = None  # (batch, channels, width - 1): the preceding steps


def convolve(given: Inputs, seq_idx: Tensor | None, silu: object) -> tuple[Tensor, Tensor]:
    """Return the convolution and the next call's initial states, both in working precision.

    Step t sees steps t - width + 1 .. t.

    Args:
        given: the tensors.
        seq_idx: (batch, length), or None; steps see only steps of their own sequence, and those below 0 give zero.
        silu: whether the output goes through SiLU.
    """
    padded, weight, bias = _working(given)
    y = _summed(padded, weight, bias, seq_idx)
    y = F.silu(y) if silu else y
    return (y if seq_idx is None else y * (seq_idx >= 0)[:, None]), padded[..., given.x.shape[2] :]


def _working(given: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return preceding steps and x concatenated, the weight and the bias, in float32 or better."""
    kind = torch.promote_types(torch.promote_types(given.x.dtype, given.weight.dtype), torch.float32)
    x, weight = given.x.to(kind), given.weight.to(kind)
    zero = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    before = zero if given.initial_states is None else given.initial_states.to(kind)
    return torch.cat([before, x], dim=-1), weight, None if given.bias is None else given.bias.to(kind)


def _summed(padded: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Return the convolution before its activation."""
    width = weight.shape[1]
    length = padded.shape[-1] - width + 1
    y = padded.new_zeros(()) if bias is None else bias[:, None]
    for tap in range(width):
        y = y + _own(padded[..., tap : tap + length], seq_idx, width, tap) * weight[:, tap, None]
    return y


def _own(tap_sees: Tensor, seq_idx: Tensor | None, width: int, tap: int) -> Tensor:
    """Return the inputs of a tap, zero if they belong to another sequence."""
    if seq_idx is None:
        return tap_sees
    seen = F.pad(seq_idx, (width - 1 - tap, 0), value=-(2**30))[..., : seq_idx.shape[-1]]
    return tap_sees * (seen == seq_idx)[:, None]


def _gradients(given: Inputs, dout: Tensor, dlast: Tensor | None, seq_idx: Tensor | None, silu: object) -> list[Tensor]:
    """Return gradients of x, weight, bias and initial states, without autograd, which may be off for the caller."""
    padded, weight, bias = _working(given)
    length, width = given.x.shape[2], weight.shape[1]
    dy = dout.to(padded.dtype) if seq_idx is None else dout.to(padded.dtype) * (seq_idx >= 0)[:, None]
    if silu:
        y = _summed(padded, weight, bias, seq_idx)
        sigmoid = torch.sigmoid(y)
        dy = dy * sigmoid * (1 + y * (1 - sigmoid))
    dpadded, dweight = torch.zeros_like(padded), []
    for tap in range(width):
        seen = _own(padded[..., tap : tap + length], seq_idx, width, tap)
        dweight.append((dy * seen).sum((0, 2)))
        dpadded[..., tap : tap + length] += _own(dy * weight[:, tap, None], seq_idx, width, tap)
    if dlast is not None:
        dpadded[..., length:] += dlast
    return [dpadded[..., width - 1 :], torch.stack(dweight, 1), dy.sum((0, 2)), dpadded[..., : width - 1]]


def _named(name: str, known: dict[int, tuple[str, ...]], fixed: int, arguments: tuple[Any, ...]) -> dict[str, Any]:
    if len(arguments) not in known:
        raise TypeError(
            f"{name} got {len(arguments)} arguments; mamba_attn.cpu_stand_ins() supports the releases that take "
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
    with torch.no_grad():
        found = _gradients(given, dout, more.get("dfinal_states"), more.get("seq_idx"), more["silu"])
        results: list[Tensor | None] = []
        for name, tensor, gradient in zip(("dx", "dweight", "dbias", "dinitial_states"), given, found, strict=True):
            into = more.get(name)
            target = torch.empty_like(tensor) if into is None and tensor is not None else into
            results.append(None if target is None else target.copy_(gradient))
    if "dweight" in more:
        return None
    return tuple(results if "return_dinitial_states" in more else results[:3])


def extension_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor | None:
    """One or several steps; updates ``conv_state`` (batch, channels, at least width - 1) in place.

    Releases differ in the rest: silu; silu, cache_seqlens; silu, cache_seqlens, indices; or out before these.

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
        # the oldest releases keep `width` steps and drop the first next
        y, _ = convolve(Inputs(steps, weight, bias, before), None, bool(flags[0]))
        conv_state.copy_(torch.cat([conv_state, steps.to(conv_state.dtype)], dim=-1)[..., -conv_state.shape[-1] :])
        result = y.to(x.dtype).reshape(x.shape)
        return result if out is None else out.copy_(result)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: object = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution.

    Args:
        x: (batch, channels, length).
        weight: (channels, width).
        bias: (channels), or None.
        seq_idx: (batch, length), or None; a string here is the activation, as in release 1.0.
        initial_states: (batch, channels, width - 1), or None.
        return_final_states: also return the last width - 1 steps.
        final_states_out: where to write them.
        activation: None, "silu" or "swish".
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    y, last = convolve(Inputs(x, weight, bias, initial_states), seq_idx, _silu(activation))
    if not return_final_states:
        return y.to(x.dtype)
    last = last.to(x.dtype)
    return y.to(x.dtype), last if final_states_out is None else final_states_out.copy_(last)


causal_conv1d_ref = causal_conv1d_fn


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One or several steps of the convolution; updates ``conv_state`` in place.

    Args:
        x: (batch, channels) or (batch, channels, length).
        conv_state: (batch, channels, at least width - 1).
        weight: (channels, width).
        bias: (channels), or None.
        activation: None, "silu" or "swish".
        cache_seqlens: must be None here.
        conv_state_indices: must be None here.
    """
    flags = (_silu(activation), cache_seqlens, conv_state_indices)
    return cast(Tensor, extension_update(x, conv_state, weight, bias, *flags))


causal_conv1d_update_ref = causal_conv1d_update


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: object,
) -> Tensor | None:
    """``cpp_functions.causal_conv1d_fwd_function``, which mamba_ssm 2 calls."""
    return causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: object,
    silu_activation: object,
) -> tuple[Tensor | None, ...] | None:
    """``cpp_functions.causal_conv1d_bwd_function``."""
    return causal_conv1d_bwd(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
    )


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: object,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor | None:
    """``cpp_functions.causal_conv1d_update_function``."""
    return extension_update(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices)


def _silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"causal_conv1d: activation must be None, 'silu' or 'swish', got {activation!r}.")
    return activation is not None
