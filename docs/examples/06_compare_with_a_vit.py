"""
Does Mamba look elsewhere than a ViT?
=====================================

The same question to a Vision Mamba, a VMamba and a ViT, by the same method and by its counterpart for softmax
attention.
"""

import mamba_attn
from mamba_attn import figures, images
from mamba_attn.attribution import AttnLRP, MambaLRP, RawAttention

photo = images.samples()[5]
read, relevant, names = [], [], ["vim_micro", "vmamba_micro", "vit_micro"]
for name in names:
    loaded = mamba_attn.load(name, weights="demo")
    inputs = loaded.transform(photo)[None]
    read.append(RawAttention(loaded.model).attribute(inputs)[0, 0])
    method = AttnLRP if name.startswith("vit") else MambaLRP
    relevant.append(method(loaded.model).attribute(inputs)[0, 0])
pixels = loaded.transform.pixels(photo)

# %%
# What the class token, or the mean patch, reads:

figures.layer_grid(pixels, read, names, size=240)

# %%
# What the predicted class rests on:

figures.layer_grid(pixels, relevant, names, size=240)

# %%
# Pictures next to each other prove little. ``mamba-attn compare --models vim_micro,vmamba_micro,vit_micro`` removes
# what the maps call important and counts, with intervals, how soon each model changes its mind.
