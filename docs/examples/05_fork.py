"""
My fork: a mixer with names of its own
======================================

Nothing is registered and nothing is subclassed: a scan is seen where it enters the compiled selective scan, and in
which order it walks the tokens is measured.
"""

import torch
import torch.nn.functional as F
from torch import nn

import mamba_attn
from mamba_attn import figures
from mamba_attn.attribution import MambaLRP, RawAttention

with mamba_attn.cpu_stand_ins():  # on a GPU with mamba_ssm installed, a plain import
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn


# %%
# Two scans: along the rows, and from the end along the columns.


class SnakeMixer(nn.Module):
    def __init__(self, width=24, memory=8):
        super().__init__()
        self.entry, self.exit = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.speed = nn.Linear(width, width + 2 * memory)
        self.decay = nn.Parameter(torch.arange(1.0, memory + 1).log().repeat(width, 1))
        self.memory = memory

    def walk(self, u):
        delta, write, read = self.speed(u.mT).mT.split([u.shape[1], self.memory, self.memory], 1)
        return selective_scan_fn(
            u, delta, -self.decay.exp(), write.contiguous(), read.contiguous(), delta_softplus=True
        )

    def forward(self, x):  # (batch, height, width, features)
        u, gate = self.entry(x).permute(0, 3, 1, 2).chunk(2, 1)
        rows = self.walk(u.flatten(2)).view_as(u)
        columns = self.walk(u.mT.flatten(2).flip(-1)).flip(-1).view_as(u.mT).mT
        return self.exit(((rows + columns) * F.silu(gate)).permute(0, 2, 3, 1))


class SnakeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 24, 8, stride=8)
        self.snakes = nn.ModuleList(SnakeMixer() for _ in range(2))
        self.verdict = nn.Linear(24, 4)

    def forward(self, images):
        x = self.cut(images).permute(0, 2, 3, 1)
        for snake in self.snakes:
            x = x + snake(x)
        return self.verdict(x.mean((1, 2)))


torch.manual_seed(0)
model, images = SnakeNet().eval(), torch.rand(1, 3, 64, 64)

# %%
# The matrix of both scans, in the frame of the tokens: the part below the diagonal is the walk along the rows, the
# rest the walk back along the columns.

with torch.no_grad(), mamba_attn.trace(model) as trace:
    model(images)
print([layer.name for layer in trace.layers], [tuple(layer.layout.grid) for layer in trace.layers])
figures.matrix(trace["snakes.0"].attention()[0], title="snakes.0")

# %%
# The orders as they were measured.

figures.scan_path(trace["snakes.0"].scan.read_order, (8, 8), titles=["first scan", "second scan"], size=260)

# %%
# Every method works, those with rules of relevance too.

maps = [method(model).attribute(images)[0, 0] for method in (RawAttention, MambaLRP)]
figures.layer_grid(images[0], maps, ["raw attention", "relevance"], size=240)
