"""
Why does this pixel have this class?
====================================

A segmentation network has a score per class and pixel. A tuple names one: ``target=(class, row, column)``.
"""

import torch
from torch import nn

import mamba_attn
from mamba_attn import figures, images
from mamba_attn.attribution import MambaLRP, RawAttention

# %%
# A network with dense outputs: the trained VMamba, whose classifier is applied to every patch instead of their
# mean.

loaded = mamba_attn.load("vmamba_micro", weights="demo")


class Dense(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        x = self.model.patch_embed(images)
        for layer in self.model.layers:
            x = layer(x)
        scores = self.model.classifier.head(self.model.classifier.norm(x))  # (batch, rows, columns, classes)
        return nn.functional.interpolate(scores.permute(0, 3, 1, 2), images.shape[2:])


model = Dense(loaded.model).eval()
photo = images.samples()[5]
inputs, pixels = loaded.transform(photo)[None], loaded.transform.pixels(photo)
with torch.no_grad():
    scores = model(inputs)
print(tuple(scores.shape))
label = int(scores.mean((2, 3)).argmax())
figures.overlay(pixels, scores[0, label], title=f"score of {loaded.classes[label]} per pixel")

# %%
# What the score of two pixels rests on. The marked pixel is the one that is explained.

method, places = MambaLRP(model), [(40, 30), (90, 70)]
maps = [method.attribute(inputs, target=(label, *place))[0, 0] for place in places]
figures.layer_grid(pixels, maps, [f"pixel {place}" for place in places], shared=True, size=260)

# %%
# ``pixel`` asks whose attention is read, whatever the class.

read = RawAttention(model).attribute(inputs, pixel=places[1])
figures.overlay(pixels, read[0, 0], title=f"what the patch at {places[1]} reads")
