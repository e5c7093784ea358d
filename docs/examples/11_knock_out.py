"""
Does the model need what it reads?
==================================

A map says what is important; removing it says whether that is true. ``knockout`` runs the model without some entries
of its attention matrices, exactly.
"""

import torch

import mamba_attn
from mamba_attn import figures, images, knockout
from mamba_attn.attribution import MambaLRP

loaded = mamba_attn.load("vim_micro", weights="demo")
photo = images.samples()[5]
inputs, pixels = loaded.transform(photo)[None], loaded.transform.pixels(photo)
with torch.no_grad(), mamba_attn.trace(loaded.model) as trace:
    scores = loaded.model(inputs)[0]
label = int(scores.argmax())
layout = trace.layers[0].layout
patches = layout.patches
print(loaded.classes[label], layout.grid, len(patches), "patches")

# %%
# Relevance by patch, and a quarter of the patches at each end of the ranking.

heat = MambaLRP(loaded.model).attribute(inputs, label)[0, 0]
rows, columns = layout.grid
cells = heat.view(rows, 128 // rows, columns, 128 // columns).sum((1, 3)).flatten()
ranking = cells.argsort(descending=True)
figures.overlay(pixels, heat, title=f"what speaks for {loaded.classes[label]}")

# %%
# Nobody reads these patches, in any layer.

for name, chosen in (("highest quarter", ranking[:64]), ("lowest quarter", ranking[-64:])):
    with torch.no_grad(), knockout(loaded.model, columns=[int(patches[cell]) for cell in chosen]):
        without = loaded.model(inputs)[0]
    print(f"without the {name}: logit {scores[label]:.2f} -> {without[label]:.2f}")

# %%
# Layer by layer: which layer needs to read the highest quarter?

lost = []
for number in range(len(trace.layers)):
    with torch.no_grad(), knockout(loaded.model, layers=number, columns=[int(patches[cell]) for cell in ranking[:64]]):
        lost.append([float(scores[label] - loaded.model(inputs)[0, label])])
figures.token_grid(lost, ["loss of the logit"], [layer.name for layer in trace.layers])
