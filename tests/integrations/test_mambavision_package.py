"""MambaVision's own package, where it is installed: ``pip install --no-deps mambavision``.

Its licence is non-commercial and nothing of it is here; ``.ci/run`` installs it for this file.
"""

import importlib
import importlib.util

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.attribution import AttentionRollout, RawAttention
from mamba_attn.testing import check_adapter
from tests.integrations.small_mambavision import entering, images, same_as_hooks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mambavision") is None, reason="mambavision is not installed")
TINY = {
    "dim": 16, "in_dim": 8, "depths": [1, 1, 4, 4], "window_size": [8, 8, 14, 7], "mlp_ratio": 2,
    "num_heads": [1, 2, 4, 4], "num_classes": 5, "drop_path_rate": 0.0,
}  # fmt: skip
MODELS = {  # options, images
    "one window in each stage": ({}, (224, 224)),
    "several windows, padded": ({"window_size": [8, 8, 4, 3]}, (160, 240)),
    "odd sizes": ({"window_size": [8, 8, 4, 2], "depths": [1, 1, 3, 2]}, (150, 230)),
    "norms and layer scale": ({"window_size": [8, 8, 4, 3], "qk_scale": True, "layer_scale": 0.5}, (96, 160)),
}


@pytest.fixture(scope="module")
def package():
    with mamba_attn.cpu_stand_ins():
        return importlib.import_module("mambavision.models.mamba_vision")


def livelier(model, size):
    """The model in eval mode with attention far from uniform, and statistics of real activations."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("dt_proj.bias"):
                value += 1
            elif value.ndim > 1 and not name.endswith("A_log"):
                value += torch.randn_like(value) / value[0].numel() ** 0.5
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(images(size, dtype=torch.float32))
    return model.eval()


def build(package, name):
    options, size = MODELS[name]
    return livelier(package.MambaVision(**{**TINY, **options}), size), size


@pytest.mark.parametrize("name", MODELS)
def test_laws(package, name):
    model, size = build(package, name)
    report = check_adapter(model, images(size, dtype=torch.float32))
    assert len(report.layers) == sum(MODELS[name][0].get("depths", TINY["depths"])[2:])
    assert report.output_error <= 1e-5
    assert report.matrix_error <= 1e-5
    assert report.observed_identical


def test_laws_of_mamba_vision_t(package):
    model = package.mamba_vision_T()
    report = check_adapter(model.eval(), images((224, 224), batch=1, dtype=torch.float32))
    assert (len(report.layers), report.observed_identical) == (12, True)
    assert max(report.output_error, report.matrix_error) <= 1e-5


@pytest.mark.parametrize("mode", ["route", "observe"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_equal_hooks(package, fused, mode):
    """To 1e-7 in float64: the package computes A in float32."""
    model, size = build(package, "several windows, padded")
    model, x = model.double(), images(size)
    names = [f"levels.{stage}.blocks.{block}.mixer" for stage in (2, 3) for block in range(4)]
    heads = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in heads:
        module.fused_attn = False
    truth = entering(model, x, names, lambda logits: logits[:, 3].sum())
    for module in heads:
        module.fused_attn = fused
    with mamba_attn.trace(model, mode=mode) as trace:
        logits = model(x)
    gradients = trace.gradients(logits[:, 3].sum())
    assert (len(heads), list(gradients)) == (4, names)
    for layer in trace.layers:
        same_as_hooks(layer, gradients[layer.name], *truth[layer.name], tolerance=1e-7)


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
def test_maps_over_the_whole_model(package, method):
    model, size = build(package, "several windows, padded")
    found = method(model).attribute(images(size, dtype=torch.float32))
    assert found.shape == (2, 1, *size)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found.std((1, 2, 3)) > 0).all()
