"""Vim and Mamba made small, with the names of their parts, every scan written as a loop: the truth."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import naive


def convolve(x, conv):
    """Causal and depthwise over (batch, length, channels)."""
    return naive.causal_conv(x, conv.weight, torch.zeros(()) if conv.bias is None else conv.bias)


class Mamba(nn.Module):
    """One direction, as mamba_ssm has it: the fast path reads weights, the slow one calls x_proj and out_proj."""

    def __init__(self, features, d_state=3, d_conv=4, expand=2, dt_rank=2, conv_bias=True, bias=False, fast=True):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = features, d_state, d_conv, expand
        self.d_inner, self.dt_rank, self.use_fast_path, self.layer_idx = int(expand * features), dt_rank, fast, None
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(features, 2 * self.d_inner, bias=bias)
        self.add_direction("", conv_bias)
        self.out_proj = nn.Linear(self.d_inner, features, bias=bias)

    def add_direction(self, suffix, conv_bias):
        channels = self.d_inner
        conv = nn.Conv1d(channels, channels, self.d_conv, groups=channels, padding=self.d_conv - 1, bias=conv_bias)
        self.add_module(f"conv1d{suffix}", conv)
        self.add_module(f"x_proj{suffix}", nn.Linear(channels, self.dt_rank + 2 * self.d_state, bias=False))
        self.add_module(f"dt_proj{suffix}", nn.Linear(self.dt_rank, channels))
        self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.randn(channels, self.d_state) / 2))
        self.register_parameter(f"D{suffix}", nn.Parameter(torch.randn(channels)))

    def scanned(self, u, projected, suffix, A):
        """One scan of (batch, length, channels), from the low-rank steps, B and C side by side."""
        low, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], -1)
        step = self.get_submodule(f"dt_proj{suffix}")
        delta = naive.softplus(low @ step.weight.T + step.bias)
        return naive.scan(u, delta, -torch.exp(A), B, C, self.get_parameter(f"D{suffix}"))

    def direction(self, xz, suffix="", A="A_log"):
        """Gated output of a direction that has parts of its own, in its own order."""
        x, z = xz.chunk(2, -1)
        u = naive.silu(convolve(x, self.get_submodule(f"conv1d{suffix}")))
        projection = self.get_submodule(f"x_proj{suffix}")
        projected = u @ projection.weight.T if self.use_fast_path else projection(u)
        return self.scanned(u, projected, suffix, self.get_parameter(A)) * naive.silu(z)

    def entering(self, hidden_states):
        """x and z side by side."""
        xz = hidden_states @ self.in_proj.weight.T
        return xz if self.in_proj.bias is None else xz + self.in_proj.bias

    def forward(self, hidden_states, inference_params=None):
        mixed = self.direction(self.entering(hidden_states))
        if self.use_fast_path:
            return F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        return self.out_proj(mixed)


class Vim(Mamba):
    """Vim's directions; ``marks`` are the settings that say which, and whether their sum is halved."""

    def __init__(self, features, marks=None, conv_bias=True, layer_scale=None, **options):
        super().__init__(features, conv_bias=conv_bias, **options)
        for name, value in (marks or {"bimamba_type": "v2", "if_divide_out": True}).items():
            setattr(self, name, value)
        self.init_layer_scale = layer_scale
        if layer_scale is not None:
            self.gamma = nn.Parameter(layer_scale * torch.randn(features))
        if self.both():
            self.add_direction("_b", conv_bias)
        elif getattr(self, "bimamba_type", None) == "v1":
            self.A_b_log = nn.Parameter(torch.randn(self.d_inner, self.d_state) / 2)

    def both(self):
        return getattr(self, "bimamba_type", None) == "v2" or getattr(self, "biscan", False)

    def halved(self):
        return any(getattr(self, name, False) for name in ("if_divide_out", "if_devide_out", "biscan"))

    def forward(self, hidden_states, inference_params=None):
        if self.use_fast_path and hasattr(self, "A_b_log"):
            xz = self.entering(hidden_states)
            mixed = self.direction(xz)
            if self.both():
                mixed = mixed + self.direction(xz.flip(1), "_b", "A_b_log").flip(1)
                mixed = mixed / 2 if self.halved() else mixed
            else:  # v1: what the forward convolution gave, walked backwards
                x, z = xz.chunk(2, -1)
                u = naive.silu(convolve(x, self.conv1d))
                projected = u @ self.x_proj.weight.T
                back = self.scanned(u.flip(1), projected.flip(1), "", self.A_b_log) * naive.silu(z.flip(1))
                mixed = mixed + back.flip(1)
            output = F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        else:
            output = super().forward(hidden_states)
        return output if self.init_layer_scale is None else output * self.gamma


class Block(nn.Module):
    """Norm and mixer, the residual stream beside; the mixer gets its inference parameters by name."""

    def __init__(self, features, mixer):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(features), mixer

    def forward(self, hidden_states, residual=None, inference_params=None):
        residual = hidden_states if residual is None else residual + hidden_states
        return self.mixer(self.norm(residual), inference_params=inference_params), residual


class PatchEmbed(nn.Module):
    """Patches by one convolution, normed or not."""

    def __init__(self, features, patch_size, stride, norm):
        super().__init__()
        self.proj = nn.Conv2d(3, features, patch_size, stride)
        self.norm = nn.LayerNorm(features) if norm else nn.Identity()

    def forward(self, images):
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class Backbone(nn.Module):
    """Class tokens or registers at given places among the patches, position embeddings before or after they come in.

    ``others`` maps a parameter's name to the places of its tokens.
    """

    def __init__(
        self,
        mixers,
        grid,
        others=None,
        *,
        features=8,
        patch_size=4,
        stride=None,
        position="after",
        norm=False,
        drop=0.0,
    ):
        super().__init__()
        self.others = others or {}
        count = grid[0] * grid[1]
        self.total = count + sum(len(places) for places in self.others.values())
        self.patch_embed = PatchEmbed(features, patch_size, stride or patch_size, norm)
        for name, places in self.others.items():
            self.register_parameter(name, nn.Parameter(torch.randn(1, len(places), features)))
        self.position = position
        if position is not None:
            length = self.total if position == "after" else count
            self.pos_embed = nn.Parameter(torch.randn(1, length, features))
        self.pos_drop = nn.Dropout(drop)
        self.layers = nn.ModuleList(Block(features, mixer) for mixer in mixers)
        self.head = nn.Linear(features, 5)

    def forward(self, images, places=None, order=None):
        x = self.patch_embed(images)
        if self.position == "before":
            x = x + self.pos_embed
        slots = dict(self.others if places is None else places)
        rows = torch.ones(self.total, dtype=torch.bool)
        rows[[place for some in slots.values() for place in some]] = False
        tokens = x.new_empty(len(x), self.total, x.shape[-1])
        tokens[:, rows] = x
        for name, some in slots.items():
            tokens[:, list(some)] = self.get_parameter(name).expand(len(x), -1, -1)
        if self.position == "after":
            tokens = tokens + self.pos_embed
        tokens = self.pos_drop(tokens)
        hidden, residual = tokens if order is None else tokens[:, order], None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.head((residual + hidden).mean(1))
