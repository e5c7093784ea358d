import pytest
import torch

from mamba_attn.attribution import MambaAttribution
from mamba_attn.attribution.mamba_attribution import gradient_x_attention
from mamba_attn.attribution.published.true_matrices import positive_attention
from mamba_attn.attribution.queries import query_tokens
from mamba_attn.ops import reference
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import (
    MODELS,
    SIZE,
    class_or_mean,
    images,
    in_pixels,
    layers_of,
    matrices,
    of_one_token,
    per_channel,
    product_less_identity,
    through_matrices,
    vim,
    vmamba,
)
from tests.attribution.test_queries import keyword, place

TARGET = [3, 0, 4]


def logit(logits):
    return logits[torch.arange(3), TARGET].sum()


def gradient_times_matrices(model, inputs):
    """(layout, sum over channels and routes of dlogit/dM * M) of every layer, by autograd through explicit M."""
    found = []
    for layer in layers_of(model, inputs):
        M = per_channel(layer).requires_grad_()
        (gradient,) = torch.autograd.grad(logit(through_matrices(model, inputs, layer, M)), M)
        found.append((layer.layout, reference.merge(layer.scan.replace(scale=1.0), (gradient * M).sum(2)).detach()))
    return found


def pixels(layout, row):
    return layout.to_pixels(layout.to_grid(row), SIZE).unsqueeze(1)


def close(actual, expected, tolerance=1e-11):
    assert expected.abs().max() > 1e-9
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["first", "overlapping", "vmamba_v0"])
def test_law_6_gradient_x_attention_is_autograd_through_explicit_matrices(name):
    model, inputs = MODELS[name](), images()
    with trace(model) as record:
        logits = model(inputs)
    gradients = record.gradients(logit(logits))
    for layer, (_, expected) in zip(record.layers, gradient_times_matrices(model, inputs), strict=True):
        found = gradient_x_attention(layer, gradients[layer.name]).detach()
        close(found, expected)
        skip = torch.einsum("rc,brcl->brcl", layer.scan.D, layer.scan.u)
        share = (gradients[layer.name] * (layer.y - reference.merge_tokens(layer.scan, skip))).sum((1, 2)).detach()
        close(found.sum((1, 2)), share)


