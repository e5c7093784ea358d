"""Rules for whole models: who is asked, how often, and what is refused."""

import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
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


class Fused(nn.LayerNorm):
    def forward(self, x, residual=None):
        return super().forward(x if residual is None else x + residual)


def with_fused_norm(model):
    class Layer(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.norm, self.mixer = Fused(16), layer.mixer

        def forward(self, x, orders=None):
            return x + self.mixer(self.norm(x, residual=x))

    model.layers[0] = Layer(model.layers[0])
    return model


def test_a_norm_that_is_given_the_residual_stream_is_asked_as_a_function():
    model, rules = with_fused_norm(MODELS["vim"]().eval()), Count()
    with torch.no_grad(), trace(model, rules=rules):
        model(images())
    assert rules.asked[model.layers[0].norm] == 0
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"Fused was called with 1 .* and residual: these"):
        with trace(model, rules=OnlyNorms()):
            model(images())


class OnlyNorms(Count):
    wants = frozenset(("norm",))


class Double(Rules):
    """Doubles the gradients of what it is asked for, so that they tell where it was asked."""

    wants = frozenset(KINDS)

    def __init__(self):
        self.constants = {}

    def fixed(self, factor):
        return factor.detach()

    def product(self, function, a, b):
        return function(a, b.detach())

    def activation(self, function, x):
        return function(x.detach()) + 2 * (x - x.detach())

    def added(self, name, y, constant):
        self.constants[name] = constant
        return y


def hand_written_rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def in_place(x):
    y = x.clone()
    y.mul_(x.sigmoid())
    return F.relu(y, inplace=True)


FUNCTIONS = {
    "silu": (F.silu, lambda x: F.silu(x.detach()) + 2 * (x - x.detach())),
    "relu": (torch.relu, lambda x: torch.relu(x.detach()) + 2 * (x - x.detach())),
    "in place": (
        in_place, lambda x: torch.relu(x * x.sigmoid()).detach() + 2 * (x - x.detach()) * x.sigmoid().detach()
    ),
    "swish": (lambda x: x * torch.sigmoid(x), lambda x: x * torch.sigmoid(x).detach()),
    "softmax": (lambda x: x.softmax(-1) * x, lambda x: x.softmax(-1).detach() * x),
    "product": (lambda x: x * (x + 0), lambda x: x * x.detach()),
    "square": (lambda x: x**2 + x.square(), lambda x: 2 * x * x.detach()),
    "cube": (lambda x: x**3, lambda x: x * x.detach() ** 2),
    "einsum": (lambda x: torch.einsum("bl,bl->bl", x, 2 * x), lambda x: 2 * x * x.detach()),
    "quotient": (
        lambda x: x / (1 + x.norm(dim=-1, keepdim=True)), lambda x: x / (1 + x.norm(dim=-1, keepdim=True)).detach()
    ),
    "reciprocal": (lambda x: x * (1 / (3 + x.std())), lambda x: x / (3 + x.std()).detach()),
    "rms by hand": (hand_written_rms, lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5).detach()),
    "normalize": (lambda x: F.normalize(x, dim=1), lambda x: x / x.norm(dim=1, keepdim=True).detach()),
    "glu": (lambda x: F.glu(x, 1), lambda x: x[:, :2] * torch.sigmoid(x[:, 2:]).detach()),
    "rms_norm": (
        lambda x: F.rms_norm(x, (4,)), lambda x: x / (x.square().mean(-1, keepdim=True) + 2.3e-16).sqrt().detach()
    ),
    "grid_sample": (
        lambda x: F.grid_sample(x.view(1, 1, 3, 4), 0.3 * x.view(1, 2, 3, 2), align_corners=False),
        lambda x: F.grid_sample(x.view(1, 1, 3, 4), 0.3 * x.detach().view(1, 2, 3, 2), align_corners=False),
    ),
    "addcmul": (lambda x: torch.addcmul(x, x, 2 * x, value=3), lambda x: x + 6 * x * x.detach()),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_their_own_values_and_the_gradients_of_their_rules(name):
    function, expected = FUNCTIONS[name]

    class Between(nn.Module):
        def forward(self, x):
            return function(x)

    model, x = nn.Sequential(MODELS["vim"](), Between()).double().eval(), torch.randn(3, 4).double()
    with trace(model, rules=Double()) as record:
        (inner,) = [record.asked.arrivals.sources.tensors]
        given = x.clone().requires_grad_()
        found = model[1](given)
        assert inner == [given]
        (gradient,) = torch.autograd.grad((found * torch.arange(found.numel()).view_as(found)).sum(), given)
    outside = x.clone().requires_grad_()
    wanted = expected(outside)
    torch.testing.assert_close(found, function(x.clone()), rtol=1e-12, atol=1e-12)
    (truth,) = torch.autograd.grad((wanted * torch.arange(wanted.numel()).view_as(wanted)).sum(), outside)
    torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-12)
    again = x.clone().requires_grad_()  # nothing is left: the plain gradient
    (plain,) = torch.autograd.grad(model[1](again).sum(), again)
    again = x.clone().requires_grad_()
    assert torch.equal(plain, torch.autograd.grad(function(again).sum(), again)[0])


NORMS = {
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm of training": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "LayerNorm of channels": lambda: ChannelLayerNorm(4),
}


class ChannelLayerNorm(nn.Module):
    """As restoration models write it: over axis 1, by hand."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        spread = torch.var(x, dim=1, unbiased=False, keepdim=True)
        y = (x - x.mean(1, keepdim=True)) / torch.sqrt(spread + 1e-5)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_linear_but_for_their_constants(name):
    """f(x) - constant is linear where its denominator is held: gradient times input gives it back."""
    norm = NORMS[name]().double()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value))
    norm.eval()
    model, x, rules = nn.Sequential(MODELS["vim"](), norm).double().eval(), torch.randn(2, 4, 3, 5).double(), Double()
    with trace(model, rules=rules):
        given = x.clone().requires_grad_()
        found = model[1](given)
        (gradient,) = torch.autograd.grad(found.sum(), given)
    torch.testing.assert_close(found, norm(x), rtol=1e-12, atol=1e-12)
    if name == "BatchNorm":  # a module that the rules are asked for as a whole
        assert not rules.constants
        return
    constant = sum(value.expand_as(found).sum() for value in rules.constants.values())
    torch.testing.assert_close((gradient * x).sum() + constant, found.sum(), rtol=1e-10, atol=1e-10)


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
