"""
What speaks for another class?
==============================

``target`` is any class, not only the predicted one.
"""

import mamba_attn
from mamba_attn import figures, images
from mamba_attn.attribution import MambaAttribution, MambaLRP

loaded = mamba_attn.load("vmamba_micro", weights="demo")
photo = images.samples()[1]
inputs = loaded.transform(photo)[None]
scores = loaded.model(inputs)[0]
best, second = scores.topk(2).indices.tolist()
print(loaded.classes[best], "before", loaded.classes[second])

# %%
# One map per class. Orange speaks for it, blue against it.

method = MambaLRP(loaded.model)
maps = [method.attribute(inputs, target)[0, 0] for target in (best, second)]
titles = [loaded.classes[each] for each in (best, second)]
figures.layer_grid(loaded.transform.pixels(photo), maps, titles, shared=True, size=260)

# %%
# Why the one and not the other: a target may be a function of the output.

contrast = method.attribute(inputs, lambda logits: logits[:, best] - logits[:, second])
figures.overlay(loaded.transform.pixels(photo), contrast[0, 0], title=f"{titles[0]} rather than {titles[1]}")

# %%
# Gradient times attention is class-specific too, and costs a backward pass and the full matrices.

through = MambaAttribution(loaded.model).attribute(inputs, best)
figures.overlay(loaded.transform.pixels(photo), through[0, 0], title="gradient x attention")
