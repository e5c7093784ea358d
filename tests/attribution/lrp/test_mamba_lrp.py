import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mamba_attn.attribution import MambaLRP
from mamba_attn.attribution.lrp.linear_rules import LinearRules
from mamba_attn.attribution.lrp.relevance_rules import LRPRules, generalised_gamma
from mamba_attn.errors import NonFiniteError, TraceError, UnknownLayerError, UnsupportedModelError
from mamba_attn.models.vit import vision_transformer
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import MODELS, images, vim, vmamba
from tests.attribution.relevance import of_one_layer_vim

GAMMA = pytest.mark.parametrize("gamma_layers", [None, "*", ["*.in_proj", "*.out_proj", "*.mlp.fc1"]])
TARGET = [3, 0, 4]


def without_biases(model):
    """Additive constants behind the tokens set to zero; those of the steps, which are fixed, stay."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") and "dt_proj" not in name:
                value.zero_()
    return model


def livelier_biases(model):
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") and "dt_proj" not in name:
                value += torch.randn_like(value)
    return model


def patterns(model, gamma_layers):
    """Those that the model has."""
    if not isinstance(gamma_layers, list):
        return gamma_layers
    return [p for p in gamma_layers if "mlp" not in p or any("mlp" in name for name, _ in model.named_modules())]


def logits(model, inputs, target=TARGET):
    with torch.no_grad():
        return model(inputs)[torch.arange(len(inputs)), target]


@pytest.mark.parametrize("name", MODELS)
@GAMMA
def test_law_10_relevance_is_conserved_without_biases(name, gamma_layers):
    model, inputs = without_biases(MODELS[name]()), images()
    (found,) = MambaLRP(model, gamma_layers=patterns(model, gamma_layers)).relevances(inputs, TARGET).values()
    assert ((found.sum(1) - logits(model, inputs)).abs() <= 1e-9 * found.abs().sum(1)).all()
    tokens = (E := model.embed(inputs) if hasattr(model, "embed") else model.patch_embed(inputs)).detach()
    assert found.shape == (3, tokens.flatten(1, -2).shape[1])
    # plain gradient x input does not conserve: were the rules left out, this would be seen
    leaf = tokens.requires_grad_()
    hook = first_layer(model).register_forward_pre_hook(lambda module, args: (leaf, *args[1:]))
    (plain,) = torch.autograd.grad(model(inputs)[torch.arange(3), TARGET].sum(), leaf)
    hook.remove()
    plain = (plain * E).flatten(1).sum(1)
    assert ((plain - logits(model, inputs)).abs() > 1e-3 * found.abs().sum(1)).all()


def first_layer(model):
    return model.layers[0]


@pytest.mark.parametrize("name", MODELS)
@GAMMA
def test_relevance_of_tokens_and_biases_is_the_logit_of_every_image(name, gamma_layers):
    model, inputs = livelier_biases(MODELS[name]()), images()
    method = MambaLRP(model, gamma_layers=patterns(model, gamma_layers))
    (tokens,), biases = method.relevances(inputs, TARGET).values(), method.bias_relevances(inputs, TARGET)
    assert (tokens.sum(1) - logits(model, inputs)).abs().max() > 1e-3
    total, size = (
        sum([f(tokens).sum(1), *(f(share) for share in biases.values())]) for f in (lambda x: x, torch.Tensor.abs)
    )
    assert ((total - logits(model, inputs)).abs() <= 1e-12 * size).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gamma_layers", [(), ("*",)])
def test_the_forward_pass_stays_what_it_is(name, gamma_layers):
    model, inputs = MODELS[name](), images()
    with trace(model, rules=LRPRules(model, gamma_layers)):
        found = model(inputs)
    torch.testing.assert_close(found, model(inputs), rtol=0, atol=1e-12)
    model, inputs = model.float(), inputs.float()
    with trace(model, rules=LRPRules(model, gamma_layers)):
        found = model(inputs)
    torch.testing.assert_close(found, model(inputs), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_against_explicit_equations_on_one_layer(gamma, biased):
    model, inputs = vim(depth=1), images()
    (livelier_biases if biased else without_biases)(model)
    found = MambaLRP(model, gamma_layers="*", gamma=gamma).relevances(inputs, TARGET)["layers.0.mixer"]
    for index, target in enumerate(TARGET):
        logit, expected = of_one_layer_vim(model, inputs[index : index + 1], target, gamma=gamma)
        torch.testing.assert_close(logit, logits(model, inputs)[index], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[index], expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["middle", "first", "pooled"])
def test_the_class_token_is_reported_and_dropped_from_the_map(name):
    model, inputs = MODELS[name](), images()
    method = MambaLRP(model)
    (found,) = method.relevances(inputs, 1).values()
    place = {"middle": 7, "first": 0, "pooled": None}[name]
    assert found.shape[1] == (15 if place is None else 16)
    patches = found if place is None else torch.cat([found[:, :place], found[:, place + 1 :]], 1)
    torch.testing.assert_close(method.attribute(inputs, 1, grid=True), patches.view(3, 1, 5, 3), rtol=0, atol=1e-14)
    assert method.attribute(inputs, 1).min() < 0  # signed


@pytest.mark.parametrize("name", ["middle", "vmamba", "vmamba_v0"])
def test_relevance_is_conserved_from_every_layer_on(name):
    model, inputs = livelier_biases(MODELS[name]()), images()
    names = list(MambaLRP(model, layers=["*"]).relevances(inputs, TARGET))
    assert len(names) > 2
    every = MambaLRP(model, layers="*").relevances(inputs, TARGET)
    maps = []
    for layer in names:
        method = MambaLRP(model, layers=[layer])
        (tokens,) = method.relevances(inputs, TARGET).values()
        total = tokens.sum(1) + sum(method.bias_relevances(inputs, TARGET).values())
        torch.testing.assert_close(total, logits(model, inputs), rtol=0, atol=1e-12)
        torch.testing.assert_close(tokens, every[layer], rtol=0, atol=1e-13)
        maps.append(method.attribute(inputs, TARGET))
    if name == "middle":
        torch.testing.assert_close(MambaLRP(model, layers="*").attribute(inputs, TARGET), torch.stack(maps).mean(0))


@pytest.mark.parametrize("module", [nn.Linear(4, 5), nn.Linear(4, 5, bias=False), nn.Conv2d(4, 6, 3, padding=1),
                                    nn.Conv1d(4, 4, 3, groups=4)])  # fmt: skip
def test_gamma_rule_of_layers_by_its_definition(module):
    module = module.double()
    x = torch.randn(2, 7, 4) if isinstance(module, nn.Linear) else torch.randn(2, 4, *[7] * (module.weight.ndim - 2))
    x = x.double().requires_grad_()
    y, constant = generalised_gamma(module, x, module, 0.5)
    assert torch.equal(y, module(x))
    other = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, other)
    biased = 0 if constant is None else (constant * other).sum()
    torch.testing.assert_close((gradient * x).sum() + biased, (y * other).sum(), rtol=1e-12, atol=1e-12)
    if isinstance(module, nn.Linear) and module.bias is not None:
        flat, z = x.detach().flatten(0, 1), y.detach().flatten(0, 1)
        expected = torch.zeros_like(flat)
        for row, out, g in zip(range(len(flat)), z, other.flatten(0, 1), strict=True):
            for k, weight in enumerate(module.weight.detach()):
                terms = torch.cat([weight * flat[row], module.bias.detach()[k : k + 1]])
                terms = terms * torch.where(terms * out[k] > 0, 1.5, 1.0)
                expected[row] += terms[:-1] / terms.sum() * out[k] * g[k]
        torch.testing.assert_close((gradient * x).flatten(0, 1), expected)


def test_gamma_zero_is_lrp_0_and_other_gammas_are_not():
    model, inputs = vim(), images()
    plain = MambaLRP(model).attribute(inputs)
    torch.testing.assert_close(MambaLRP(model, gamma_layers="*", gamma=0).attribute(inputs), plain, rtol=0, atol=1e-14)
    one = MambaLRP(model, gamma_layers="layers.1.mixer.in_proj").attribute(inputs)
    assert (one - plain).abs().max() > 1e-3 * plain.abs().max()
    named = MambaLRP(model, gamma_layers=["layers.1.*.in_proj"], gamma=0.25).attribute(inputs)
    assert torch.equal(one, named)


@pytest.mark.parametrize("function", [F.silu, F.gelu, F.relu, torch.tanh, nn.Identity(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations_at_and_around_zero(function, dtype):
    x = torch.tensor([0.0, 1e-300, -1e-30, 1e-8, -2e-8, 3.0, -40.0, 100.0, -500.0], dtype=torch.float64).to(dtype)
    before = x.clone()
    x.requires_grad_()
    y = LinearRules(nn.Identity()).activation(function, x)
    assert torch.equal(x, before)
    torch.testing.assert_close(y.detach(), function(before), rtol=2 * torch.finfo(dtype).eps, atol=0)
    (ratio,) = torch.autograd.grad(y.sum(), x)
    assert ratio.isfinite().all()
    torch.testing.assert_close(ratio * x, y, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps ** 2)
    assert float(ratio[0]) == pytest.approx(0.5 if function in (F.silu, F.gelu) else 1.0, rel=0.02)


def test_inputs_and_weights_of_zeros_give_no_nan():
    model = without_biases(vim(depth=1))
    with torch.no_grad():
        model.layers[0].mixer.in_proj.weight[:20] = 0  # outputs of exactly 0
    found = MambaLRP(model, gamma_layers="*").attribute(torch.zeros(1, 3, 40, 24).double(), 1)
    assert found.isfinite().all()


def test_frozen_models_inference_mode_and_float32():
    model, inputs = vmamba(), images()
    expected = MambaLRP(model).attribute(inputs, TARGET)
    assert torch.equal(MambaLRP(model.requires_grad_(False)).attribute(inputs, TARGET), expected)
    with torch.inference_mode():
        assert torch.equal(MambaLRP(model).attribute(inputs * 1, TARGET), expected)
    single = MambaLRP(model.float()).attribute(inputs.float(), TARGET)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_model_that_checkpoints_its_activations():
    class Checkpointed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, orders=None):
            return checkpoint(self.layer, x, orders, use_reentrant=False)

    model, inputs = livelier_biases(vim()), images()
    expected = MambaLRP(model).attribute(inputs, TARGET)
    for index, layer in enumerate(model.layers):
        model.layers[index] = Checkpointed(layer)
    torch.testing.assert_close(MambaLRP(model).attribute(inputs, TARGET), expected, rtol=0, atol=1e-13)


def test_images_do_not_leak_into_each_other_and_half_of_the_gate_goes_either_way():
    model, inputs = vmamba(generation="v0", mlp_ratio=0.0), images()
    whole = MambaLRP(model).attribute(inputs, TARGET)
    one = MambaLRP(model).attribute(inputs[1:2], TARGET[1])
    torch.testing.assert_close(whole[1:2], one, rtol=0, atol=1e-13)
    y, gate = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    product = LRPRules(model).gate(y, gate)
    assert torch.equal(product, y * gate)
    for factor, gradient in zip((gate, y), torch.autograd.grad(product.sum(), (y, gate)), strict=True):
        assert torch.equal(gradient, factor.detach() / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, r"MambaLRP\(gamma=-1\.0\): expected a number of at least 0"),
        ({"gamma": float("nan")}, r"gamma=nan\): expected a number"),
        (
            {"gamma_layers": "layers.0.mixer.inproj"},
            r"gamma_layers='layers\.0\.mixer\.inproj'\): matches no linear .* Did you mean 'layers\.0\.mixer\.in_proj'",
        ),
        ({"gamma_layers": ["*.norm"]}, r"gamma_layers='\*\.norm'\): matches no linear layer and no convolution"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        MambaLRP(vim(depth=1), **options)


def test_what_cannot_be_explained():
    vit = vision_transformer(image_size=(40, 24), patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5)
    with pytest.raises(UnsupportedModelError, match=r"MambaLRP is defined for selective .* TransformerAttribution for"):
        MambaLRP(vit.double().eval()).attribute(images())
    with pytest.raises(ValueError, match=r"pixel=\(3, 4\)\): .*reads no token's row; leave pixel out"):
        MambaLRP(vim(depth=1)).attribute(images(), pixel=(3, 4))
    with pytest.raises(UnknownLayerError, match=r"'layers\.9\.\*' fits no layer\. Did you mean 'layers\.0\.mixer'"):
        MambaLRP(vim(depth=1), layers=["layers.9.*"]).attribute(images())
    broken = vim(depth=1)
    with torch.no_grad():
        broken.pos_embed[:] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mixer"):
        MambaLRP(broken).attribute(images())
    with pytest.raises(ValueError, match=r"MambaLRP\.relevances\(inputs\(40, 24\)\): expected images"):
        MambaLRP(vim(depth=1)).relevances(images()[0, 0])


class Functional(nn.Module):
    """An activation outside any module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_activations_that_are_functions_are_ruled_as_modules_are():
    model, inputs = vmamba(), images()
    expected = MambaLRP(model).attribute(inputs)
    model.layers[1].blocks[0].mlp.act = Functional(F.gelu)
    torch.testing.assert_close(MambaLRP(model).attribute(inputs), expected, rtol=0, atol=1e-14)


