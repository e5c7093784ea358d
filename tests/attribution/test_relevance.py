"""TransformerAttribution(variant="lrp") against the published rules, written with autograd on plain tensors."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mamba_attn.attribution import TransformerAttribution
from mamba_attn.attribution.vit import block_relevance
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import _livelier, images, vim
from tests.attribution.vit.test_vit import SIZE, build

HEADS, WIDTH = 3, 8
OPTIONS = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": HEADS, "num_classes": 5}


def vit(**options):
    return _livelier(timm.create_model("vit_tiny_patch16_224", **{**OPTIONS, **options}))


def divide(a, b):
    return torch.where(b == 0, 0, a / b)


def relprop(relevance, function, *operands):
    """x * d<S, z>/dx of every operand, S = R / z: the published RelPropSimple."""
    with torch.enable_grad():
        leaves = [operand.detach().requires_grad_() for operand in operands]
        z = function(*leaves)
        gradients = torch.autograd.grad(z, leaves, divide(relevance, z.detach()))
    return [operand * gradient for operand, gradient in zip(operands, gradients, strict=True)]


def linear(relevance, x, weight):
    """Activator of the published alpha-beta rule."""
    high, low = weight.clamp(min=0), weight.clamp(max=0)
    return sum(relprop(relevance, lambda p, n: F.linear(p, high) + F.linear(n, low), x.clamp(min=0), x.clamp(max=0)))


def residual(relevance, a, b):
    a, b = relprop(relevance, torch.add, a, b)
    total = a.sum().abs() + b.sum().abs()
    return a * a.sum().abs() / total * relevance.sum() / a.sum(), b * b.sum().abs() / total * relevance.sum() / b.sum()


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def published(w, x, target, depth=2):
    """(gradient, R(A)) of every block, and the sums of the relevance between them, for the tokens x of one image."""
    saved, probabilities = [], []
    with torch.enable_grad():
        for i in range(depth):
            b = f"blocks.{i}."
            h1 = norm(x, w, b + "norm1")
            qkv = F.linear(h1, w[b + "attn.qkv.weight"], w[b + "attn.qkv.bias"])
            q, k, v = (part.view(-1, HEADS, WIDTH).transpose(0, 1) for part in qkv.split(HEADS * WIDTH, -1))
            p = (q @ k.mT * WIDTH**-0.5).softmax(-1).requires_grad_()
            probabilities.append(p)
            heads = (p @ v).transpose(0, 1).flatten(1)
            attended = F.linear(heads, w[b + "attn.proj.weight"], w[b + "attn.proj.bias"])
            middle = x + attended
            h2 = norm(middle, w, b + "norm2")
            hidden = F.gelu(F.linear(h2, w[b + "mlp.fc1.weight"], w[b + "mlp.fc1.bias"]))
            out = F.linear(hidden, w[b + "mlp.fc2.weight"], w[b + "mlp.fc2.bias"])
            saved.append([t.detach() for t in (x, h1, q, k, p, v, heads, attended, middle, h2, hidden, out)])
            x = middle + out
        last = norm(x, w, "norm")
        logits = F.linear(last[0], w["head.weight"], w["head.bias"])
    gradients = torch.autograd.grad(logits[target], probabilities)
    relevance = torch.zeros_like(last)
    one = F.one_hot(torch.tensor(target), len(logits)).to(last)
    relevance[0] = linear(one, last[0].detach(), w["head.weight"])
    found, sums = [], [relevance.sum()]
    for i in reversed(range(depth)):
        b = f"blocks.{i}."
        x, h1, q, k, p, v, heads, attended, middle, h2, hidden, out = saved[i]
        relevance, branch = residual(relevance, middle, out)
        branch = linear(linear(branch, hidden, w[b + "mlp.fc2.weight"]), h2, w[b + "mlp.fc1.weight"])
        relevance, branch = residual(relevance + branch, x, attended)
        branch = linear(branch, heads, w[b + "attn.proj.weight"]).view(-1, HEADS, WIDTH).transpose(0, 1)
        attention, values = (part / 2 for part in relprop(branch, torch.matmul, p, v))
        queries, keys = (part / 2 for part in relprop(attention, lambda a, c: a @ c.mT, q, k))
        joint = torch.cat([part.transpose(0, 1).flatten(1) for part in (queries, keys, values)], -1)
        relevance = relevance + linear(joint, h1, w[b + "attn.qkv.weight"])
        found.insert(0, (gradients[i], attention))
        sums.append(relevance.sum())
    return found, sums


def tokens(model, image):
    with torch.no_grad():
        return model._pos_embed(model.patch_embed(image[None]))[0]


@pytest.mark.parametrize("start", [None, 0, 1])
def test_it_is_the_published_method(start):
    model, x = vit(), images(3, SIZE)
    truths = []
    for image, target in zip(x, (0, 4, 2), strict=True):
        found, _ = published(model.state_dict(), tokens(model, image), target)
        product = torch.eye(16, dtype=torch.float64)
        for gradient, relevance in found[1 if start is None else start :]:
            product = (torch.eye(16).to(x) + (gradient * relevance).clamp(min=0).mean(0)) @ product
        truths.append(product[0, 1:].view(1, 5, 3))
    actual = TransformerAttribution(model, variant="lrp", start_layer=start).attribute(x, [0, 4, 2], grid=True)
    truth = torch.stack(truths)
    assert (truth.flatten(1).amax(1) > 1e-4).all()
    torch.testing.assert_close(actual, truth, rtol=3e-5, atol=1e-6 * float(truth.max()))


def test_relevance_is_conserved_from_block_to_block():
    model, x = vit(depth=4), images(2, SIZE)
    with torch.no_grad():
        kept, last = block_relevance.run(model, x)
        torch.testing.assert_close(block_relevance.logits_of(model, last), model(x))
        start = F.one_hot(torch.tensor([1, 3]), 5).double()
        relevance = block_relevance.from_logits(model, start, last)
        for block, values in zip(reversed(model.blocks), reversed(kept), strict=True):
            torch.testing.assert_close(relevance.sum((1, 2)), torch.ones(2, dtype=x.dtype), rtol=1e-5, atol=0)
            relevance, _ = block_relevance.through_block(block, relevance, values)
    torch.testing.assert_close(relevance.sum((1, 2)), torch.ones(2, dtype=x.dtype), rtol=1e-5, atol=0)
    _, sums = published(model.state_dict(), tokens(model, x[0]), 1, depth=4)
    torch.testing.assert_close(torch.stack(sums), torch.ones(5, dtype=x.dtype))


def test_every_rule_conserves_and_keeps_images_apart():
    a, b = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    relevance = torch.randn(2, 3, 4).double()
    out, wide, weight = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 40).double(), torch.randn(5, 40).double()
    torch.testing.assert_close(
        block_relevance.through_linear(out, wide, weight).sum(-1), out.sum(-1), rtol=1e-6, atol=1e-6
    )
    halves = block_relevance.through_product(torch.randn(2, 3, 3).double(), a, b.mT)
    assert halves[0].shape == a.shape
    torch.testing.assert_close(halves[0].sum((1, 2)), halves[1].sum((1, 2)), rtol=1e-6, atol=1e-6)
    first, second = block_relevance.through_add(relevance, a, b)
    torch.testing.assert_close((first + second).sum((1, 2)), relevance.sum((1, 2)), rtol=1e-6, atol=1e-6)
    alone = block_relevance.through_add(relevance[:1], a[:1], b[:1])
    torch.testing.assert_close(alone[0], first[:1])
    pooled = block_relevance.through_mean(relevance[:, 0], a)
    torch.testing.assert_close(pooled.sum(1), relevance[:, 0], rtol=1e-6, atol=1e-6)
    assert block_relevance.divide(torch.ones(1), torch.zeros(1)) == 0


@pytest.mark.parametrize("name", ["class token", "distilled", "pooled"])
def test_other_heads_and_pools_and_batches(name):
    model, _ = build(name)
    x = images(3, SIZE)
    method = TransformerAttribution(model, variant="lrp")
    maps = method.attribute(x, [0, 1, 2])
    assert maps.shape == (3, 1, *SIZE)
    assert (maps >= 0).all()
    assert (maps.flatten(1).std(1) > 0).all()
    torch.testing.assert_close(maps[1:2], method.attribute(x[1:2], 1), rtol=1e-6, atol=1e-12)
    with torch.no_grad():
        _, last = block_relevance.run(model, x)
        relevance = block_relevance.from_logits(model, torch.ones(3, 5).to(x) / 5, last)
    torch.testing.assert_close(relevance.sum((1, 2)), torch.ones(3).to(x), rtol=1e-6, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(method.attribute(x, [0, 1, 2]), maps)


def test_layers_and_functions_of_the_output():
    model, x = vit(depth=3), images(2, SIZE)
    start = TransformerAttribution(model, variant="lrp", start_layer=2).attribute(x, 1)
    named = TransformerAttribution(model, variant="lrp", layers=["blocks.2.attn"]).attribute(x, lambda y: y[:, 1])
    torch.testing.assert_close(start, named)
    twice = TransformerAttribution(model, variant="lrp", layers=["blocks.2.attn"]).attribute(x, lambda y: 2 * y[:, 1])
    torch.testing.assert_close(twice, 4 * start, rtol=1e-6, atol=1e-12)  # the gradient's factor, and the relevance's
    # the other variant starts where it is told, too
    one = TransformerAttribution(model, start_layer=1).attribute(x, 1)
    two = TransformerAttribution(model, layers=["blocks.[12].attn"]).attribute(x, 1)
    torch.testing.assert_close(one, two)


def test_layer_scale_and_norms_of_queries_are_element_wise():
    model = vit(init_values=0.5, qk_norm=True)
    maps = TransformerAttribution(model, variant="lrp").attribute(images(2, SIZE))
    assert maps.std() > 0


def test_bad_options():
    model = vit()
    with pytest.raises(ValueError, match=r"variant='lpr'\): no such variant. Did you mean 'lrp'"):
        TransformerAttribution(model, variant="lpr")
    with pytest.raises(ValueError, match="both choose layers; leave one out"):
        TransformerAttribution(model, layers=["blocks.1.attn"], start_layer=1)
    with pytest.raises(ValueError, match=r"start_layer=2\): the model has the layers 0\.\.1"):
        TransformerAttribution(model, start_layer=2).attribute(images(1, SIZE))


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class Louder(VisionTransformer):
    def forward_features(self, x, **options):
        return super().forward_features(2 * x, **options)


Louder.__name__ = "VisionTransformer"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Wrapped(vit()),
            r"propagated through timm's VisionTransformer and .*, but this is Wrapped; use variant=",
        ),
        (lambda: vit(global_pool="max"), "no relevance rule is known for global_pool='max'"),
        (lambda: vit(global_pool="map", class_token=False), r"attn_pool mix tokens next to the traced layers"),
        (
            lambda: vit(block_fn=timm.models.vision_transformer.ResPostBlock),
            r"for blocks\.0 \(ResPostBlock\), blocks\.1",
        ),
        (lambda: vit(mlp_layer=timm.layers.SwiGLU), r"for blocks\.0\.mlp\.fc1_g, blocks\.0\.mlp\.fc1_x"),
        (
            lambda: _livelier(Louder(**{**OPTIONS})),
            r"blocks\.1\.attn attends differently \(by .*\) than the model's parts",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(make, message):
    with pytest.raises(UnsupportedModelError, match=message):
        TransformerAttribution(make(), variant="lrp").attribute(images(1, SIZE))


def test_scans_are_refused():
    with pytest.raises(UnsupportedModelError, match="is defined for softmax attention"):
        TransformerAttribution(vim(depth=1), variant="lrp").attribute(images(1))
