"""
Watch the maps while training
=============================

Every few steps, maps of the same images. The model is as it was: modes, gradients and random numbers.
"""

import torch
from torch import nn

from mamba_attn import figures, models
from mamba_attn.attribution import MambaLRP

# %%
# A toy task: a bright square is left or right. The network sees what matters within seconds.


def batch(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = 0.2 * torch.rand(count, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    rows = torch.randint(0, 3, (count,), generator=generator)
    for picture, label, row in zip(pictures, labels.tolist(), rows.tolist(), strict=True):
        picture[:, 8 * row : 8 * row + 8, 24 * label : 24 * label + 8] = 1
    return pictures, labels


torch.manual_seed(0)
model = models.create("vim_micro", num_classes=2, image_size=32, depth=2, patch_size=8).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
shown, truth = batch(1, 99)

# %%
# In the loop: switch to eval mode for the map, and back. ``writer.add_image(..., figures.overlay_rgb(...))`` would
# send it to TensorBoard.

maps, titles = [], []
for step in range(41):
    inputs, labels = batch(32, step)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    if step % 10 == 0:
        model.eval()
        maps.append(MambaLRP(model).attribute(shown, truth)[0, 0])
        model.train()
        titles.append(f"step {step}, loss {loss.item():.2f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
figures.layer_grid(shown[0], maps, titles, size=200)

# %%
# :doc:`/how-to/training_loop` is the version to copy, which also keeps frozen parts frozen.
