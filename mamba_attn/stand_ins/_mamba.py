"""``mamba_ssm.Mamba`` in plain PyTorch, for machines without mamba_ssm."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn.models._layers import undecayed
from mamba_attn.models.vim_mixer import finish, project
from mamba_attn.ops import selective_scan


class Mamba(nn.Module):
    """The Mamba mixer (arXiv 2312.00752, section 3.4), with the names, shapes and initial values of mamba_ssm's.

    Args:
        d_model: features of a token.
        d_state: states per channel.
        d_conv: taps of the causal convolution.
        expand: channels per feature.
        dt_rank: rank of the step-size projection; "auto" is d_model / 16, rounded up.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init: "random" or "constant" weights of that projection.
        dt_scale: multiplies them.
        dt_init_floor: least initial step size.
        conv_bias: whether the convolution has a bias.
        bias: whether the input and output projections have one.
        use_fast_path: kept, without effect.
        layer_idx: kept, without effect.
        device: of the parameters.
        dtype: of the parameters.
        variant: arguments of mamba_ssm's forks, which are refused.
    """

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | str = "auto",
        dt_min: float = 0.001, dt_max: float = 0.1, dt_init: str = "random", dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4, conv_bias: bool = True, bias: bool = False, use_fast_path: bool = True,
        layer_idx: int | None = None, device: Any = None, dtype: Any = None, **variant: Any,
    ) -> None:  # fmt: skip
        if variant:
            raise TypeError(
                f"Mamba(...) got {', '.join(variant)}: these belong to a fork of mamba_ssm, and mamba_ssm cannot be "
                "imported here. Put the fork on sys.path (for Vim: its folder mamba-1p1p1) before cpu_stand_ins()."
            )
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = channels = int(expand * d_model)
        self.dt_rank = rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.in_proj = nn.Linear(d_model, 2 * channels, bias=bias, **where)
        self.conv1d = nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias, **where
        )
        self.activation = "silu"
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(channels, rank + 2 * d_state, bias=False, **where)
        self.dt_proj = nn.Linear(rank, channels, **where)
        scale = rank**-0.5 * dt_scale
        with torch.no_grad():
            self.dt_proj.weight.fill_(scale) if dt_init == "constant" else self.dt_proj.weight.uniform_(-scale, scale)
            step = torch.empty(channels, device=device).uniform_(math.log(dt_min), math.log(dt_max)).exp()
            step = step.clamp(min=dt_init_floor)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).repeat(channels, 1)
        self.A_log = undecayed(A.log())
        self.D = undecayed(torch.ones(channels, device=device))
        self.out_proj = nn.Linear(channels, d_model, bias=bias, **where)

    def forward(self, hidden_states: Tensor, inference_params: Any = None, **sequences: Any) -> Tensor:
        """(batch, length, d_model) to the same.

        Raises:
            NotImplementedError: steps with a cache, or several sequences in one row.
        """
        if inference_params is not None or any(value is not None for value in sequences.values()):
            raise NotImplementedError(
                "Mamba(hidden_states, inference_params, ...): mamba_attn.cpu_stand_ins() stands in for whole "
                "sequences, not for steps with a cache nor for several sequences in one row."
            )
        record = project(self, hidden_states)
        return finish(self, record, selective_scan(record))