def test_what_escapes_the_rules_is_found_and_where():
    model = vmamba()
    model.layers[1].blocks[0].mlp.act = Functional(torch.ops.aten.gelu.default)
    with pytest.raises(
        TraceError, match=r"shares .* escaped the rules in layers\.1\.blocks\.0\.mlp\.act \(Functional\): a norm, an"
    ):
        MambaLRP(model).attribute(images())
    with pytest.raises(TraceError, match=r"though no module lost any: the target is not linear in the output"):
        MambaLRP(vmamba()).attribute(images(), lambda output: output.softmax(1)[:, 1])


@pytest.mark.parametrize("head", [nn.Sigmoid(), nn.Softmax(-1), nn.LogSoftmax(-1)])
def test_a_head_that_gives_probabilities_is_refused_with_what_to_explain(head):
    model = vmamba()
    with pytest.raises(
        TraceError, match=r"the output comes out of .*(sigmoid|softmax), and .* explain the logit in fr"
    ):
        MambaLRP(nn.Sequential(model, head)).attribute(images(), 1)


def test_a_norm_of_another_formula_is_ruled_by_its_functions():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-5

        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True)

    model, inputs = livelier_biases(vim()), images()
    model.layers[1].norm = RMSNorm().double()
    method = MambaLRP(model)
    (found,) = method.relevances(inputs, TARGET).values()
    total = found.sum(1) + sum(method.bias_relevances(inputs, TARGET).values())
    torch.testing.assert_close(total, logits(model, inputs), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Wrapped is in training mode")  # the batch norms are the point
def test_only_what_lies_between_the_target_and_the_tokens_is_asked_for_rules():
    class Wrapped(nn.Module):
        """A normalisation of the images in front, and a second head that nobody explains."""

        def __init__(self, model):
            super().__init__()
            self.normalise, self.model, self.other = nn.BatchNorm2d(3), model, nn.BatchNorm1d(5)

        def forward(self, x):
            logits = self.model(self.normalise(x))
            return {"logits": logits, "other": self.other(logits)}

    model, inputs = Wrapped(vmamba()).double(), images()
    model.model.eval()
    with torch.no_grad():
        expected = MambaLRP(model.model).attribute(model.normalise(inputs), TARGET)
    found = MambaLRP(model).attribute(inputs, lambda output: output["logits"][range(3), TARGET])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with pytest.raises(
        UnsupportedModelError, match=r"other \(BatchNorm1d\) normalises with the batch's statistics; call"
    ):
        MambaLRP(model).attribute(inputs, lambda output: output["other"][range(3), TARGET])
