"""
Why is this detector's box here?
================================

A detector returns boxes and scores. A target is then a function of the output: it returns the number to explain, one
per image.
"""

import torch
from torch import nn

import mamba_attn
from mamba_attn import figures, images
from mamba_attn.attribution import MambaAttribution

# %%
# A small detector on a trained VMamba: the class scores of the patches, and the box around where they are high.

loaded = mamba_attn.load("vmamba_micro", weights="demo")


class Detector(nn.Module):
    def __init__(self, model, label):
        super().__init__()
        self.model, self.label = model, label

    def forward(self, images):
        x = self.model.patch_embed(images)
        for layer in self.model.layers:
            x = layer(x)
        scores = self.model.classifier.head(self.model.classifier.norm(x))[..., self.label]  # (batch, rows, columns)
        weight = (scores / 2).flatten(1).softmax(1).view_as(scores)
        sides = []
        for other in (1, 2):  # along columns, then rows
            share, cell = weight.sum(other), images.shape[2] / len(weight[0])
            places = cell * (torch.arange(len(weight[0])) + 0.5)
            centre = (share * places).sum(1)
            spread = (share * (places - centre[:, None]) ** 2).sum(1).sqrt()
            sides.append((centre - 1.5 * spread, centre + 1.5 * spread))
        (left, right), (top, bottom) = sides
        return {"boxes": torch.stack([left, top, right, bottom], 1)[:, None], "scores": scores.amax((1, 2))[:, None]}


photo = images.samples()[5]
inputs, pixels = loaded.transform(photo)[None], loaded.transform.pixels(photo)
label = int(loaded.model(inputs).argmax())
model = Detector(loaded.model, label).eval()
with torch.no_grad():
    box = model(inputs)["boxes"][0, 0]
print(loaded.classes[label], [round(side) for side in box.tolist()])

# %%
# Two questions, two functions: why such a score, and why does the box end on the right where it does? (``MambaLRP``
# would refuse the second: a softmax is no sum of what patches contribute.)

method = MambaAttribution(model)
score = method.attribute(inputs, lambda output: output["scores"][:, 0])
right = method.attribute(inputs, lambda output: output["boxes"][:, 0, 2])
figure = figures.layer_grid(pixels, [score[0, 0], right[0, 0]], ["the score", "the right side"], size=260)
left, top, right_side, bottom = box.tolist()
for column in (1, 2):
    figure.add_shape(type="rect", x0=left, y0=top, x1=right_side, y1=bottom, line_color="cyan", row=1, col=column)
figure
