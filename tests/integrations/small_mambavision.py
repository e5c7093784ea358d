"""MambaVision (arXiv 2407.08083) made small, with the names of its parts, every sum written as a loop: the truth."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import naive


def same_convolution(x, conv):
    """Depthwise over (batch, length, channels), as long as before; an even number of taps sees more to the right."""
    taps = conv.weight.shape[-1]
    steps = []
    for t in range(x.shape[1]):
        total = torch.zeros_like(x[:, 0]) if conv.bias is None else conv.bias.expand_as(x[:, 0])
        for k in range(taps):
            source = t + k - (taps - 1) // 2
            if 0 <= source < x.shape[1]:
                total = total + conv.weight[:, 0, k] * x[:, source]
        steps.append(total)
    return torch.stack(steps, 1)


class Mixer(nn.Module):
    """Half of the channels through one scan, the other half around it."""

    def __init__(self, features, d_state=3, d_conv=3, expand=1, conv_bias=False, bias=False):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = features, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * features, math.ceil(features / 16)
        self.use_fast_path, self.layer_idx = True, None
        half = self.d_inner // 2
        self.in_proj = nn.Linear(features, self.d_inner, bias=bias)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, half)
        self.A_log = nn.Parameter(torch.randn(half, d_state) / 2)
        self.D = nn.Parameter(torch.randn(half))
        self.out_proj = nn.Linear(self.d_inner, features, bias=bias)
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, bias=conv_bias)
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, bias=conv_bias)

    def forward(self, hidden_states):
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        u, v = naive.silu(same_convolution(x, self.conv1d_x)), naive.silu(same_convolution(z, self.conv1d_z))
        low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        delta = naive.softplus(self.dt_proj(low) + self.dt_proj.bias)
        y = naive.scan(u, delta, -torch.exp(self.A_log), B, C, self.D)
        return self.out_proj(torch.cat([y, v], -1))


class Attention(nn.Module):
    """Softmax attention with the names of timm's."""

    def __init__(self, features, num_heads=2, qk_norm=False, attn_drop=0.0, fused=True, gated=False):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, features // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, fused
        self.qkv = nn.Linear(features, 3 * features)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.gate = nn.Linear(features, features) if gated else None
        self.proj = nn.Linear(features, features)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        query, key, value = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if self.fused_attn:
            heads = F.scaled_dot_product_attention(query, key, value, dropout_p=self.attn_drop.p)
        else:
            heads = self.attn_drop((query @ key.mT * self.scale).softmax(-1)) @ value
        mixed = heads.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(mixed if self.gate is None else mixed * torch.sigmoid(self.gate(x))))


class Block(nn.Module):
    def __init__(self, mixer, features):
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(features), mixer
        self.norm2, self.mlp = nn.LayerNorm(features), nn.Linear(features, features)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stage(nn.Module):
    """Blocks inside windows, then a convolution of stride 2; without windows the blocks see the grid."""

    def __init__(self, blocks, features, window_size, windowed=True, downsample=True):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.transformer_block, self.window_size = windowed, window_size
        self.downsample = nn.Conv2d(features, 2 * features, 3, 2, 1, bias=False) if downsample else nn.Identity()

    def run(self, block, x):
        return block(x)

    def forward(self, x):
        if not self.transformer_block:
            for block in self.blocks:
                x = x + block(x)
            return self.downsample(x)
        side, (height, width) = self.window_size, x.shape[2:]
        x = F.pad(x, (0, -width % side, 0, -height % side))
        corners = [(i, j) for i in range(0, x.shape[2], side) for j in range(0, x.shape[3], side)]
        windows = [image[:, i : i + side, j : j + side].flatten(1).T for image in x for i, j in corners]
        tokens = torch.stack(windows)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        x = torch.empty_like(x)
        for number, window in enumerate(tokens):
            i, j = corners[number % len(corners)]
            x[number // len(corners), :, i : i + side, j : j + side] = window.T.unflatten(1, (side, side))
        return self.downsample(x[:, :, :height, :width])


class Model(nn.Module):
    """A stem of stride 4, a stage of convolutions, two of windows: mixers first, then attention; the mean over patches.

    The grids of the last two are the image's divided by 8 and by 16, rounded up.
    """

    def __init__(self, windows=(4, 3), features=8, blocks=("mixer", "attention"), classes=5, attention=None, **mixer):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, features, 3, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(features, features, 3, 2, 1, bias=False)
        )

        def block(kind, width):
            made = Mixer(width, **mixer) if kind == "mixer" else Attention(width, **(attention or {}))
            return Block(made, width)

        self.levels = nn.ModuleList(
            [
                Stage([nn.Conv2d(features, features, 3, padding=1)], features, 8, windowed=False),
                Stage([block(kind, 2 * features) for kind in blocks], 2 * features, windows[0]),
                Stage([block(kind, 4 * features) for kind in blocks], 4 * features, windows[1], downsample=False),
            ]
        )
        self.norm = nn.BatchNorm2d(4 * features)
        self.head = nn.Linear(4 * features, classes)

    def forward(self, images):
        x = self.stem(images)
        for level in self.levels:
            x = level(x)
        return self.head(self.norm(x).mean((2, 3)))


