"""
An image that is not square
===========================

Any size works that the network takes; the map has the size of the image.
"""

import numpy as np
import torch

import mamba_attn
from mamba_attn import figures, images, models
from mamba_attn.attribution import MambaLRP

# %%
# Two photos side by side, 128 x 256 pixels, for a VMamba trained on squares.

model = models.create("vmamba_micro", weights="demo")
transform = models.transform("vmamba_micro")
first, second = (transform.pixels(images.samples()[number]) for number in (1, 5))
wide = np.concatenate([first, second], 1)  # (rows, columns, 3)
inputs = torch.cat([transform(images.samples()[number]) for number in (1, 5)], 2)[None]
print(tuple(inputs.shape))

# %%
# The two likeliest classes, and where each sits.

with torch.no_grad():
    scores = model(inputs)[0]
classes = models.registry.demo_card("vmamba_micro")["classes"]
best = scores.topk(2).indices.tolist()
heat = [MambaLRP(model).attribute(inputs, target)[0, 0] for target in best]
figures.layer_grid(wide, heat, [classes[target] for target in best], columns=1, size=220)

# %%
# A rectangle's grid of patches, and how a row of it is read.

with torch.no_grad(), mamba_attn.trace(model) as trace:
    model(inputs)
layer = trace.layers[-1]
print(layer.layout.grid)
figures.patch_view(layer.row(0)[0].view(layer.layout.grid), image=wide, title="what the first patch reads")
