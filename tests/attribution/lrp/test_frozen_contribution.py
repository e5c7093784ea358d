import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_attn.attribution import FrozenContribution, MambaLRP
from mamba_attn.attribution.lrp.frozen_contribution import FrozenRules
from mamba_attn.models import create
from mamba_attn.models.vit import vision_transformer
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import MODELS, SIZE, images, vim, vmamba
from tests.attribution.relevance import of_one_layer_vim
from tests.integrations import small_mambavision

TARGET = [3, 0, 4]
DEMOS = pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro", "vit_micro"])


def vit(**options):
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, **options}
    model = vision_transformer(image_size=SIZE, patch_size=8, **options).double().eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * torch.randn_like(value)
    return model


ALL = {**MODELS, "vit": vit, "vit_registers": lambda: vit(reg_tokens=2, qk_norm=True, init_values=0.5)}


@DEMOS
def test_contributions_and_biases_are_the_logit_of_trained_models(name):
    model = create(name, weights="demo")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, inputs = model.to(dtype), torch.randn(1, 3, 128, 128, dtype=dtype)
        with torch.no_grad():
            logits = model(inputs).amax(1)
        parts = FrozenContribution(model).contributions(inputs)
        assert logits.abs().min() > 0.1
        assert ((parts.total - logits).abs() <= tolerance * logits.abs()).all()
        assert (parts.tokens.sum(1) - logits).abs().min() > 1e-3  # the constants matter
        assert len(parts.biases) > 20


@pytest.mark.parametrize("name", ALL)
def test_constants_are_bias_times_derivative_and_everything_adds_up(name):
    model, inputs = ALL[name](), images()[:1]
    parts, rules = FrozenContribution(model).contributions(inputs, 2), FrozenRules(model)
    parameters = dict(model.named_parameters())
    biases = [key for key in parameters if key.endswith("bias")]
    with trace(model, rules=rules):
        logit = model(inputs)[0, 2]
        asked = [parameters[key] for key in [*biases, *(["pos_embed"] if "pos_embed" in parameters else [])]]
        derivatives = torch.autograd.grad(logit, asked, allow_unused=True)
    expected = {
        key: (parameters[key] * derivative).sum()
        for key, derivative in zip(biases, derivatives, strict=False)
        if derivative is not None and not key.startswith("patch_embed")
    }
    assert set(parts.biases) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(parts.biases[key][0], value, rtol=0, atol=1e-13)
    torch.testing.assert_close(parts.total[0], logit.detach(), rtol=0, atol=1e-12)
    if "pos_embed" not in parameters:
        assert not parts.positions.any()
        return
    others = list(parts.layout.class_tokens + parts.layout.registers)
    assert not parts.positions[:, others].any()
    patches = parts.layout.patches
    shares = (model.pos_embed * derivatives[-1])[0].sum(1)
    placed = patches if len(shares) == parts.layout.tokens else patches - len(parts.layout.registers)
    torch.testing.assert_close(parts.positions[0, patches], shares[placed], rtol=0, atol=1e-13)


