"""Rules for whole models: who is asked, how often, and what is refused."""

import threading
from collections import Counter

import pytest
import torch
from torch import nn

from mamba_attn.core.rules import KINDS, Rules
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models.vim import VisionMamba
from mamba_attn.models.vit import vision_transformer
from mamba_attn.models.vmamba import VSSM
from mamba_attn.tracing.tracer import trace

MODELS = {
    "vim": lambda: VisionMamba(image_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5),
    "vmamba": lambda: VSSM(dims=8, depths=(1, 2), num_classes=5),
    "vmamba_v0": lambda: VSSM(dims=8, depths=(1, 2), num_classes=5, generation="v0", mlp_ratio=0.0),
    "vit": lambda: vision_transformer(
        image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, qk_norm=True
    ),
}
FAMILIES = pytest.mark.parametrize("name", MODELS)


class Count(Rules):
    """Who was asked."""

    wants = frozenset(KINDS)

    def __init__(self):
        self.asked = Counter()
        self.entered = []

    def norm(self, module, x, call=None):
        self.asked[module] += 1
        return super().norm(module, x, call)

    def linear(self, module, x, call):
        self.asked[module] += 1
        return super().linear(module, x, call)

    def activation(self, function, x):
        self.asked[getattr(function, "__self__", function)] += 1  # a module's own forward is bound to it
        return super().activation(function, x)

    def attention(self, record):
        self.asked["attention"] += 1
        return super().attention(record)

    def enter(self, layer, x):
        self.entered.append((layer, tuple(x.shape)))


def images(batch=2):
    return torch.randn(batch, 3, 32, 32)


@FAMILIES
def test_every_norm_activation_and_linear_layer_is_asked_once_and_values_stay(name):
    model, inputs, rules = MODELS[name]().eval(), images(), Count()
    calls = Counter()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.GELU, nn.SiLU)
    kinds = (*kinds, type(model.norm_f)) if name == "vim" else kinds
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        with trace(model):
            expected = model(inputs)
        handles = [m.register_forward_hook(lambda module, args, output: calls.update([module])) for m in modules]
        with trace(model, rules=rules):
            found = model(inputs)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, expected)
    asked = Counter({module: count for module, count in rules.asked.items() if isinstance(module, nn.Module)})
    assert asked == calls  # the model's own hooks see each call once, too
    assert len(asked) > 15
    assert rules.asked["attention"] == (2 if name == "vit" else 0)


@FAMILIES
def test_what_enters_a_layer_is_seen_outermost_first(name):
    model, rules = nn.Sequential(nn.Identity(), MODELS[name]().eval()), Count()  # the model inside holds the stem
    with torch.no_grad(), trace(model, rules=rules) as record:
        model(images())
    first = next(iter(record))
    entered = [shape for layer, shape in rules.entered if layer == first]
    tokens = {"vim": (2, 17, 16), "vit": (2, 17, 16)}.get(name, (2, 8, 8, 8))
    assert set(entered) == {tokens}
    assert len(entered) >= 2
    assert {layer for layer, _ in rules.entered} == set(record)
    if name.startswith("vmamba"):  # a later stage is entered as a whole
        shapes = [shape for layer, shape in rules.entered if layer == "1.layers.1.blocks.0.op"]
        assert shapes[0] == (2, 4, 4, 16)


def test_rules_that_want_nothing_get_nothing_outside_the_mixers():
    class Quiet(Count):
        wants = frozenset()

    model, rules = MODELS["vmamba"]().eval(), Quiet()
    with torch.no_grad(), trace(model, rules=rules):
        model(images())
    assert set(rules.asked) == {part for block in model.modules() if hasattr(block, "out_norm")
                                for part in (block.act, block.out_norm)}  # fmt: skip
    assert rules.entered == []


@FAMILIES
def test_the_model_is_as_it_was_after_an_error_and_in_other_threads(name):
    model, rules = MODELS[name]().eval(), Count()

    def fails():
        with trace(model, rules=rules):
            thread = threading.Thread(target=model, args=(images(),))
            thread.start()
            thread.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not rules.asked
    assert not rules.entered
    assert all("forward" not in vars(module) for module in model.modules())  # and leaks.py compares all of it


def test_the_last_of_nested_traces_rules():
    model, outer, inner = MODELS["vim"]().eval(), Count(), Count()
    with torch.no_grad(), trace(model, rules=outer):
        with trace(model, rules=inner):
            model(images())
        assert not outer.asked
        model(images())
    assert outer.asked == inner.asked


def test_a_fused_add_and_norm_is_refused_with_the_remedy():
    model = MODELS["vim"]()
    model.layers[1].fused_add_norm = True
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1 \(VimLayer\) adds and norms in one .* fused_add_norm=Fa"
    ):
        with trace(model, rules=Count()):
            pass
    model.layers[1].fused_add_norm = False
    with trace(model, rules=Count()):
        pass


def test_a_norm_that_is_given_the_residual_stream_is_refused():
    class Fused(nn.LayerNorm):
        def forward(self, x, residual=None):
            return super().forward(x if residual is None else x + residual)

    class Layer(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.norm, self.mixer, self.residual = Fused(16), layer.mixer, False

        def forward(self, x, orders=None):
            return x + self.mixer(self.norm(x, residual=x if self.residual else None))

    model = MODELS["vim"]().eval()
    model.layers[0] = Layer(model.layers[0])
    with torch.no_grad(), trace(model, rules=Count()):
        model(images())
    model.layers[0].residual = True
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"Fused was called with 1 .* and residual: rules"):
        with trace(model, rules=Count()):
            model(images())


def test_norms_of_unknown_types_are_refused_by_name_and_batch_norms_in_training():
    class GlobalResponseNorm(nn.Module):
        def forward(self, x):
            return x

    model = MODELS["vim"]()
    model.layers[1].norm = GlobalResponseNorm()
    with pytest.raises(
        UnsupportedModelError, match=r"Count\): layers\.1\.norm \(GlobalResponseNorm\) is a norm of a ty"
    ):
        with trace(model, rules=Count()):
            pass
    model.layers[1].norm = nn.BatchNorm1d(17)
    with pytest.raises(UnsupportedModelError, match=r"normalises with the batch's statistics; call model\.eval"):
        with trace(model, rules=Count()):
            pass
    with torch.no_grad(), trace(model.eval(), rules=Count()):
        model(images())


def test_a_norm_inside_a_norm_is_asked_once():
    class LayerNorm2d(nn.LayerNorm):
        def __init__(self, features):
            super().__init__(features)
            self.inner = nn.LayerNorm(features)

        def forward(self, x):
            return self.inner(x)

    model, rules = MODELS["vim"]().eval(), Count()
    model.layers[1].norm = LayerNorm2d(16)
    with torch.no_grad(), trace(model, rules=rules):
        model(images())
    assert rules.asked[model.layers[1].norm] == 1
    assert rules.asked[model.layers[1].norm.inner] == 0
