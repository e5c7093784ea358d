"""The package ``causal_conv1d`` in plain PyTorch, for machines without it; autograd differentiates it."""

from typing import cast

from torch import Tensor

from mamba_attn.stand_ins._conv import Inputs, causal_conv1d_bwd, causal_conv1d_fwd, convolve
from mamba_attn.stand_ins._conv import causal_conv1d_update as _update

__version__ = "1.5.0"  # the release whose signatures these are


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
    """One or several steps of the convolution; moves ``conv_state`` on in place.

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
    return cast(Tensor, _update(x, conv_state, weight, bias, *flags))


causal_conv1d_update_ref = causal_conv1d_update


def causal_conv1d_fwd_function(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None,
    final_states_out: Tensor | None, silu_activation: object,
) -> Tensor | None:  # fmt: skip
    """``cpp_functions.causal_conv1d_fwd_function``, which mamba_ssm 2 calls."""
    return causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)


def causal_conv1d_bwd_function(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, seq_idx: Tensor | None,
    initial_states: Tensor | None, dfinal_states: Tensor | None, dx: Tensor | None, return_dinitial_states: object,
    silu_activation: object,
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """``cpp_functions.causal_conv1d_bwd_function``."""
    return causal_conv1d_bwd(
        x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
    )


def causal_conv1d_update_function(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu_activation: object,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """``cpp_functions.causal_conv1d_update_function``."""
    return _update(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices)


def _silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"causal_conv1d: activation must be None, 'silu' or 'swish', got {activation!r}.")
    return activation is not None