@pytest.mark.parametrize("biased", [False, True])
def test_against_explicit_equations_on_a_one_layer_vim(biased):
    model, inputs = vim(depth=1), images()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") and "dt_proj" not in name:
                value += torch.randn_like(value) if biased else -value
    parts = FrozenContribution(model).contributions(inputs, TARGET)
    for index, target in enumerate(TARGET):
        _, expected = of_one_layer_vim(model, inputs[index : index + 1], target, to_y=1.0, to_gate=0.0)
        found = (parts.tokens + parts.positions)[index]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_against_explicit_matrices_on_a_one_block_vit():
    model, image = vit(depth=1), images()[:1]
    block = model.blocks[0]
    seen = {}
    handle = block.register_forward_pre_hook(lambda module, args: seen.update(E=args[0].detach()[0]))
    with torch.no_grad(), trace(model) as record:
        logit = model(image)[0, 4]
    handle.remove()
    E, P = seen["E"], record["blocks.0.attn"].record.probabilities[0]

    def norm_matrix(norm, x):  # per token, (features, features), and its constant
        spread = (x.var(1, unbiased=False) + norm.eps).sqrt()
        centre = torch.eye(x.shape[1]).double() - 1 / x.shape[1]
        return norm.weight[:, None] * centre / spread[:, None, None]

    with torch.no_grad():
        value = block.attn.qkv.weight[32:]  # of both heads, side by side
        heads = [block.attn.proj.weight[:, s] @ value[s] for s in (slice(0, 8), slice(8, 16))]
        first = norm_matrix(block.norm1, E)
        to_mid = torch.einsum("hij,hde,jef->idjf", P, torch.stack(heads), first)
        eye = torch.eye(len(E)).double()
        to_mid += torch.einsum("ij,df->idjf", eye, torch.eye(16).double())
        mid = E + block.attn(block.norm1(E[None]))[0]
        second, inner = norm_matrix(block.norm2, mid), block.mlp.fc1(block.norm2(mid))
        mlp = torch.einsum(
            "dh,ih,he,ief->idf", block.mlp.fc2.weight, F.gelu(inner) / inner, block.mlp.fc1.weight, second
        )
        to_end = torch.einsum("ide,iejf->idjf", mlp + torch.eye(16).double(), to_mid)
        end = mid + block.mlp(block.norm2(mid))
        row = model.head.weight[4] @ norm_matrix(model.norm, end)[0]
        expected = (torch.einsum("d,djf->jf", row, to_end[0]) * E).sum(1)
    parts = FrozenContribution(model).contributions(image, 4)
    torch.testing.assert_close((parts.tokens + parts.positions)[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.total[0], logit, rtol=0, atol=1e-12)
    assert expected.abs().min() > 1e-6


@pytest.mark.parametrize("name", ["middle", "vit"])
def test_the_map_shows_patches_without_their_positions(name):
    model, inputs = ALL[name](), images()
    parts = FrozenContribution(model).contributions(inputs, TARGET)
    assert parts.positions.abs().max() > 1e-3
    for positions in (False, True):
        found = FrozenContribution(model, positions=positions).attribute(inputs, TARGET, grid=True)
        expected = parts.tokens + parts.positions if positions else parts.tokens
        torch.testing.assert_close(found[:, 0], parts.layout.to_grid(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", [vim, vit])
def test_positions_of_other_sizes_are_found_too(make):
    model = make(dynamic_img_size=True) if make is vit else make()
    inputs = images(2, (48, 32))
    parts = FrozenContribution(model).contributions(inputs, 1)
    with torch.no_grad():
        torch.testing.assert_close(parts.total, model(inputs)[:, 1], rtol=0, atol=1e-12)
    assert parts.layout.grid == (6, 4)
    assert (parts.positions[:, parts.layout.patches] != 0).all()


def test_the_gate_takes_no_share_where_mamba_lrp_gives_it_half():
    model, inputs = vim(depth=1), images()
    parts = FrozenContribution(model).contributions(inputs, 1)
    (relevance,) = MambaLRP(model).relevances(inputs, 1).values()
    assert ((parts.tokens + parts.positions) - relevance).abs().max() > 1e-3 * relevance.abs().max()
    y, gate = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    found = torch.autograd.grad(FrozenRules(model).gate(y, gate).sum(), (y, gate), allow_unused=True)
    assert torch.equal(found[0], gate.detach())
    assert found[1] is None


class MovingNorm(nn.LayerNorm):
    """Channels last or first, in and out."""

    def __init__(self, features, first_in, first_out):
        super().__init__(features)
        self.first_in, self.first_out = first_in, first_out

    def forward(self, x):
        x = F.layer_norm(x.movedim(1, 3) if self.first_in else x, self.normalized_shape, self.weight, self.bias)
        return x.movedim(3, 1) if self.first_out else x


class Linear2d(nn.Linear):
    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Foreign(nn.Module):
    """A block of VMamba with its channels first in between, on a grid with as many columns as there are channels."""

    def __init__(self, op, norm, features):
        super().__init__()
        self.op, self.norm, self.after = op, norm, MovingNorm(features, True, False)
        self.linear, self.act, self.same = Linear2d(features, features), nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x):
        y = self.act(self.linear(self.norm(x)))
        return x + self.op(self.after(self.same(y)))


@pytest.mark.parametrize("norm", ["moving", "batch"])
def test_foreign_frames_norms_and_layers(norm):
    class BatchNorm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.movedim(3, 1))

    model, inputs = vmamba(), images(2, (32, 32))
    op = model.layers[0].blocks[0].op
    op.out_act, op.channel_first = nn.Identity(), True
    op.in_proj = Linear2d(8, 8, bias=False)
    op.in_proj.weight, op.out_proj = nn.Parameter(torch.randn(8, 8)), Linear2d(8, 8)
    op.out_norm = MovingNorm(8, True, True)
    block = Foreign(op, MovingNorm(8, False, True) if norm == "moving" else BatchNorm(8), 8)
    model.layers[0].blocks[0] = block.double().eval()
    with torch.no_grad():
        for name, value in block.named_parameters():
            if name.endswith(("bias", "norm.weight", "after.weight", "linear.weight")) and "dt_" not in name:
                value.normal_()
        if norm == "batch":
            block.norm.running_mean.normal_()
            block.norm.running_var.uniform_(0.5, 2)
        logit = model(inputs)[:, 1]
    parts = FrozenContribution(model).contributions(inputs, 1)
    own = {name.removeprefix("layers.0.blocks.0.") for name in parts.biases if name.startswith("layers.0.blocks.0.")}
    assert own == {"norm.bias", "linear.bias", "after.bias", "op.out_norm.bias", "op.out_proj.bias"}
    torch.testing.assert_close(parts.total, logit, rtol=0, atol=1e-12)
    lrp = MambaLRP(model, gamma_layers="*")
    total = lrp.relevances(inputs, 1)["layers.0.blocks.0.op"].sum(1) + sum(lrp.bias_relevances(inputs, 1).values())
    torch.testing.assert_close(total, logit, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("options", "size"), [({}, (72, 56)), ({"windows": (8, 4)}, (64, 64))])
def test_mixers_and_attention_in_windows_padded_or_not(options, size):
    model, inputs = small_mambavision.build(**options), small_mambavision.images(size)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
        logit = model(inputs)[:, 3]
    method = FrozenContribution(model)
    parts = method.contributions(inputs, 3)
    torch.testing.assert_close(parts.total, logit, rtol=0, atol=1e-12)
    one = method.contributions(inputs[1:], 3)
    for name, share in parts.biases.items():
        torch.testing.assert_close(share[1:], one.biases[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(method.attribute(inputs, 3, grid=True)[:, 0], parts.layout.to_grid(parts.tokens))
    assert FrozenContribution(model, layers="levels.1.*").attribute(inputs, 3).shape == (2, 1, *size)


def test_half_precision_and_training_models():
    model, inputs = vmamba().float(), images().float()
    expected = FrozenContribution(model).attribute(inputs, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = FrozenContribution(model).attribute(inputs, 1)
    assert (found.double() - expected).abs().max() < 0.1 * expected.abs().max()
    dropped = vim(drop_path=0.5, depth=4).train()
    parts = FrozenContribution(dropped).contributions(images(), 1)  # adds up to that pass's own logit, or raises
    assert parts.total.isfinite().all()
