"""AttnLRP against its rules, one token and feature at a time; what it conserves."""

import pytest
import timm
import torch
import torch.nn.functional as F

from mamba_attn.attribution import AttnLRP
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import _livelier, images, vim
from tests.attribution.relevance import hand_on
from tests.attribution.vit.test_vit import SIZE

HEADS, WIDTH, FEATURES = 2, 4, 8
TARGET = [3, 0, 4]


def vit(**options):
    small = {"img_size": SIZE, "patch_size": 8, "embed_dim": FEATURES, "depth": 1, "num_heads": HEADS, "num_classes": 5}
    model = _livelier(timm.create_model("vit_tiny_patch16_224", **{**small, **options}))
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * torch.randn_like(value) if value.ndim == 1 else 0
    return model


def by_the_rules(w, x, target, gamma):
    """(logit, relevance of the tokens x of one image, what is left over) for a ViT of one block."""

    def norm(value, name):
        spread = (value.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return (value - value.mean(1, keepdim=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"], spread

    def linear(value, name):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def through_linear(value, name, relevance):
        return hand_on(value, w[f"{name}.weight"], linear(value, name), relevance, gamma)

    def through_norm(value, name, relevance):  # y_k = sum_j (d_jk - 1 / n) / spread * weight_k x_j + bias_k
        y, spread = norm(value, name)
        centring = torch.eye(FEATURES).to(value) - 1 / FEATURES
        return torch.stack(
            [
                hand_on(
                    value[i : i + 1], centring * w[f"{name}.weight"][:, None] / spread[i], y[i : i + 1], each[None]
                )[0]
                for i, each in enumerate(relevance)
            ]
        )

    b = "blocks.0."
    n1, _ = norm(x, b + "norm1")
    q, k, v = (part.view(-1, HEADS, WIDTH) for part in linear(n1, b + "attn.qkv").split(FEATURES, 1))
    s = torch.einsum("ihd,jhd->hij", q, k) * WIDTH**-0.5
    p = s.softmax(-1)
    heads = torch.einsum("hij,jhd->ihd", p, v)
    attended = linear(heads.flatten(1), b + "attn.proj")
    middle = x + attended
    n2, _ = norm(middle, b + "norm2")
    before = linear(n2, b + "mlp.fc1")
    hidden = F.gelu(before)
    out = linear(hidden, b + "mlp.fc2")
    last = middle + out
    pooled, _ = norm(last, "norm")
    logit = linear(pooled[:1], "head")[0, target]

    R = torch.zeros_like(pooled)
    R[0] = hand_on(pooled[:1], w["head.weight"][target, None], logit.view(1, 1), logit.view(1, 1), gamma)[0]
    R = through_norm(last, "norm", R)
    R_middle, R_out = R * middle / last, R * out / last
    R_middle = R_middle + through_norm(
        middle, b + "norm2", through_linear(n2, b + "mlp.fc1", through_linear(hidden, b + "mlp.fc2", R_out))
    )
    R_x, R_attended = R_middle * x / middle, R_middle * attended / middle
    R_heads = through_linear(heads.flatten(1), b + "attn.proj", R_attended).view(-1, HEADS, WIDTH)
    terms = torch.einsum("hij,jhd->hijd", p, v) * (R_heads / heads).permute(1, 0, 2).unsqueeze(2) / 2
    R_p, R_v = terms.sum(3), terms.sum(1).permute(1, 0, 2)
    R_s = s * (R_p - p * R_p.sum(-1, keepdim=True))
    products = torch.einsum("ihd,jhd->hijd", q, k) * WIDTH**-0.5 * (R_s / s).unsqueeze(3) / 2
    R_q, R_k = products.sum(2).permute(1, 0, 2), products.sum(1).permute(1, 0, 2)
    joint = torch.cat([part.flatten(1) for part in (R_q, R_k, R_v)], 1)
    R_x = R_x + through_norm(x, b + "norm1", through_linear(n1, b + "attn.qkv", joint))
    return logit, R_x.sum(1), (R_p - R_s).sum()


@pytest.mark.parametrize("gamma", [0, 0.25])
def test_it_is_the_papers_rules_on_a_one_block_vit(gamma):
    model, inputs = vit(), images()
    found = AttnLRP(model, gamma_layers="*", gamma=gamma)
    relevances = found.relevances(inputs, TARGET)["blocks.0.attn"]
    left_over = found.bias_relevances(inputs, TARGET)["blocks.0.attn.softmax"]
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(inputs))
        logits = model(inputs)
        for index, target in enumerate(TARGET):
            logit, expected, rest = by_the_rules(model.state_dict(), tokens[index], target, gamma)
            torch.testing.assert_close(logit, logits[index, target], rtol=0, atol=1e-12)
            torch.testing.assert_close(relevances[index], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
            torch.testing.assert_close(left_over[index], rest, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.attribute(inputs, TARGET, grid=True).flatten(1), relevances[:, 1:])


@pytest.mark.parametrize("options", [{}, {"depth": 3, "qkv_bias": False}, {"depth": 2, "qk_norm": True, "reg_tokens": 2,
                                                                            "init_values": 0.5}])  # fmt: skip
def test_tokens_biases_and_what_softmax_leaves_over_are_the_logit(options):
    model, inputs = vit(**options), images()
    method = AttnLRP(model, layers="*")
    with torch.no_grad():
        logits = model(inputs)[range(3), TARGET]
    tokens, others = method.relevances(inputs, TARGET), method.bias_relevances(inputs, TARGET)
    assert len(tokens) == options.get("depth", 1)
    torch.testing.assert_close(next(iter(tokens.values())).sum(1) + sum(others.values()), logits, rtol=0, atol=1e-11)
    assert max(float(share.abs().max()) for name, share in others.items() if name.endswith(".softmax")) > 1e-4


def test_scans_are_refused():
    with pytest.raises(UnsupportedModelError, match="AttnLRP is defined for softmax attention"):
        AttnLRP(vim(depth=1)).attribute(images(1), 0)
