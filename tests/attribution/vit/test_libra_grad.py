"""LibraGrad: complete, and its maps from gradients that autograd takes of a network frozen by hand."""

import pytest
import torch

from mamba_attn.attribution import FrozenContribution, LibraGrad
from mamba_attn.attribution.vit.libra_grad import LibraRules
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import images, vim
from tests.attribution.vit.test_attn_lrp import TARGET, vit

OPTIONS = pytest.mark.parametrize("options", [{"depth": 2}, {"depth": 2, "qk_norm": True, "reg_tokens": 2,
                                                             "init_values": 0.5, "class_token": False,
                                                             "global_pool": "avg"}])  # fmt: skip


@OPTIONS
def test_tokens_and_biases_are_the_logit(options):
    model, inputs = vit(**options), images()
    with torch.no_grad():
        logits = model(inputs)[range(3), TARGET]
    tokens, biases, others = LibraGrad(model).contributions(inputs, TARGET)
    torch.testing.assert_close(tokens.sum(1) + biases.sum(1) + others, logits, rtol=0, atol=1e-12)
    assert biases.abs().min() > 0
    pooled = options.get("global_pool") == "avg"
    torch.testing.assert_close(others, model.head.bias[TARGET], rtol=0, atol=1e-12) if not pooled else None


@OPTIONS
def test_input_x_gradient_is_the_frozen_contribution(options):
    model, inputs = vit(**options), images()
    found = LibraGrad(model, combine="input_x_gradient").attribute(inputs, TARGET)
    truth = FrozenContribution(model, positions=True).attribute(inputs, TARGET)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)


def test_maps_are_sums_of_inputs_and_biases_times_gradients():
    model, inputs = vit(depth=2), images()
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (args[0], output)

        return hook

    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm)]
    names = [*(name for name in names if name not in ("head", "fc_norm")), "blocks.0", "blocks.1"]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with trace(model, rules=LibraRules(model)):
        logit = model(inputs)[range(3), TARGET].sum()
        wanted = [
            seen[name][0] if name.startswith("blocks.") and name.count(".") == 1 else seen[name][1] for name in names
        ]
        gradients = dict(zip(names, torch.autograd.grad(logit, wanted), strict=True))
    for handle in handles:
        handle.remove()
    first, second = ((seen[f"blocks.{i}"][0] * gradients[f"blocks.{i}"]).sum(2) for i in (0, 1))
    biases = sum((gradients[name] * model.get_submodule(name).bias).sum(2) for name in names if name.count(".") != 1)
    for combine, truth in {
        "input_x_gradient": first,
        "full_gradient": first + biases,
        "full_gradient_plus": (first + second + biases) / 2,
    }.items():
        found = LibraGrad(model, combine=combine).attribute(inputs, TARGET, grid=True)
        torch.testing.assert_close(found.flatten(1), truth[:, 1:].detach(), rtol=0, atol=1e-12)


def test_unknown_sums_and_scans_are_refused():
    with pytest.raises(ValueError, match=r"LibraGrad\(combine='full'\): .*full_gradient"):
        LibraGrad(vit(), combine="full")
    with pytest.raises(UnsupportedModelError, match="LibraGrad is defined for softmax attention"):
        LibraGrad(vim(depth=1)).attribute(images(1), 0)
