"""
A volume, or a video
====================

Tokens may lie on a line, a plane or in space: scans of a CT, or frames of a video.
"""

import torch
from torch import nn

import mamba_attn
from mamba_attn import TokenLayout, figures
from mamba_attn.attribution import MambaLRP, RawAttention

with mamba_attn.cpu_stand_ins():  # on a GPU with mamba_ssm installed, a plain import
    from mamba_ssm import Mamba


# %%
# Patches of 4 x 4 x 4 voxels, flattened, then plain Mamba blocks.


class VolumeNet(nn.Module):
    def __init__(self, width=24, classes=2):
        super().__init__()
        self.stem = nn.Conv3d(1, width, 4, stride=4)
        self.blocks = nn.ModuleList(Mamba(d_model=width, d_state=8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, volume):
        x = self.stem(volume).flatten(2).mT
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean(1))


torch.manual_seed(0)
model = VolumeNet()
grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side) for side in (8, 24, 24)], indexing="ij"))

# %%
# The task: is there a ball in the volume? Some seconds of training.


def volumes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 3, 1, 1, 1, generator=generator) - 0.5
    ball = ((grid[None] - centre).norm(dim=1, keepdim=True) < 0.5).float()
    there = torch.randint(2, (count,), generator=generator)
    noise = 0.2 * torch.randn(count, 1, 8, 24, 24, generator=generator)
    return noise + ball * there.view(-1, 1, 1, 1, 1), there


optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(25):
    inputs, labels = volumes(16, step)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
inputs, labels = volumes(8, 99)
right = (model(inputs).argmax(1) == labels).sum()
print(f"loss {loss.item():.2f}, {right} of 8 right")

# %%
# The blocks see a line of tokens; ``layout`` says where they lie. A map has a number per voxel. ``figures.volume``
# shows the strongest slice, and the maximum over all.

number = int(labels.argmax())
layout = TokenLayout(grid=(2, 6, 6), patch_size=4)
heat = MambaLRP(model, layout=layout).attribute(inputs[number : number + 1], 1)
print(tuple(heat.shape))
volume = inputs[number, 0].clamp(0, 1).numpy()
figures.volume(volume, heat[0, 0].detach().numpy(), title="what speaks for a ball")

# %%
# What is read, from where to where: one layer's matrix over all 72 tokens.

with torch.no_grad(), mamba_attn.trace(model, layout=layout) as trace:
    model(inputs[number : number + 1])
print(trace.layers[0].layout.grid)
read = RawAttention(model, layout=layout).attribute(inputs[number : number + 1])
figures.volume(volume, read[0, 0].detach().numpy(), title="what is read")
