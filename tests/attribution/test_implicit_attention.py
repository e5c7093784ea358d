import pytest
import torch

from mamba_attn.attribution import ImplicitAttention
from mamba_attn.attribution.activation_recorder import ActivationRecorder
from mamba_attn.attribution.implicit_attention import PARTS, Implicit, MixerRecorder
from mamba_attn.attribution.published.implicit_unified import unified_row
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import create
from mamba_attn.models.vit import vision_transformer
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import (
    MODELS,
    SIZE,
    class_or_mean,
    images,
    in_pixels,
    layers_of,
    of_one_token,
    per_channel,
    product_less_identity,
    vim,
    vmamba,
)
from tests.attribution.relevance import toeplitz
from tests.attribution.test_queries import keyword

TARGET = [3, 0, 4]
ABLATIONS = [{}, *({part: False} for part in PARTS), dict.fromkeys(PARTS, False)]


def close(actual, expected, tolerance=1e-11):
    actual, expected = actual.detach(), expected.detach()
    assert expected.abs().max() > 1e-9
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def grid_matrix(weight, height, width):
    """(channels, tokens, tokens) of a padded depthwise 3x3 convolution."""
    T = torch.zeros(len(weight), height * width, height * width, dtype=weight.dtype)
    for r in range(height):
        for c in range(width):
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= r + i < height and 0 <= c + j < width:
                        T[:, r * width + c, (r + i) * width + c + j] = weight[:, 0, i + 1, j + 1]
    return T


def explicit(model, layer, x, skip=True, gate=True, conv=True, activation=True):
    """M (batch, channels, tokens, tokens) and the constant, from dense matrices, x (batch, channels, tokens)."""
    mixer, scan = model.get_submodule(layer.name), layer.scan
    alpha, D, tokens = per_channel(layer), scan.D, scan.tokens
    eye = torch.eye(tokens, dtype=x.dtype)
    alpha = alpha + D[..., None, None] * eye if skip else alpha
    M, constant = torch.zeros(*x.shape, tokens, dtype=x.dtype), torch.zeros_like(x)
    for route, order in enumerate(scan.read_order):
        P = eye[order]  # P @ tokens are in the order of the route
        if hasattr(mixer, "conv2d"):
            module, along = mixer.conv2d, grid_matrix(mixer.conv2d.weight, *scan.layout.grid)
            along = torch.einsum("ij,cjk->cik", P, along)
        else:
            module = mixer.conv1d_b if route else mixer.conv1d
            along = toeplitz(module.weight, tokens) @ P
        bias = torch.zeros(x.shape[1]).double() if module.bias is None else module.bias
        p = torch.einsum("cij,bcj->bci", along, x) + bias[:, None]
        ratio = p.sigmoid() if activation else torch.ones_like(p)
        T = along if conv else P.expand_as(along)
        through = torch.einsum("ki,bckl->bcil", P, alpha[:, route]) * ratio.unsqueeze(2) * scan.scale
        M += torch.einsum("bcil,clj->bcij", through, T)
        constant += torch.einsum("bcil,c->bci", through, bias) if conv else 0
    if gate and scan.gate is not None and not hasattr(mixer, "out_norm"):
        M, constant = M * scan.gate.unsqueeze(3), constant * scan.gate
    return M, constant


def seen(model, inputs):
    """Per mixer of the untouched model, by hooks: x before its convolution, o (gated output or before out_norm),
    and dlogit/do; each (batch, channels, tokens)."""
    found, handles = [], []

    def flat(tensor):
        return tensor.flatten(2) if tensor.ndim == 4 else tensor

    for mixer in model.modules():
        if not hasattr(mixer, "out_proj"):
            continue
        first = mixer.conv2d if hasattr(mixer, "conv2d") else mixer.conv1d
        last = getattr(mixer, "out_norm", mixer.out_proj)

        def start(module, args):
            found.append([args[0]])

        def end(module, args):
            args[0].retain_grad()
            found[-1].append(args[0])

        handles += [first.register_forward_pre_hook(start), last.register_forward_pre_hook(end)]
    model(inputs)[torch.arange(len(inputs)), TARGET[: len(inputs)]].sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    layers = layers_of(model, inputs)
    triples = []
    for layer, (x, o) in zip(layers, found, strict=True):
        frame = flat(x.detach())
        if frame is x.detach() or x.ndim == 3:
            frame = torch.zeros_like(frame).index_copy(2, layer.scan.read_order[0], frame)
        triples.append((layer, frame, o.detach().flatten(1, -2).mT, o.grad.flatten(1, -2).mT))
    return triples


