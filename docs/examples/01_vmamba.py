"""
What does my VMamba look at?
============================

Three maps of one photo: what the model reads, what reaches its answer, and what its answer rests on.
"""

import mamba_attn
from mamba_attn import figures, images
from mamba_attn.attribution import AttentionRollout, MambaLRP, RawAttention, attribute_together

# %%
# A trained VMamba with its preprocessing and classes. Your own network takes its place:
# ``mamba_attn.load("net.py:build", weights="best.pth")``, or any ``nn.Module`` and a tensor.

loaded = mamba_attn.load("vmamba_micro", weights="demo")
photo = images.samples()[5]
(answer,) = mamba_attn.explain(loaded, photo, methods="mamba_lrp")
print(answer.best(3))

# %%
# Several methods share one pass through the model.

methods = [RawAttention(loaded.model), AttentionRollout(loaded.model), MambaLRP(loaded.model)]
maps = attribute_together(methods, loaded.transform(photo)[None])
titles = ["what is read", "what reaches the output", "relevance of the class"]
figures.layer_grid(loaded.transform.pixels(photo), [heat[0, 0] for heat in maps], titles, size=240)

# %%
# Relevance is signed: orange speaks for the class, blue against it. The first two maps know nothing of the class.

with mamba_attn.trace(loaded.model) as record:
    loaded.model(loaded.transform(photo)[None])
figures.matrix(record.layers[-1].attention()[0].detach(), title="the attention matrix of the last layer")
