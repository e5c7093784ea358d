"""Small models of every shape that attribution meets, in float64, and their matrices by the definition."""

import torch

from mamba_attn.models.vim import VisionMamba
from mamba_attn.models.vmamba import VSSM
from mamba_attn.ops import hidden_attention
from mamba_attn.tracing import trace

SIZE = (40, 24)  # not square; 5 x 3 patches of 8
VIM = {"image_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 3, "d_state": 3, "num_classes": 5}


def vim(**options):
    return _livelier(VisionMamba(**{**VIM, **options}))


def vmamba(**options):
    return _livelier(VSSM(**{"dims": 8, "depths": (1, 2, 1), "d_state": 2, "num_classes": 5, **options}))


MODELS = {
    "middle": lambda: vim(),
    "first": lambda: vim(class_token="first", order="hilbert"),
    "pooled": lambda: vim(class_token=None),
    "overlapping": lambda: vim(stride=4),
    "vmamba": lambda: vmamba(),
    "vmamba_v0": lambda: vmamba(generation="v0", mlp_ratio=0.0),
}


def images(batch=3, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def matrices(model, inputs):
    """(layout, signed channel-mean matrix) of every layer, from the recurrence's definition."""
    with torch.no_grad(), trace(model, mode="observe") as record:
        model(inputs)
    return [(layer.layout, hidden_attention(layer.scan, backend="reference")) for layer in record.layers]


def _livelier(model):
    """Weights so large that attention is far from zero."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_proj_b.bias", "dt_projs_bias")):
                value += 3
            elif value.ndim > 1 and "A_" not in name:
                value += torch.randn(value.shape, generator=generator, dtype=value.dtype) / value[0].numel() ** 0.5
    return model
