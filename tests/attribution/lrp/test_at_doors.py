"""Relevance through scans that are seen at their doors: equal to an adapter's, conserved, nothing left behind."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mamba_attn
from mamba_attn.attribution import FrozenContribution, MambaAttribution, MambaLRP
from mamba_attn.attribution.lrp.relevance_rules import LRPRules
from mamba_attn.errors import TraceError, UnsupportedModelError
from tests.tracing import foreign
from tests.tracing.foreign import Both, Line, Net, Windows
from tests.tracing.test_chunk_doors import Mamba2, Spread
from tests.tracing.test_doors import MODELS, Scanned

with mamba_attn.cpu_stand_ins():
    import causal_conv1d_cuda
    import selective_scan_cuda
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn

METHODS = pytest.mark.parametrize("method", [MambaLRP, FrozenContribution])
TARGET = [1, 3]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def _layout(monkeypatch):
    """What an adapter cannot read from this stem."""
    layout = mamba_attn.TokenLayout(grid=(4, 5), patch_size=4)
    monkeypatch.setattr(
        "mamba_attn.attribution.maps.trace",
        lambda *args, **options: mamba_attn.trace(*args, **{**options, "layout": layout}),
    )


def images(batch=2):
    return torch.randn(batch, 3, 16, 20).double()


def shares(method, model, x, target=TARGET):
    """(tokens, constants by name, logits) of every image."""
    with torch.no_grad():
        logits = model(x)[torch.arange(len(x)), target]
    explained = method(model)
    if method is MambaLRP:
        (tokens,) = explained.relevances(x, target).values()
        return tokens, explained.bias_relevances(x, target), logits
    parts = explained.contributions(x, target)
    return parts.tokens + parts.positions, parts.biases, logits


class InnerFn(torch.autograd.Function):
    """Convolution, SiLU, scan and gate in one, with the backward of the extensions, as mamba_ssm's."""

    @staticmethod
    def forward(ctx, xz, weight, bias, delta, A, B, C, D, step):
        x, z = xz.chunk(2, 1)
        u = causal_conv1d_cuda.causal_conv1d_fwd(x, weight, bias, None, None, None, True)
        out, states, gated = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, step, True)
        ctx.save_for_backward(xz, weight, bias, u, delta, A, B, C, D, step, out, states)
        return gated

    @staticmethod
    def backward(ctx, dout):
        xz, weight, bias, u, delta, A, B, C, D, step, out, states = ctx.saved_tensors
        x, z = xz.chunk(2, 1)
        dxz = torch.empty_like(xz)
        dx, dz = dxz.chunk(2, 1)
        du, ddelta, dA, dB, dC, dD, dstep, dz, again = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, step, dout.contiguous(), states, out, dz, True, True
        )
        assert not again.any() or torch.allclose(again, out * F.silu(z))  # zeros where orders are measured
        dx, dweight, dbias, _ = causal_conv1d_cuda.causal_conv1d_bwd(
            x, weight, bias, du, None, None, None, dx, False, True
        )
        return dxz, dweight, dbias, ddelta, dA, dB, dC, dD, dstep


class Fused(nn.Module):
    """A mixer in one function, and the same in parts that autograd differentiates."""

    def __init__(self, parts=False):
        super().__init__()
        channels, states = foreign.CHANNELS, foreign.STATES
        self.enter, self.leave = nn.Linear(channels, 2 * channels), nn.Linear(channels, channels)
        self.conv = nn.Conv1d(channels, channels, 3, groups=channels, padding=2)
        self.project = nn.Linear(channels, channels + 2 * states)
        self.A, self.D = nn.Parameter(torch.randn(channels, states) / 2), nn.Parameter(torch.randn(channels))
        self.step = nn.Parameter(torch.randn(channels))
        self.parts = parts

    def forward(self, x):
        xz = self.enter(x).mT
        given = self.project(x).mT.split([foreign.CHANNELS, foreign.STATES, foreign.STATES], 1)
        delta, B, C = (t.contiguous() for t in given)
        if not self.parts:
            weight = self.conv.weight[:, 0]
            return self.leave(
                InnerFn.apply(xz, weight, self.conv.bias, delta, -torch.exp(self.A), B, C, self.D, self.step).mT
            )
        u, z = xz.chunk(2, 1)
        u = F.silu(self.conv(u)[..., : x.shape[1]])
        y = foreign.selective_scan_fn(u, delta, -torch.exp(self.A), B, C, self.D, None, self.step, delta_softplus=True)
        return self.leave((y * F.silu(z)).mT)


