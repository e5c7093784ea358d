"""
How far does a token see?
=========================

The effective receptive field: which pixels move the features of the patch in the middle.
"""

import torch

import mamba_attn
from mamba_attn import figures, images
from mamba_attn.erf import receptive_field

fields, names = [], ["vmamba_micro", "vim_micro", "vit_micro"]
for name in names:
    loaded = mamba_attn.load(name, weights="demo")
    batch = torch.stack([loaded.transform(photo) for photo in images.samples()])
    field = receptive_field(loaded.model, batch, reach=False)
    fields.append(field.gradient)

# %%
# Brighter pixels move the patch in the middle more, on average over six photos.

figures.reach([field**0.25 for field in fields], names)