def implicit(model, inputs, **parts):
    recorder = MixerRecorder()
    with torch.no_grad(), trace(model, rules=recorder) as record:
        model(inputs)
    return [Implicit(layer, recorder, **parts) for layer in record.layers]


@pytest.mark.parametrize("name", MODELS)
def test_m_x_plus_constant_is_the_gated_output_of_the_untouched_model(name):
    model, inputs = MODELS[name](), images()
    if name == "vmamba":
        model.layers[1].blocks[0].op.conv2d.bias = torch.nn.Parameter(torch.randn(16).double())
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, inputs = model.to(dtype), inputs.to(dtype)
        for part, (_, x, o, _) in zip(implicit(model, inputs), seen(model, inputs), strict=True):
            assert torch.equal(part.x, x) or dtype == torch.float32
            close(part.apply(x) + part.constant(), o, tolerance)
            if dtype == torch.float64 and (name != "vmamba" or part.layer.name == "layers.1.blocks.0.op"):
                assert part.constant().abs().max() > 1e-3 * o.abs().max()


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_micro"])
def test_trained_models(name):
    model, inputs = create(name, weights="demo"), torch.randn(1, 3, 128, 128)
    for part, (_, x, o, _) in zip(implicit(model, inputs), seen(model, inputs), strict=True):
        close(part.apply(x) + part.constant(), o, 1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [*((name, parts) for name in ("first", "vmamba") for parts in ABLATIONS), ("vmamba_v0", {"gate": False})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "all",
)
def test_against_explicit_matrices(name, parts):
    model, inputs = MODELS[name](), images(2)
    for own, (layer, x, o, _) in zip(implicit(model, inputs, **parts), seen(model, inputs), strict=True):
        M, constant = explicit(model, layer, x, **parts)
        if not parts:
            close(torch.einsum("bcij,bcj->bci", M, x) + constant, o)
        close(own.apply(x), torch.einsum("bcij,bcj->bci", M, x))
        assert constant.any() or not own.constant().any()
        torch.testing.assert_close(own.constant(), constant, rtol=0, atol=1e-12)
        rows, columns = torch.randn_like(x), torch.randn_like(x)
        close(own.rows(rows), torch.einsum("bci,bcij->bcj", rows, M))
        close(own.matrix(rows, columns), torch.einsum("bci,bcij,bcj->bij", rows, M, columns))


def dense(model, inputs, *, gradient=True, **parts):
    """(layout, W) of every layer."""
    found = []
    for layer, x, _, derivative in seen(model, inputs):
        M, _ = explicit(model, layer, x, **parts)
        if gradient:
            derivative = of_one_token(layer.layout, derivative)
            found.append((layer.layout, torch.einsum("bci,bcij,bcj->bij", derivative, M, x)))
        else:
            found.append((layer.layout, M.mean(1)))
    return found


@pytest.mark.parametrize("name", ["middle", "pooled", "vmamba", "vmamba_v0"])
@pytest.mark.parametrize("gradient", [True, False])
def test_rollout_against_the_dense_product(name, gradient):
    model, inputs = MODELS[name](), images()
    weighted = dense(model, inputs, gradient=gradient)
    for signed in (False, True):
        steps = [(layout, W if signed else W.clamp(min=0)) for layout, W in weighted]
        layout, row = weighted[0][0], product_less_identity(model, steps)
        method = ImplicitAttention(model, gradient=gradient, signed=signed)
        close(method.attribute(inputs, TARGET), layout.to_pixels(layout.to_grid(row), SIZE).unsqueeze(1))


@pytest.mark.parametrize("name", ["middle", "vmamba"])
@pytest.mark.parametrize("gradient", [True, False])
def test_rows_without_rollout(name, gradient):
    model, inputs = MODELS[name](), images()
    rows = [(layout, class_or_mean(layout) @ W) for layout, W in dense(model, inputs, gradient=gradient)]
    for signed in (False, True):
        method = ImplicitAttention(model, gradient=gradient, rollout=False, signed=signed)
        maps = [(layout, row if signed else row.clamp(min=0)) for layout, row in rows]
        close(method.attribute(inputs, TARGET), in_pixels(maps))
    if not gradient:
        found = ImplicitAttention(model).rows(inputs)
        assert list(found) == [layer.name for layer in layers_of(model, inputs)]
        for row, (_, expected) in zip(found.values(), rows, strict=True):
            close(row, expected)


def test_parts_and_queries_reach_the_map():
    model, inputs = vim(depth=1, class_token=None), images()
    plain = ImplicitAttention(model, signed=True).attribute(inputs, TARGET)
    for part in PARTS:
        ((layout, W),) = dense(model, inputs, **{part: False})
        found = ImplicitAttention(model, signed=True, **{part: False}).attribute(inputs, TARGET)
        close(found, layout.to_pixels(layout.to_grid(W.mean(1)), SIZE).unsqueeze(1))
        assert (found - plain).abs().max() > 1e-3 * plain.abs().max()
    ((layout, W),) = dense(model, inputs)
    for query, tokens in (((12, 20), [5]), ((0, 0, 16, 24), [0, 1, 3, 4, 6, 7])):
        found = ImplicitAttention(model).attribute(inputs, TARGET, **keyword(query), grid=True)[:, 0]
        close(found, layout.to_grid(W[:, tokens].clamp(min=0).mean(1)))
        ((_, mean),) = dense(model, inputs, gradient=False)
        close(ImplicitAttention(model).rows(inputs, **keyword(query))["layers.0.mixer"], mean[:, tokens].mean(1))


@pytest.mark.parametrize("name", ["first", "vmamba"])
def test_the_weighted_matrix_sums_to_the_layers_share(name):
    model, inputs = MODELS[name](), images()
    parts = ImplicitAttention(model)._weighted(inputs, TARGET, gradient=True)
    for part, (layer, _, o, derivative) in zip(parts, seen(model, inputs), strict=True):
        share = (of_one_token(layer.layout, derivative) * (o - part.implicit.constant())).sum((1, 2))
        W = part.matrix()
        assert ((W.sum((1, 2)) - share).abs() <= 1e-12 * W.abs().sum((1, 2))).all()


@pytest.mark.parametrize("name", ["middle", "first"])
def test_the_published_row_is_this_one_without_d_and_without_halving(name):
    model, inputs, recorder = MODELS[name](), images(), ActivationRecorder()
    with torch.no_grad(), trace(model, rules=recorder) as record:
        model(inputs)
    for layer, part in zip(record.layers, implicit(model, inputs, skip=False), strict=True):
        token = layer.layout.class_tokens[0]
        published = unified_row(model.get_submodule(layer.name), layer, token, recorder.activated[layer.scan])
        unit = torch.zeros_like(part.x)
        unit[:, :, token] = 1
        close(2 * part.rows(unit), published)


def test_frozen_models_inference_mode_and_float32():
    for make in (lambda: vim(depth=2), lambda: vmamba(depths=(1, 1))):
        model, inputs = make(), images()
        expected = ImplicitAttention(model).attribute(inputs, TARGET)
        linear = ImplicitAttention(model, signed=True).attribute(inputs, TARGET)
        # equal but for rounding: PyTorch chooses its kernels by requires_grad and inference mode on some processors
        close(ImplicitAttention(model.requires_grad_(False)).attribute(inputs, TARGET), expected, 1e-12)
        with torch.inference_mode():
            born = make()
            assert ImplicitAttention(born, gradient=False).attribute(inputs * 1).isfinite().all()
            close(ImplicitAttention(model).attribute(inputs * 1, TARGET), expected, 1e-12)
            close(ImplicitAttention(model, signed=True).attribute(inputs * 1, TARGET), linear, 1e-12)
        single = ImplicitAttention(model.float()).attribute(inputs.float(), TARGET)
        close(single.double(), expected, 1e-4)


def test_another_target_gives_another_map_and_without_gradient_none_does():
    model, inputs = vmamba(depths=(1, 1)), images()
    maps = [ImplicitAttention(model).attribute(inputs, target=k) for k in range(2)]
    assert (maps[0] - maps[1]).abs().max() > 1e-3 * maps[0].abs().max()
    maps = [ImplicitAttention(model, gradient=False).attribute(inputs, target=k) for k in range(2)]
    assert torch.equal(*maps)


def test_other_models_are_refused():
    vit = vision_transformer(image_size=SIZE, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5)
    with pytest.raises(UnsupportedModelError, match="ImplicitAttention is defined for selective scans"):
        ImplicitAttention(vit.double().eval()).attribute(images())

    class Plain(torch.nn.Module):  # a mixer that convolves without a depthwise convolution module
        def forward(self, x):
            return x

    model = vmamba()
    model.layers[1].blocks[0].op.conv2d = Plain()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.blocks\.0\.op is no mixer of Vim or VMamba, with one"):
        ImplicitAttention(model).attribute(images())
