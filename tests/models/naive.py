"""Vim and VMamba recomputed from the equations, token by token, flips and cross-scan done literally."""

import torch
import torch.nn.functional as F


def silu(x):
    return x / (1 + torch.exp(-x))


def softplus(x):
    return torch.log1p(torch.exp(x))


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def scan(u, delta, A, B, C, D):
    """u, delta (batch, length, channels); A (channels, states); B, C (batch, length, states)."""
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]
        outputs.append((C[:, t, None] * h).sum(-1) + D * u[:, t])
    return torch.stack(outputs, 1)


def causal_conv(x, weight, bias):
    """x (batch, length, channels), weight (channels, 1, width)."""
    width = weight.shape[2]
    padded = torch.cat([x.new_zeros(x.shape[0], width - 1, x.shape[2]), x], 1)
    steps = [sum(padded[:, t + k] * weight[:, 0, k] for k in range(width)) for t in range(x.shape[1])]
    return torch.stack(steps, 1) + bias


def vim_mixer(state, prefix, x, order):
    """The mixer on tokens laid out along ``order``, put back afterwards."""

    def p(name):
        return state[f"{prefix}.{name}"]

    inner, z = (x[:, order] @ p("in_proj.weight").T).chunk(2, -1)
    total = 0
    for suffix in ("", "_b"):
        xs, zs = (inner, z) if suffix == "" else (inner.flip(1), z.flip(1))
        u = silu(causal_conv(xs, p(f"conv1d{suffix}.weight"), p(f"conv1d{suffix}.bias")))
        projected = u @ p(f"x_proj{suffix}.weight").T
        rank, states = p(f"dt_proj{suffix}.weight").shape[1], p(f"A{suffix}_log").shape[1]
        low, B, C = projected.split([rank, states, states], -1)
        delta = softplus(low @ p(f"dt_proj{suffix}.weight").T + p(f"dt_proj{suffix}.bias"))
        y = scan(u, delta, -torch.exp(p(f"A{suffix}_log")), B, C, p(f"D{suffix}")) * silu(zs)
        total = total + (y if suffix == "" else y.flip(1))
    back = torch.empty_like(x)
    back[:, order] = (total / 2) @ p("out_proj.weight").T
    return back


def vim(state, images, *, depth, stride, order, position):
    """Logits; ``order`` visits all tokens, the class token stands at ``position`` (None: the mean over patches)."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=stride)
    x = x.flatten(2).transpose(1, 2)
    if position is not None:
        x = torch.cat([x[:, :position], state["cls_token"].expand(len(x), -1, -1), x[:, position:]], 1)
    residual = x + state["pos_embed"]
    for i in range(depth):
        normed = rms_norm(residual, state[f"layers.{i}.norm.weight"])
        residual = residual + vim_mixer(state, f"layers.{i}.mixer", normed, order)
    y = rms_norm(residual, state["norm_f.weight"])
    pooled = y.mean(1) if position is None else y[:, position]
    return pooled @ state["head.weight"].T + state["head.bias"]


def cross_scan(x):
    """(batch, height, width, channels) to the four sequences of VMamba."""
    rows = x.flatten(1, 2)
    columns = x.transpose(1, 2).flatten(1, 2)
    return [rows, columns, rows.flip(1), columns.flip(1)]


def cross_merge(ys, height, width):
    """Back to (batch, height, width, channels), summed."""
    rows = (ys[0] + ys[2].flip(1)).unflatten(1, (height, width))
    return rows + (ys[1] + ys[3].flip(1)).unflatten(1, (width, height)).transpose(1, 2)


def ss2d(state, prefix, x):
    def p(name):
        return state[f"{prefix}.{name}"]

    height, width = x.shape[1:3]
    channels = p("conv2d.weight").shape[0]
    h = x @ p("in_proj.weight").T
    inner, z = (h.chunk(2, -1)) if h.shape[-1] == 2 * channels else (h, None)
    bias = state.get(f"{prefix}.conv2d.bias")
    u = silu(F.conv2d(inner.permute(0, 3, 1, 2), p("conv2d.weight"), bias, padding=1, groups=channels))
    A, D = -torch.exp(p("A_logs")).view(4, channels, -1), p("Ds").view(4, channels)
    rank, states = p("dt_projs_weight").shape[2], A.shape[2]
    ys = []
    for k, sequence in enumerate(cross_scan(u.permute(0, 2, 3, 1))):
        low, B, C = (sequence @ p("x_proj_weight")[k].T).split([rank, states, states], -1)
        delta = softplus(low @ p("dt_projs_weight")[k].T + p("dt_projs_bias")[k])
        ys.append(scan(sequence, delta, A[k], B, C, D[k]))
    y = F.layer_norm(cross_merge(ys, height, width), (channels,), p("out_norm.weight"), p("out_norm.bias"))
    return (y if z is None else y * silu(z)) @ p("out_proj.weight").T


def norm(state, prefix, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{prefix}.weight"], state[f"{prefix}.bias"])


def conv(state, prefix, x, **options):
    """A convolution of channels-last tensors."""
    y = F.conv2d(x.permute(0, 3, 1, 2), state[f"{prefix}.weight"], state[f"{prefix}.bias"], **options)
    return y.permute(0, 2, 3, 1)


def patch_merging(state, prefix, x):
    """Four neighbours (0,0), (1,0), (0,1), (1,1) side by side; odd sides filled with zeros."""
    batch, height, width, features = x.shape
    grid = x.new_zeros(batch, height + height % 2, width + width % 2, features)
    grid[:, :height, :width] = x
    parts = [grid[:, 0::2, 0::2], grid[:, 1::2, 0::2], grid[:, 0::2, 1::2], grid[:, 1::2, 1::2]]
    return norm(state, f"{prefix}.norm", torch.cat(parts, -1)) @ state[f"{prefix}.reduction.weight"].T


def vmamba(state, images, *, depths, v0):
    x = images.permute(0, 2, 3, 1)
    if v0:
        x = norm(state, "patch_embed.2", conv(state, "patch_embed.0", x, stride=4))
    else:
        x = F.gelu(norm(state, "patch_embed.2", conv(state, "patch_embed.0", x, stride=2, padding=1)))
        x = norm(state, "patch_embed.7", conv(state, "patch_embed.5", x, stride=2, padding=1))
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            x = x + ss2d(state, f"{block}.op", norm(state, f"{block}.norm", x))
            if not v0:
                hidden = norm(state, f"{block}.norm2", x) @ state[f"{block}.mlp.fc1.weight"].T
                hidden = F.gelu(hidden + state[f"{block}.mlp.fc1.bias"])
                x = x + hidden @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]
        if i + 1 < len(depths):
            down = f"layers.{i}.downsample"
            if v0:
                x = patch_merging(state, down, x)
            else:
                x = norm(state, f"{down}.3", conv(state, f"{down}.1", x, stride=2, padding=1))
    pooled = norm(state, "classifier.norm", x).mean((1, 2))
    return pooled @ state["classifier.head.weight"].T + state["classifier.head.bias"]


def randomise(model):
    """Give every parameter values that matter: no zero biases, no equal weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            scale = 0.3 if value.ndim < 2 or "A" in name else 1.5 * value[0].numel() ** -0.5
            value.add_(scale * noise)
    return model
