import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_attn import orders as patch_orders
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.models import vim
from mamba_attn.models._layers import CausalConv1d, DropPath, RMSNorm
from mamba_attn.models.vim import VisionMamba
from mamba_attn.ops import reference
from tests.models import naive

SMALL = {"image_size": (24, 40), "patch_size": 8, "num_classes": 5, "embed_dim": 20, "depth": 2, "d_state": 3}
DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def small(dtype=torch.float64, **options):
    return naive.randomise(VisionMamba(**{**SMALL, **options}).to(dtype).eval())


def images(dtype=torch.float64, height=24, width=40, batch=2):
    return torch.randn(batch, 3, height, width, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("class_token", "order", "stride"),
    [
        ("middle", "raster", 8),
        ("middle", "spiral", 8),
        ("first", "hilbert", 8),
        (None, "zigzag", 8),
        ("middle", "raster", 5),
    ],
)
def test_equals_the_equations(dtype, tolerance, class_token, order, stride):
    model = small(dtype, class_token=class_token, order=order, stride=stride)
    layout = model.layout(24, 40)
    (position,) = layout.class_tokens or (None,)
    tokens = patch_orders.insert_tokens(patch_orders.order(order, *layout.grid), layout.class_tokens)
    x = images(dtype)
    expected = naive.vim(model.state_dict(), x, depth=2, stride=stride, order=tokens, position=position)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("height", "width", "options", "grid", "positions"),
    [
        (24, 40, {}, (3, 5), (7,)),
        (24, 41, {"class_token": "first"}, (3, 5), (0,)),
        (100, 60, {"class_token": None}, (12, 7), ()),
        (24, 40, {"stride": 4}, (5, 9), (22,)),
        (8, 8, {}, (1, 1), (0,)),
    ],
)
def test_layout(height, width, options, grid, positions):
    model = small(**options)
    expected = TokenLayout(grid, 8, options.get("stride", 8), class_tokens=positions)
    assert model.layout(height, width) == expected
    with torch.no_grad():
        assert model.forward_features(images(height=height, width=width)).shape == (2, expected.tokens, 20)


def test_batch_mates_do_not_matter():
    model = small()
    x = images(batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-12, atol=1e-12)


def test_order_changes_the_output():
    model, x = small(), images()
    other = VisionMamba(**SMALL, order="spiral").double().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (model(x) - other(x)).abs().max() > 1e-3


def test_routes_visit_the_class_token_at_its_position():
    routes = small(order="column").routes(TokenLayout((3, 5), 8, class_tokens=(7,)))
    assert routes[0].tolist() == [0, 5, 11, 1, 6, 12, 2, 7, 8, 13, 3, 9, 14, 4, 10, 15]
    assert routes[1].tolist() == routes[0].flip(0).tolist()


def test_one_order_written_two_ways():
    mixer, x = small().layers[0].mixer, torch.randn(2, 16, 20, dtype=torch.float64)
    explicit = patch_orders.both_ways(torch.arange(16))
    for ours, theirs in zip(
        *(vars(vim.project(mixer, x, orders=orders)).values() for orders in (None, explicit)), strict=True
    ):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", ["raster", "morton"])
def test_the_matrices_give_what_enters_out_proj(order):
    model, seen = small(order=order), {}
    mixer = model.layers[1].mixer
    mixer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    mixer.out_proj.register_forward_pre_hook(lambda _, args: seen.update(gated=args[0]))
    with torch.no_grad():
        model(images())
        layout = model.layout(24, 40)
        record = vim.project(mixer, seen["x"], orders=model.routes(layout), layout=layout)
        y = (reference.channel_matrices(record) @ record.u.unsqueeze(-1)).squeeze(-1) + record.D.unsqueeze(
            -1
        ) * record.u
        gated = reference.merge_tokens(record, y) * record.gate
        torch.testing.assert_close(gated.mT, seen["gated"], rtol=1e-10, atol=1e-10)
        finished = vim.finish(mixer, record, reference.merge_tokens(record, y))
        torch.testing.assert_close(finished, mixer.out_proj(seen["gated"]), rtol=0, atol=1e-10)
    assert record.layout is layout
    assert record.scale == 0.5


def test_the_sum_is_not_halved_without_division():
    mixer = small(if_divide_out=False).layers[0].mixer
    assert vim.project(mixer, torch.randn(1, 4, 20, dtype=torch.float64)).scale == 1


def test_a_mixer_with_one_direction():
    mixer = small().layers[0].mixer
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    both = vim.project(mixer, x)
    for name in ("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b"):
        delattr(mixer, name)
    one = vim.project(mixer, x)
    assert (one.routes, one.scale) == (1, 1.0)
    torch.testing.assert_close(one.delta[:, 0], both.delta[:, 0], rtol=0, atol=0)


def test_plain_convolutions_and_layer_scale_are_understood():
    mixer = small().layers[0].mixer
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    expected = mixer(x)
    for name in ("conv1d", "conv1d_b"):
        ours = getattr(mixer, name)
        foreign = nn.Conv1d(40, 40, 4, groups=40, padding=3, dtype=torch.float64)
        foreign.load_state_dict(ours.state_dict())
        setattr(mixer, name, foreign)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-12, atol=1e-12)
    mixer.gamma = torch.full((20,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), 2 * expected, rtol=1e-12, atol=1e-12)


def test_submodules_are_called_as_modules():
    mixer, called = small().layers[0].mixer, []
    for name, module in mixer.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    mixer(torch.randn(1, 5, 20, dtype=torch.float64))
    assert sorted(called) == sorted(name for name, _ in mixer.named_children())


