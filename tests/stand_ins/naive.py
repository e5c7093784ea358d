"""The scan and the convolution as plain loops, in the type of their inputs: the truth of these tests."""

import torch
import torch.nn.functional as F


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False):
    """(y * silu(z), state after the last step), one channel and one step after the other."""
    batch, channels, length = u.shape
    rows, last = [], []
    for c in range(channels):
        state, row = torch.zeros(batch, A.shape[1], dtype=u.dtype), []
        for t in range(length):
            step = delta[:, c, t] if delta_bias is None else delta[:, c, t] + delta_bias[c]
            step = F.softplus(step) if softplus else step
            b, c_ = (_at(x, c, t, channels) for x in (B, C))
            state = torch.exp(step[:, None] * A[c]) * state + (step * u[:, c, t])[:, None] * b
            y = (state * c_).sum(-1)
            y = y if D is None else y + D[c] * u[:, c, t]
            row.append(y if z is None else y * z[:, c, t] * torch.sigmoid(z[:, c, t]))
        rows.append(torch.stack(row, -1))
        last.append(state)
    return torch.stack(rows, 1), torch.stack(last, 1)


def _at(x, channel, step, channels):
    if x.ndim == 2:
        return x[channel]
    if x.ndim == 3:
        return x[:, :, step]
    return x[:, channel * x.shape[1] // channels, :, step]


def conv(x, weight, bias=None, silu=False, before=None, seq_idx=None):
    """Causal depthwise convolution."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    out = []
    for t in range(length):
        y = torch.zeros(batch, channels, dtype=x.dtype) if bias is None else bias.expand(batch, channels)
        for k in range(width):
            at = t - (width - 1) + k
            if at >= 0:
                same = 1 if seq_idx is None else (seq_idx[:, at] == seq_idx[:, t]).to(x.dtype)[:, None]
                y = y + weight[:, k] * x[:, :, at] * same
            elif before is not None:
                y = y + weight[:, k] * before[:, :, width - 1 + at]
        y = y * torch.sigmoid(y) if silu else y
        out.append(y if seq_idx is None else y * (seq_idx[:, t] >= 0).to(x.dtype)[:, None])
    return torch.stack(out, -1)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, row by row."""
    rows = [row * weight / torch.sqrt((row * row).mean() + eps) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(x.shape)


def close(found, truth, tolerance):
    """Whether the largest error is within ``tolerance`` of the largest value."""
    assert found.shape == truth.shape
    error = (found.double() - truth.double()).abs().max()
    assert error <= tolerance * truth.double().abs().max(), float(error)
