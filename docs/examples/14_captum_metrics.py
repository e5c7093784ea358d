"""
Captum's wrappers and metrics
=============================

Every method is a captum ``Attribution``: its noise tunnel and its metrics take them.
"""

import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max

import mamba_attn
from mamba_attn import figures, images
from mamba_attn.attribution import MambaLRP, RandomMap, RawAttention

loaded = mamba_attn.load("vmamba_micro", weights="demo")
photo = images.samples()[5]
inputs = loaded.transform(photo)[None]
label = int(loaded.model(inputs).argmax())

# %%
# SmoothGrad over relevance: the mean of maps of noisy copies.

torch.manual_seed(0)
smooth = NoiseTunnel(MambaLRP(loaded.model)).attribute(inputs, nt_samples=4, stdevs=0.1, target=label)
plain = MambaLRP(loaded.model).attribute(inputs, label)
figures.layer_grid(loaded.transform.pixels(photo), [plain[0, 0], smooth[0, 0]], ["plain", "noise tunnel"], size=260)

# %%
# Sensitivity: how much a map changes when the image hardly does. Infidelity: how badly map times change predicts
# the change of the score (lower is better). ``expand=True`` returns maps with the images' colours, as captum's
# metrics want them.


def noisy(images):
    noise = 0.1 * torch.randn_like(images)
    return noise, images - noise


for method in (RawAttention(loaded.model), MambaLRP(loaded.model), RandomMap(loaded.model)):
    torch.manual_seed(0)
    heat = method.attribute(inputs, label, expand=True)
    heat = heat / heat.abs().sum()
    wrong = infidelity(loaded.model, noisy, inputs, heat, target=label, n_perturb_samples=8, normalize=True)
    change = sensitivity_max(method.attribute, inputs, target=label, n_perturb_samples=3)
    print(f"{type(method).__name__:14} infidelity {wrong.item():.3f}, sensitivity {change.item():.2f}")
