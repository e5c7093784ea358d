"""
Does the order of the scan matter?
==================================

The same weights read the patches along other paths. ``order`` is an option of the bundled models; in your own code it
is a permutation before the scan and its inverse behind it.
"""

import torch

import mamba_attn
from mamba_attn import figures, images, orders
from mamba_attn.attribution import RawAttention

names = ["raster", "diagonal", "morton"]
paths = torch.stack([getattr(orders, name)(8, 8) for name in names])
figures.scan_path(paths, (8, 8), titles=names, size=220)

# %%
# The model was trained in raster order; the answer shows how much it depends on it.

photo, maps = images.samples()[5], []
for name in names:
    loaded = mamba_attn.load("vmamba_micro", weights="demo", order=name)
    inputs = loaded.transform(photo)[None]
    with torch.no_grad():
        share, label = loaded.model(inputs).softmax(1)[0].max(0)
    print(f"{name:10} {loaded.classes[int(label)]} {share:.0%}")
    maps.append(RawAttention(loaded.model).attribute(inputs, pixel=(64, 64))[0, 0])

# %%
# What the patch in the middle reads, in each order.

figures.layer_grid(loaded.transform.pixels(photo), maps, names, size=220)
