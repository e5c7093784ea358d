"""Small models of every shape that attribution meets, in float64, and their matrices by the definition."""

import torch
import torch.nn.functional as F

from mamba_attn.models.vim import VisionMamba
from mamba_attn.models.vmamba import VSSM
from mamba_attn.ops import hidden_attention, reference
from mamba_attn.tracing.tracer import trace

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


def averaging(fine, coarse):
    """(coarse, fine) matrix of a downsampling layer by 2, by pooling every unit vector."""
    units = torch.eye(fine[0] * fine[1], dtype=torch.float64).view(-1, 1, *fine)
    pooled = F.avg_pool2d(units, 2, ceil_mode=True, count_include_pad=False)
    assert pooled.shape[2:] == coarse
    return pooled.flatten(1).T


def of_one_token(layout, gradient):
    """The gradient times the number of patches, in a model that averages over them."""
    return gradient if layout.class_tokens else gradient * layout.grid[0] * layout.grid[1]


def in_pixels(maps):
    """Mean of (layout, row) over layers, in pixels, what a token has spread over its area."""
    finest = max(layout.grid[0] * layout.grid[1] for layout, _ in maps)
    drawn = [
        layout.to_pixels(layout.to_grid(row), SIZE) * (layout.grid[0] * layout.grid[1] / finest) for layout, row in maps
    ]
    return torch.stack(drawn).mean(0).unsqueeze(1)


def layers_of(model, inputs):
    """The layers of a pass without gradients, recomputed from the mixers' inputs."""
    with torch.no_grad(), trace(model, mode="observe") as record:
        model(inputs)
    return record.layers


def per_channel(layer):
    """(batch, routes, channels, length, length) by the definition, in scan order."""
    return reference.hidden_attention(layer.scan, None, None, "each")


def through_matrices(model, inputs, layer, matrices):
    """Logits of the untouched model whose one scan is replaced by explicit matrices of every channel and route."""
    scan, mixer = layer.scan, model.get_submodule(layer.name)

    def replace(module, args):
        routes = torch.einsum("brcij,brcj->brci", matrices, scan.u) + scan.D.unsqueeze(-1) * scan.u
        y = reference.merge_tokens(scan, routes)
        y = y if scan.gate is None or hasattr(mixer, "out_norm") else y * scan.gate
        return y.mT.reshape(args[0].shape)

    receiver = mixer.out_norm if hasattr(mixer, "out_norm") else mixer.out_proj
    handle = receiver.register_forward_pre_hook(replace)
    logits = model(inputs)
    handle.remove()
    return logits


def class_or_mean(layout):
    """Row vector of the default query."""
    tokens = list(layout.class_tokens) or list(range(layout.tokens))
    return torch.zeros(layout.tokens, dtype=torch.float64).index_fill(0, torch.tensor(tokens), 1 / len(tokens))


def product_less_identity(model, steps, normalise=False):
    """Row of the default query in the dense product of I + W, last to first, less that of the identities alone.

    With normalise, both have their rows divided by those of I + W.
    """
    product = alone = before = None
    for layout, weighted in steps:
        eye = torch.eye(layout.tokens, dtype=torch.float64).expand_as(weighted)
        sums = 1 + weighted.sum(-1, keepdim=True) if normalise else 1
        step, identity = (eye + weighted) / sums, eye / sums
        if product is None:
            product, alone = step, identity
        else:
            down = eye if before == layout.grid else averaging(before, layout.grid)
            product, alone = step @ down @ product, identity @ down @ alone
        before = layout.grid
    start = class_or_mean(steps[-1][0])
    return start @ product - start @ alone


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