class Stream(nn.Module):
    """Blocks that hand on (tokens, residual stream), and add and norm in one function, as Vim's."""

    def __init__(self, fused=True, rms=True, depth=2):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, foreign.CHANNELS, 4, 4), nn.Linear(foreign.CHANNELS, 5)
        self.mixers = nn.ModuleList(Fused(parts=not fused) for _ in range(depth))
        self.weights = nn.Parameter(torch.rand(depth + 1, foreign.CHANNELS) + 0.5)
        self.biases = nn.Parameter(torch.randn(depth + 1, foreign.CHANNELS))
        self.fused, self.rms = fused, rms

    def norm(self, i, x, residual):
        weight, bias = self.weights[i], self.biases[i]
        if self.fused:
            norm = rms_norm_fn if self.rms else layer_norm_fn
            return norm(x, weight, bias, residual=residual, prenorm=True, residual_in_fp32=True, eps=1e-5)
        total = x if residual is None else x + residual
        size = (foreign.CHANNELS,)
        if self.rms:
            return F.rms_norm(total, size, weight, 1e-5) + bias, total
        return F.layer_norm(total, size, weight, bias, 1e-5), total

    def forward(self, images):
        x, residual = self.stem(images).flatten(2).mT, None
        for i, mixer in enumerate(self.mixers):
            y, residual = self.norm(i, x, residual)
            x = mixer(y)
        return self.head(self.norm(-1, x, residual)[0].mean(1))


class Halved(Scanned):
    """Recognised by an adapter, which computes something else."""

    def forward(self, x):
        return 0.5 * F.silu(super().forward(x))


MADE = {
    **{name: make for name, (make, _) in MODELS.items()},
    "windows": lambda: Net(Windows()),
    "scans behind each other": lambda: Net(Both(serial=True)),
    "an adapter that does not fit": lambda: Net(Halved(foreign.CHANNELS, fast=False), Line()),
    "fused mixers": lambda: Net(Fused(), Fused()),
    "fused norms": Stream,
    "fused layer norms": lambda: Stream(rms=False),
    "chunk scans": lambda: Net(Mamba2(), Mamba2(ways=2, fused=False)),
    "chunk scans, gated": lambda: Net(Mamba2(normed=False), Mamba2(fused=False, dt_limit=(0.3, 0.8))),
}


@METHODS
@pytest.mark.parametrize("name", MADE)
@pytest.mark.filterwarnings("ignore:trace")
def test_law_10_relevance_of_tokens_and_constants_is_the_logit_of_every_image(name, method):
    model, x = MADE[name]().double().eval(), images()
    tokens, constants, logits = shares(method, model, x)
    total = tokens.sum(1) + sum(constants.values())
    torch.testing.assert_close(total, logits, rtol=0, atol=1e-12)
    assert (tokens.sum(1) - logits).abs().min() > 1e-4
    assert method(model).attribute(x, TARGET).shape == (2, 1, 16, 20)
    alone, _, _ = shares(method, model, x[1:], TARGET[1:])
    torch.testing.assert_close(alone[0], tokens[1], rtol=0, atol=1e-12)


@METHODS
@pytest.mark.usefixtures("_layout")
def test_law_11_relevance_at_a_door_is_that_of_an_adapter(method, monkeypatch):
    """Where the residual stream goes around the mixers' modules, too."""
    model, x = Net(*(Scanned(foreign.CHANNELS, fast=False) for _ in range(2))).double().eval(), images()
    known, constants, _ = shares(method, model, x)
    monkeypatch.setattr("mamba_attn.tracing.traceable.find_mixers", lambda *_: {})
    found, others, _ = shares(method, model, x)
    torch.testing.assert_close(found, known, rtol=0, atol=1e-9 * float(known.abs().max()))
    for name in {**constants, **others}:  # a constant behind the steps, which are fixed, has no share
        a, b = (its.get(name, torch.zeros(2).double()) for its in (constants, others))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    single, _, _ = shares(method, model.float(), x.float())
    assert (single - known).abs().max() < 1e-5 * known.abs().max()