@pytest.mark.parametrize("name", ["middle", "pooled", "vmamba", "vmamba_v0"])
def test_default_against_the_dense_product_of_explicit_matrices(name):
    model, inputs = MODELS[name](), images()
    weighted = [(layout, of_one_token(layout, W)) for layout, W in gradient_times_matrices(model, inputs)]
    assert any(matrix.min() < -1e-6 for _, matrix in weighted)  # so that the positive part is seen
    positive = [(layout, matrix.clamp(min=0)) for layout, matrix in weighted]
    expected = pixels(weighted[0][0], product_less_identity(model, positive))
    close(MambaAttribution(model).attribute(inputs, target=TARGET), expected)
    expected = pixels(weighted[0][0], product_less_identity(model, weighted))
    close(MambaAttribution(model, signed=True).attribute(inputs, target=TARGET), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("signed", [False, True])
def test_rows_without_rollout(name, signed):
    model, inputs = MODELS[name](), images()
    maps = []
    for layout, matrix in gradient_times_matrices(model, inputs):
        row = class_or_mean(layout) @ of_one_token(layout, matrix)
        maps.append((layout, row if signed else row.clamp(min=0)))
    actual = MambaAttribution(model, rollout=False, signed=signed).attribute(inputs, target=TARGET)
    close(actual, in_pixels(maps))


@pytest.mark.parametrize("name", ["middle", "vmamba"])
@pytest.mark.parametrize("query", [(20, 3), (2, 2, 20, 30)])
def test_rows_of_a_query_without_rollout(name, query):
    model, inputs = MODELS[name](), images()
    maps = []
    for layout, matrix in gradient_times_matrices(model, inputs):
        tokens = query_tokens(layout, place(query))[0]
        maps.append((layout, of_one_token(layout, matrix[:, tokens].mean(1)).clamp(min=0)))
    close(MambaAttribution(model, rollout=False).attribute(inputs, target=TARGET, **keyword(query)), in_pixels(maps))


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_a_model_without_rollout_in_float32_and_frozen(frozen):
    model, inputs = vmamba(), images()
    expected = MambaAttribution(model, rollout=False, signed=True).attribute(inputs, target=1)
    model = model.float().requires_grad_(not frozen)
    actual = MambaAttribution(model, rollout=False, signed=True).attribute(inputs.float(), target=1)
    close(actual.double(), expected, 1e-4)
    with torch.inference_mode():
        found = MambaAttribution(model, rollout=False, signed=True).attribute(inputs.float(), target=1)
    assert torch.equal(found, actual)


def retained(model, inputs, receives):
    """Gradients at a tensor of every mixer of the untouched model, by hooks."""
    seen, handles = [], []

    def keep(tensor):
        tensor.retain_grad()
        seen.append(tensor)

    for mixer in model.modules():
        if not hasattr(mixer, "out_proj"):
            continue
        if receives == "output":
            handles.append(mixer.register_forward_hook(lambda module, args, output: keep(output)))
        else:  # the gated output
            handles.append(mixer.out_proj.register_forward_pre_hook(lambda module, args: keep(args[0])))
    logit(model(inputs)).backward()
    model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    return [tensor.grad.flatten(1, -2) for tensor in seen]  # (batch, tokens, features)


@pytest.mark.parametrize("name", ["middle", "pooled", "vmamba", "vmamba_v0"])
def test_paper_against_the_equation(name):
    model, inputs = MODELS[name](), images()
    gradients = retained(model, inputs, "gated")
    weighted = [
        (layout, (of_one_token(layout, gradient).mean(2).unsqueeze(2) * matrix).clamp(min=0))
        for gradient, (layout, matrix) in zip(gradients, matrices(model, inputs), strict=True)
    ]
    expected = pixels(weighted[0][0], product_less_identity(model, weighted))
    close(MambaAttribution(model, rule="paper").attribute(inputs, target=TARGET), expected)


@pytest.mark.parametrize(
    ("make", "first"),  # round(15 / 24 * depth)
    [
        (lambda: vim(depth=6), 4),
        (lambda: vim(depth=5, class_token=None), 3),
        (lambda: vmamba(depths=(1, 2, 2, 1)), 4),
    ],
    ids=["middle", "pooled", "vmamba"],
)
def test_published_code_on_true_matrices(make, first):
    model, inputs = make(), images()
    weighted = []
    for layer, gradient in zip(layers_of(model, inputs), retained(model, inputs, "output"), strict=True):
        merged = torch.stack([reference.merge(layer.scan, M) for M in per_channel(layer).unbind(2)], dim=1)
        positive = merged.clamp(min=0)
        top = gradient.clamp(min=0).max(2).values
        low, high = top.min(1, keepdim=True).values, top.max(1, keepdim=True).values
        weight = (top - low) / (high - low).clamp(min=1e-300)
        weighted.append((layer.layout, positive.mean(1) / positive.amax((1, 2, 3))[:, None, None] * weight[:, None]))
    late = weighted[first:]
    expected = pixels(late[0][0], product_less_identity(model, late, normalise=True))
    method = MambaAttribution(model, rule="published_code")
    close(method.attribute(inputs, target=TARGET), expected)
    expected = pixels(weighted[0][0], product_less_identity(model, weighted, normalise=True))
    close(MambaAttribution(model, rule="published_code", layers=["*"]).attribute(inputs, target=TARGET), expected)


def test_channels_in_blocks_are_channels_at_once(monkeypatch):
    (layer,) = layers_of(vim(depth=1), images())
    mean, largest = positive_attention(layer.scan)
    monkeypatch.setattr("mamba_attn.attribution.published.true_matrices._WORKSPACE", 1)
    again = positive_attention(layer.scan)
    close(again[0], mean, 1e-14)
    assert torch.equal(again[1], largest)


@pytest.mark.parametrize(
    ("make", "options"),
    [(vim, {}), (vmamba, {"rollout": False}), (vmamba, {"rule": "paper"}), (vim, {"rule": "published_code"})],
)
def test_another_target_gives_another_map_and_the_default_is_the_predicted_class(options, make):
    depth = {"depth": 5} if make is vim else {}  # the published recipe leaves the last layer of a Vim without effect
    model, inputs = make(num_classes=3, **depth), images()
    method = MambaAttribution(model, **options)
    maps = [method.attribute(inputs, target=k) for k in range(3)]
    assert all((maps[0] - other).abs().max() > 1e-3 * maps[0].abs().max() for other in maps[1:])
    with torch.no_grad():
        predicted = model(inputs).argmax(1).tolist()
    expected = torch.stack([maps[k][i] for i, k in enumerate(predicted)])
    close(method.attribute(inputs), expected)
    close(method.attribute(inputs, target=torch.tensor(predicted)), expected)


@pytest.mark.parametrize(("query", "tokens"), [((12, 20), [5]), ((0, 0, 16, 24), [0, 1, 3, 4, 6, 7])])
def test_a_query_of_the_rollout_is_its_row(query, tokens):
    model, inputs = vim(depth=1, class_token=None), images()
    ((layout, matrix),) = gradient_times_matrices(model, inputs)
    expected = layout.to_grid(of_one_token(layout, matrix)[:, tokens].clamp(min=0).mean(1))
    actual = MambaAttribution(model).attribute(inputs, target=TARGET, **keyword(query), grid=True)[:, 0]
    close(actual, expected)


def test_frozen_models_no_grad_and_inference_mode():
    model, inputs = vim(), images()
    expected = MambaAttribution(model).attribute(inputs)
    # equal but for rounding: PyTorch chooses its kernels by requires_grad and inference mode on some processors
    close(MambaAttribution(model.requires_grad_(False)).attribute(inputs), expected, 1e-12)
    with torch.no_grad():
        close(MambaAttribution(model).attribute(inputs), expected, 1e-12)
    with torch.inference_mode():
        close(MambaAttribution(model).attribute(inputs * 1), expected, 1e-12)


def test_float32_is_as_good_as_it_can_be():
    model, inputs = vmamba(), images()
    expected = MambaAttribution(model).attribute(inputs, target=1)
    actual = MambaAttribution(model.float()).attribute(inputs.float(), target=1)
    assert actual.dtype == torch.float32
    close(actual.double(), expected, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "papers"}, r"MambaAttribution\(rule='papers'\): no such rule\. Did you mean 'paper'\?"),
        ({"rule": "paper", "signed": True}, r"rule='paper', signed=True\): .*no such option; leave signed=True out"),
        ({"rule": "published_code", "rollout": False}, r"no such option; leave rollout=False out, or rule='publis"),
        ({"convention": "hidden_mamba", "rule": "paper"}, r"no such option; leave rule='paper' out, or convention="),
        ({"convention": "hidden_mamba", "rollout": False, "signed": True}, "leave rollout=False, signed=True out"),
        ({"convention": "implicit_unified", "rollout": False}, "no such option; leave rollout=False out"),
        ({"convention": "vmamba_analysis"}, r"convention='vmamba_analysis'\): no such convention\. Known: 'exact', "),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        MambaAttribution(vim(depth=1), **options)