def test_rules_are_asked():
    class Recorder(Rules):
        asked = ()

        def activation(self, function, x):
            self.asked += ("activation",)
            return super().activation(function, x)

        def gate(self, y, gate):
            self.asked += ("gate",)
            return super().gate(y, gate)

    rules, mixer = Recorder(), small().layers[0].mixer
    record = vim.project(mixer, torch.randn(1, 5, 20, dtype=torch.float64), rules=rules)
    vim.finish(mixer, record, torch.zeros(1, 40, 5, dtype=torch.float64), rules)
    assert rules.asked == ("activation",) * 3 + ("gate",)


def test_step_sizes_stay_float32_under_autocast():
    mixer = small(torch.float32).layers[0].mixer
    x = torch.randn(2, 6, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        record = vim.project(mixer, x)
        output = mixer(x)
    assert (record.delta.dtype, record.A.dtype) == (torch.float32, torch.float32)
    with torch.no_grad():
        exact = mixer(x)
    assert (output - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_bfloat16_model_runs():
    model = small(torch.float32)
    exact = model(images(torch.float32))
    output = model.bfloat16()(images(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert output.shape == exact.shape
    assert torch.isfinite(output).all()


def test_features_are_contiguous_for_the_scan():
    record = vim.project(small().layers[0].mixer, torch.randn(2, 6, 20, dtype=torch.float64))
    assert record.u.stride(2) == record.delta.stride(2) == record.gate.stride(1) == 1


@pytest.mark.parametrize("class_token", ["middle", "first", None])
def test_positions_are_interpolated_and_the_class_token_kept(class_token):
    model = small(class_token=class_token)
    old, new = model.layout(24, 40), model.layout(48, 32)
    resized = vim.resize_positions(model.pos_embed, old, new)
    patches = model.pos_embed[0, old.patches].T.reshape(1, 20, 3, 5)
    expected = F.interpolate(patches, size=(6, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized[0, new.patches].T.reshape(1, 20, 6, 4), expected)
    for before, after in zip(old.class_tokens, new.class_tokens, strict=True):
        assert torch.equal(resized[0, after], model.pos_embed[0, before])


def test_pooling():
    x = images()
    for class_token in ("middle", "first", None):
        model = small(class_token=class_token)
        tokens = model.forward_features(x)
        pooled = {"middle": tokens[:, 7], "first": tokens[:, 0], None: tokens.mean(1)}[class_token]
        torch.testing.assert_close(model(x), model.head(pooled))


def test_no_classes_leave_the_features():
    assert small(num_classes=0)(images()).shape == (2, 20)


def test_training_reaches_every_parameter():
    model = small(torch.float32, drop_path=0.2, order="spiral").train()
    with torch.inference_mode():  # the remembered orders must serve training afterwards
        model(images(torch.float32))
    for layer in model.layers:
        layer.drop_path.rate = 0
    model(images(torch.float32)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in model.parameters())


def test_no_weight_decay():
    model = small()
    names = model.no_weight_decay()
    per_layer = {f"mixer.{stem}" for s in ("", "_b") for stem in (f"A{s}_log", f"D{s}", f"dt_proj{s}.bias")}
    assert names == {"pos_embed", "cls_token"} | {f"layers.{i}.{name}" for i in (0, 1) for name in per_layer}
    assert all(getattr(model.get_parameter(name), "_no_weight_decay", False) for name in names if "mixer" in name)


def test_initial_values():
    mixer = VisionMamba(**{**SMALL, "embed_dim": 256}).layers[0].mixer
    torch.testing.assert_close(mixer.A_log[5].exp(), torch.tensor([1.0, 2.0, 3.0]))
    step = F.softplus(mixer.dt_proj.bias)
    assert 0.99e-3 < step.min() < 2e-3
    assert 0.05 < step.max() < 0.101


def test_errors():
    with pytest.raises(ValueError, match=r"VisionMamba\(class_token='last'\): expected 'middle', 'first' or None"):
        VisionMamba(class_token="last")
    with pytest.raises(ValueError, match=r"order='spirale'\): no such order. Did you mean 'spiral'\?"):
        VisionMamba(order="spirale")
    with pytest.raises(
        ValueError, match="an image of 7 x 40 pixels is smaller than a patch of 8 x 8; give at least 8 pixels"
    ):
        small()(images(height=7))


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_convolution(length, dtype):
    layer = CausalConv1d(6, 4).to(dtype)
    x = torch.randn(3, length, 6, dtype=dtype).mT.requires_grad_()
    outputs = layer(x), F.conv1d(F.pad(x, (3, 0)), layer.weight, layer.bias, groups=6)
    torch.testing.assert_close(*outputs)
    direction = torch.randn_like(outputs[0])
    inputs = [x, layer.weight, layer.bias]
    for ours, theirs in zip(*(torch.autograd.grad(output, inputs, direction) for output in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_causal_convolution_differentiates_twice():
    layer, x = CausalConv1d(2, 3), torch.randn(1, 2, 5, requires_grad=True)

    def second(function):
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, layer.weight])

    plain = second(lambda x: F.conv1d(F.pad(x, (2, 0)), layer.weight, layer.bias, groups=2))
    for ours, theirs in zip(second(layer), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rms_norm():
    layer, x = RMSNorm(7).double(), torch.randn(3, 7, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    torch.testing.assert_close(layer(x), naive.rms_norm(x, layer.weight))
    assert torch.equal(layer(torch.zeros(1, 7, dtype=torch.float64)), torch.zeros(1, 7, dtype=torch.float64))


def test_drop_path():
    layer, x = DropPath(0.25), torch.ones(4000, 2)
    assert torch.equal(layer.eval()(x), x)
    dropped = layer.train()(x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert abs((dropped[:, 0] == 0).float().mean().item() - 0.25) < 0.03
