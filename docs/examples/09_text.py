"""
Which words does the answer rest on?
====================================

Ids of tokens go in, a number per token comes out.
"""

from mamba_attn import figures, models, trace
from mamba_attn.attribution import MambaLRP
from mamba_attn.models import registry

model, vocabulary = models.create("mamba_reviews", weights="demo"), registry.vocabulary("mamba_reviews")
ids = vocabulary.encode("a charming and hilarious film, though the last act is a little dull.")
words = vocabulary.decode(ids[0])

# %%
# What each word says for the predicted class, and for the other one.

heat = MambaLRP(model).attribute(ids)
for word, value in zip(words, heat[0].tolist(), strict=True):
    print(f"{word!r:14} {value:+.2f}")

# %%
# What the last token reads in every layer.

with trace(model) as record:
    model(ids)
rows = [layer.row(ids.shape[1] - 1)[0].detach() for layer in record.layers]
figures.token_grid([row.tolist() for row in rows], words, [layer.name for layer in record.layers])