@METHODS
@pytest.mark.parametrize("make", [lambda parts: Net(Fused(parts)), lambda parts: Stream(fused=not parts)])
def test_fused_code_has_the_relevance_of_the_same_code_in_parts(make, method):
    fused, parts, x = make(False).double().eval(), make(True).double().eval(), images()
    parts.load_state_dict(fused.state_dict())
    (a, constants, _), (b, others, _) = (shares(method, model, x) for model in (fused, parts))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for name in ("mixers.0.conv.bias", "mixers.0.leave.bias"):
        torch.testing.assert_close(constants[name], others[name], rtol=0, atol=1e-12)


@METHODS
def test_a_chunk_scan_has_the_relevance_of_the_same_selective_scan(method):
    chunks, spread, x = Net(Mamba2(fused=False)).double().eval(), Net(Spread()).double().eval(), images()
    spread.load_state_dict(chunks.state_dict())
    (a, constants, _), (b, others, _) = (shares(method, model, x) for model in (chunks, spread))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert constants.keys() == others.keys()
    for name in constants:
        torch.testing.assert_close(constants[name], others[name], rtol=0, atol=1e-12)


class Attention(nn.MultiheadAttention):
    """Attention written in three ways."""

    def __init__(self, way):
        super().__init__(foreign.CHANNELS, 2, batch_first=True)
        self.way = way

    def forward(self, x):
        if self.way == "module":
            return super().forward(x, x, x)[0]
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if self.way == "function":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


@pytest.mark.filterwarnings("ignore:trace")
def test_softmax_attention_is_held_fixed_however_it_is_written():
    models = {way: Net(Line(), Attention(way)).double().eval() for way in ("by hand", "function", "module")}
    x, found = images(), {}
    with torch.no_grad():
        for value in models["by hand"].parameters():
            value.add_(0.1 * torch.randn_like(value))
    for way, model in models.items():
        model.load_state_dict(models["by hand"].state_dict())
        found[way], constants, logits = shares(FrozenContribution, model, x)
        torch.testing.assert_close(found[way].sum(1) + sum(constants.values()), logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[way], found["by hand"], rtol=0, atol=1e-12)


def test_gamma_layers_that_fused_code_does_not_call_are_refused():
    model, x = Net(Fused()).double().eval(), images()
    assert not torch.equal(MambaLRP(model, gamma_layers="*.enter").attribute(x), MambaLRP(model).attribute(x))
    with pytest.raises(UnsupportedModelError, match=r"gamma_layers=\['\*\.conv'\]\): mixers\.0\.conv: the model's own"):
        MambaLRP(model, gamma_layers="*.conv").attribute(x)