def build(dtype=torch.float64, **options):
    """A model in eval mode whose attention is far from uniform."""
    torch.manual_seed(0)
    model = Model(**options)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("dt_proj.bias"):
                value += 0.5
            elif value.ndim > 1 and not name.endswith("A_log"):
                value += torch.randn_like(value) / value[0].numel() ** 0.5
    return model.to(dtype).eval()


def images(size, batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def entering(model, x, names, scalar):
    """What enters ``out_proj`` or, before dropout, the product with the values; and the scalar's gradient there."""
    seen, handles = {}, []

    def keep(name, module, args):
        args[0].retain_grad()
        seen[name] = args[0]

    for name in names:
        mixer = model.get_submodule(name)
        receiver = mixer.out_proj if hasattr(mixer, "out_proj") else mixer.attn_drop
        handles.append(receiver.register_forward_pre_hook(partial(keep, name)))
    scalar(model(x)).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {name: (value.detach(), value.grad) for name, value in seen.items()}


def windows_of(layout):
    """Token indices of every window, cut out of the numbered padded grid one after the other."""
    side = layout.window
    height, width = (math.ceil(n / side) * side for n in layout.grid)
    frame = torch.arange(height * width).view(height, width)
    corners = [(i, j) for i in range(0, height, side) for j in range(0, width, side)]
    return torch.stack([frame[i : i + side, j : j + side].flatten() for i, j in corners])


def in_frame(layout, windows):
    """(batch * windows, length, ...) to (batch, tokens, ...), one window after the other."""
    order = windows_of(layout)
    frame = windows.new_full((len(windows) // len(order), layout.tokens, *windows.shape[2:]), float("nan"))
    for number, window in enumerate(windows):
        frame[number // len(order), order[number % len(order)]] = window
    return frame


def close(actual, expected, tolerance=1e-10):
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def same_as_hooks(layer, slope, value, gradient, tolerance=1e-10):
    """Compare a layer, and the scalar's gradient, with what ``entering`` saw of it in the untouched model."""
    if hasattr(layer, "scan"):
        channels = layer.scan.channels
        close(layer.y.mT, in_frame(layer.layout, value[..., :channels]), tolerance)
        close(layer.scan.bypass.mT, in_frame(layer.layout, value[..., channels:]), tolerance)
        close(slope.mT, in_frame(layer.layout, gradient[..., :channels]), tolerance)
        return
    for actual, windows in ((layer.attention("each"), value), (slope, gradient)):
        expected, order = torch.zeros_like(actual), windows_of(layer.layout)
        for number, window in enumerate(windows):
            tokens = order[number % len(order)]
            expected[number // len(order), :, tokens[:, None], tokens] = window
        close(actual, expected, tolerance)
