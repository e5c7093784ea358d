"""Code as other people write it, small: scans reached through an import, and whatever they like around them."""

import torch
import torch.nn.functional as F
from torch import nn

import mamba_attn

with mamba_attn.cpu_stand_ins():
    import selective_scan_cuda_oflex
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

CHANNELS, STATES, RANK = 6, 3, 2


class CrossScan(torch.autograd.Function):
    """A wrapper around an extension, as VMamba's."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, bias):
        out, states = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
        ctx.save_for_backward(u, delta, A, B, C, D, bias, states)
        return out

    @staticmethod
    def backward(ctx, dout):
        *given, states = ctx.saved_tensors
        return tuple(selective_scan_cuda_oflex.bwd(*given, dout.contiguous(), states, True, 1))


class Scan(nn.Module):
    """One scan of (batch, channels, length), gated, its weights its own."""

    def __init__(self, gated=True):
        super().__init__()
        self.project = nn.Linear(CHANNELS, RANK + 2 * STATES)
        self.step = nn.Linear(RANK, CHANNELS)
        self.A = nn.Parameter(torch.randn(CHANNELS, STATES) / 2)
        self.D = nn.Parameter(torch.randn(CHANNELS))
        self.gated = gated

    def forward(self, u, z=None):
        low, B, C = self.project(u.mT).split([RANK, STATES, STATES], -1)
        delta = F.linear(low, self.step.weight).mT
        given = (B.mT.contiguous(), C.mT.contiguous(), self.D, z if self.gated else None, self.step.bias)
        return selective_scan_fn(u, delta, -torch.exp(self.A), *given, delta_softplus=True)


class Line(nn.Module):
    """A Vim-like mixer: tokens in line, both ways, one gate."""

    def __init__(self, both=True):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.forth, self.back = Scan(), Scan() if both else None

    def forward(self, x):
        u, z = self.enter(x).mT.chunk(2, 1)
        y = self.forth(u, z)
        if self.back is not None:
            y = y + self.back(u.flip(-1), z.flip(-1)).flip(-1)
        return self.leave(y.mT)


class Both(nn.Module):
    """Both directions in one module: two scans of one run."""

    def __init__(self, serial=False):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.A = nn.Parameter(torch.randn(2, CHANNELS, STATES) / 2)
        self.project = nn.Linear(CHANNELS, CHANNELS + 2 * STATES)
        self.serial = serial

    def scan(self, way, u, z):
        delta, B, C = self.project(u.mT).mT.split([CHANNELS, STATES, STATES], 1)
        parts = (B.contiguous(), C.contiguous(), None, z, None)
        return selective_scan_fn(u, delta, -torch.exp(self.A[way]), *parts, delta_softplus=True)

    def forward(self, x):
        u, z = self.enter(x).mT.chunk(2, 1)
        y = self.scan(0, u, z)
        if self.serial:
            return self.leave(self.scan(1, u + y, z).mT)
        return self.leave((y + self.scan(1, u.flip(-1), z.flip(-1)).flip(-1)).mT)


class Cascade(Both):
    """As VMamba's v052dc: along the rows, a norm called as a function, then along the columns of what came out."""

    def forward(self, x):
        u, z = self.enter(x).chunk(2, -1)  # (batch, height, width, channels)
        batch, height, width, _ = x.shape
        rows = self.scan(0, *(t.flatten(0, 1).mT for t in (u, z))).mT.unflatten(0, (batch, height))
        u = F.layer_norm(rows, (CHANNELS,)).transpose(1, 2)
        columns = self.scan(1, *(t.flatten(0, 1).mT for t in (u, z.transpose(1, 2)))).mT
        return self.leave(columns.unflatten(0, (batch, width)).transpose(1, 2))


class Cross(nn.Module):
    """A VMamba-like mixer on (batch, height, width, channels): four ways through an extension without z."""

    def __init__(self, orders):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        self.A = nn.Parameter(torch.randn(4 * CHANNELS, STATES) / 2)
        self.D, self.bias = nn.Parameter(torch.randn(4 * CHANNELS)), nn.Parameter(torch.randn(4 * CHANNELS))
        self.project = nn.Parameter(torch.randn(4, CHANNELS + 2 * STATES, CHANNELS) / 2)
        self.orders = orders

    def forward(self, x):
        orders = self.orders(*x.shape[1:3])
        u = F.silu(self.conv(self.enter(x).permute(0, 3, 1, 2))).flatten(2)
        u = torch.stack([u[..., order] for order in orders], 1)
        delta, B, C = torch.einsum("kdc,bkcl->bkdl", self.project, u).split([CHANNELS, STATES, STATES], 2)
        parts = (B.contiguous(), C.contiguous(), self.D, self.bias)
        y = CrossScan.apply(u.flatten(1, 2), delta.flatten(1, 2), -torch.exp(self.A), *parts)
        y = y.unflatten(1, (4, -1)).to(x.dtype)
        merged = sum(torch.zeros_like(y[:, 0]).index_copy(2, order, y[:, k]) for k, order in enumerate(orders))
        return self.leave(merged.mT.unflatten(1, x.shape[1:3]))


class Windows(nn.Module):
    """Tokens of a grid in windows of 3, padded, the windows in the batch."""

    def __init__(self, side=3, grid=(4, 5)):
        super().__init__()
        self.mixer, self.side, self.grid = Line(), side, grid

    def forward(self, x):
        side, (height, width) = self.side, self.grid
        down, right = -(-height // side), -(-width // side)
        x = F.pad(x.unflatten(1, self.grid), (0, 0, 0, right * side - width, 0, down * side - height))
        x = x.unflatten(2, (right, side)).unflatten(1, (down, side)).movedim(3, 2)
        x = self.mixer(x.reshape(-1, side * side, CHANNELS)).view(-1, down, right, side, side, CHANNELS)
        x = x.movedim(3, 2).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width].flatten(1, 2)


class Shuffled(nn.Module):
    """A mixer whose parent hands it the tokens in another order; one per image where ``sort``."""

    def __init__(self, order=None, sort=False):
        super().__init__()
        self.mixer, self.order, self.sort = Line(both=False), order, sort

    def given(self, x):
        if self.sort:
            return x[..., 0].argsort(1)
        return torch.as_tensor(self.order).expand(len(x), -1)

    def forward(self, x):
        order = self.given(x)[..., None].expand_as(x)
        return torch.zeros_like(x).scatter(1, order, self.mixer(x.gather(1, order)))


class Net(nn.Module):
    """Patches, blocks with norms and residuals, a mean and a classifier; ``flips`` turns every second block around."""

    def __init__(self, *mixers, grid=False, flips=False):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 4, 4)
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(len(mixers) + 1))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(CHANNELS, 5)
        self.grid, self.flips = grid, flips

    def forward(self, images):
        x = self.stem(images).permute(0, 2, 3, 1)
        x = x if self.grid else x.flatten(1, 2)
        for number, (mixer, norm) in enumerate(zip(self.mixers, self.norms, strict=False)):
            turned = self.flips and number % 2
            x = x.flip(1) if turned else x
            x = x + self.drop(mixer(norm(x)))
            x = x.flip(1) if turned else x
        x = self.norms[-1](x)
        return self.head(x.flatten(1, -2).mean(1))