@METHODS
def test_checkpointed_blocks(method):
    class Saved(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model, x = Net(Line(), Fused()).double().eval(), images()
    expected, _, _ = shares(method, model, x)
    model.mixers = nn.ModuleList(Saved(block) for block in model.mixers)
    found, _, _ = shares(method, model, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_what_goes_around_the_first_layer_is_a_share_of_its_own():
    class Around(nn.Module):
        """A U-Net in small: half of the stem's features never meet a scan."""

        def __init__(self):
            super().__init__()
            self.stem, self.down = (
                nn.Conv2d(3, foreign.CHANNELS, 2, 2),
                nn.Conv2d(foreign.CHANNELS, foreign.CHANNELS, 2, 2),
            )
            self.mixer, self.up = Line(), nn.ConvTranspose2d(foreign.CHANNELS, foreign.CHANNELS, 2, 2)
            self.head = nn.Conv2d(2 * foreign.CHANNELS, 4, 1)

        def forward(self, x):
            skip = F.relu(self.stem(x))
            low = self.down(skip)
            mixed = self.mixer(low.flatten(2).mT).mT.unflatten(2, low.shape[2:])
            return self.head(torch.cat([skip, self.up(low + mixed)], 1))

    model, x = Around().double().eval(), images()
    target = (2, 3, 4)
    with torch.no_grad():
        logits = model(x)[:, 2, 3, 4]
    parts = FrozenContribution(model).contributions(x, target)
    torch.testing.assert_close(parts.total, logits, rtol=0, atol=1e-12)
    assert parts.biases["what does not pass mixer.forth"].abs().min() > 1e-4
    assert MambaLRP(model).attribute(x, target).shape == (2, 1, 16, 20)


def test_nothing_is_left_behind_and_other_threads_see_nothing():
    model, other, x = Net(Line(), Fused()).double().eval(), Stream().double().eval(), images()
    functions = [causal_conv1d_cuda.causal_conv1d_bwd, selective_scan_cuda.bwd, layer_norm_fn]

    def gradient(of):
        given = x.clone().requires_grad_()
        return torch.autograd.grad(of(given).square().sum(), given)[0]

    plain, found = [gradient(model), gradient(other)], []

    class Busy(nn.Module):
        """Runs both models on another thread in the middle of its own forward."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            thread = threading.Thread(target=lambda: found.extend([gradient(model), gradient(other)]))
            thread.start()
            thread.join()
            return self.model(x)

    expected, _, _ = shares(MambaLRP, model, x)
    relevance = MambaLRP(Busy()).relevances(x, TARGET)
    torch.testing.assert_close(next(iter(relevance.values())), expected, rtol=0, atol=1e-13)
    assert len(found) > 1
    for i, value in enumerate([*found, gradient(model), gradient(other)]):
        assert torch.equal(value, plain[i % 2])
    assert torch._C._len_torch_function_stack() == 0
    assert functions == [causal_conv1d_cuda.causal_conv1d_bwd, selective_scan_cuda.bwd, layer_norm_fn]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_nested_traces_do_not_see_each_others_rules():
    model, other, x = Net(Fused()).double().eval(), Net(Fused(), Line()).double().eval(), images()
    expected, _, _ = shares(MambaLRP, model, x)
    with mamba_attn.trace(other) as alone:
        gradients = alone.gradients(other(x)[:, 1].sum())
    with mamba_attn.trace(other) as around:
        logits = other(x)
        relevance, _, _ = shares(MambaLRP, model, x)
        found = around.gradients(logits[:, 1].sum())
    torch.testing.assert_close(relevance, expected, rtol=0, atol=1e-13)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient)
    with mamba_attn.trace(model, rules=LRPRules(model)):
        model(x)
        with mamba_attn.trace(other) as inside:
            found = inside.gradients(other(x)[:, 1].sum())
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient)


def test_the_module_where_relevance_escapes_is_named():
    class Blind(nn.Module):
        def forward(self, x):
            return torch.ops.aten.silu.default(x) + x

    model = Net(nn.Sequential(Line(), Blind()), Line()).double().eval()
    with pytest.raises(TraceError, match=r"something escaped the rules in mixers\.0\.1 \(Blind\): a norm"):
        MambaLRP(model).attribute(images(), 1)


def test_the_module_is_named_where_orders_differ_by_image_and_are_measured_again():
    class Sorted(torch.autograd.Function):
        """As DefMamba's: a gradient for the keys, too, which is none of a linear map."""

        @staticmethod
        def forward(ctx, x, keys):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient, gradient.sum(-1, keepdim=True)

    class Deformable(nn.Module):
        def forward(self, x):
            return Sorted.apply(x, x[..., :1])

    model = Net(foreign.Shuffled(sort=True), nn.Sequential(Deformable(), Line())).double().eval()
    with pytest.raises(TraceError, match=r"escaped the rules in mixers\.1\.0 \(Deformable\): .* an autograd\.Function"):
        MambaLRP(model).attribute(images(), 1)


@pytest.mark.usefixtures("_layout")
def test_rows_of_mamba_attribution_at_doors_are_those_of_an_adapter(monkeypatch):
    model, x = Net(*(Scanned(foreign.CHANNELS, fast=False) for _ in range(2))).double().eval(), images()
    options = [{"rollout": False}, {"rollout": False, "signed": True}]
    expected = [MambaAttribution(model, **its).attribute(x, TARGET) for its in options]
    monkeypatch.setattr("mamba_attn.tracing.traceable.find_mixers", lambda *_: {})
    for its, truth in zip(options, expected, strict=True):
        found = MambaAttribution(model, **its).attribute(x, TARGET)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
