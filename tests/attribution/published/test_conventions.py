"""The class token's row, the rollout and the three maps of two published codes, against loops written from them."""

import inspect

import pytest
import torch

from mamba_attn import attribution
from mamba_attn.attribution import AttentionRollout, MambaAttribution, RawAttention
from mamba_attn.attribution import published as published_methods
from mamba_attn.attribution.activation_recorder import ActivationRecorder
from mamba_attn.attribution.published.hidden_mamba import broadcast_rollout, hidden_mamba_row, late_layers, min_max
from mamba_attn.attribution.published.implicit_unified import unified_row
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import SIZE, images, layers_of, vim, vmamba

METHODS = [RawAttention, AttentionRollout, MambaAttribution]
CONVENTIONS = ["hidden_mamba", "implicit_unified"]
TARGET = [3, 0, 4]


def hidden_mamba_loop(model, layer, token):
    """alpha[c, t] with the decay of the steps t + 1 .. c - 1, and 0 at c; one sequential product per token."""
    scan = layer.scan
    row = torch.zeros(scan.batch, scan.channels, scan.tokens, dtype=torch.float64)
    for route in range(2):
        order = scan.read_order[route].tolist()
        last = order.index(token)
        for t in range(last):
            product = torch.ones(scan.batch, scan.channels, scan.states, dtype=torch.float64)
            for k in range(t + 1, last):
                product *= torch.exp(scan.delta[:, route, :, k, None] * scan.A[route])
            entry = scan.C[:, route, :, :, last] * product * scan.B[:, route, :, :, t]
            row[..., order[t]] += entry.sum(-1) * scan.delta[:, route, :, t]
    return row


def implicit_unified_loop(model, layer, token):
    """silu(z[c]) * (row c of alpha diag(sigmoid(p)) T), T the Toeplitz matrix of the taps; p and z by hooks."""
    scan, mixer = layer.scan, model.get_submodule(layer.name)
    row = torch.zeros(scan.batch, scan.channels, scan.tokens, dtype=torch.float64)
    for route, conv in enumerate((mixer.conv1d, mixer.conv1d_b)):
        order = scan.read_order[route]
        c = order.tolist().index(token)
        alpha = torch.zeros(scan.batch, scan.channels, scan.tokens, dtype=torch.float64)
        for t in range(c + 1):
            decay = torch.exp(scan.A[route] * scan.delta[:, route, :, t + 1 : c + 1].sum(-1, keepdim=True))
            alpha[..., t] = (scan.C[:, route, :, :, c] * decay * scan.B[:, route, :, :, t]).sum(-1)
            alpha[..., t] *= scan.delta[:, route, :, t]
        inner, z = layer.inner.chunk(2, dim=-1)
        p = conv(inner[:, order].mT)
        width = conv.weight.shape[-1]
        taps = torch.zeros(scan.channels, scan.tokens, scan.tokens, dtype=torch.float64)
        for t in range(scan.tokens):
            for j in range(max(0, t - width + 1), t + 1):
                taps[:, t, j] = conv.weight[:, 0, width - 1 - (t - j)]
        unified = torch.einsum("bct,ctj->bcj", alpha * p.sigmoid(), taps)
        row[..., order] += unified * torch.nn.functional.silu(z[:, token])[..., None]
    return row.detach()


LOOPS = {"hidden_mamba": hidden_mamba_loop, "implicit_unified": implicit_unified_loop}


def published(convention, model, inputs):
    """Per layer (row by the loop, gradient at the mixer's output by a hook), and the class token."""
    layers, kept, handles = layers_of(model, inputs), {}, []
    for layer in layers:
        mixer = model.get_submodule(layer.name)

        def keep_inner(module, args, output, layer=layer):
            layer.inner = output.detach()

        def keep_output(module, args, output, layer=layer):
            output.retain_grad()
            kept[layer.name] = output

        handles += [mixer.in_proj.register_forward_hook(keep_inner), mixer.register_forward_hook(keep_output)]
    model(inputs)[torch.arange(3), TARGET].sum().backward()
    model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    (token,) = layers[0].layout.class_tokens
    return [(LOOPS[convention](model, layer, token), kept[layer.name].grad) for layer in layers], token


def scaled(x):
    return (x - x.min()) / (x.max() - x.min())


def explicit_rollout(vectors, token):
    """The class token's row of the product of matrices whose rows are all the same vector, rows divided by sums."""
    product = torch.eye(len(vectors[0]), dtype=torch.float64)
    for vector in vectors:
        matrix = torch.eye(len(vector), dtype=torch.float64) + vector
        product = matrix / matrix.sum(1, keepdim=True) @ product
    return product[token].clamp(min=0)


def expected_map(method, convention, rows, gradients, token):
    """One image: rows (channels, tokens) and gradients (tokens, features) of the late layers."""
    if method is RawAttention:
        return torch.stack([scaled(row).mean(0) for row in rows]).mean(0)
    if method is AttentionRollout:
        return explicit_rollout([row.mean(0) for row in rows], token)
    fused = []
    for row, gradient in zip(rows, gradients, strict=True):
        s, positive = scaled(gradient.clamp(min=0).max(1).values), row.clamp(min=0)
        if convention == "hidden_mamba":
            fused.append(scaled(positive).mean(0) * s)
        else:
            product = positive.mean(0) * s
            fused.append(scaled(product) if product.max() > 0 else product)
    return explicit_rollout(fused, token)


def close(actual, expected, tolerance=1e-11):
    assert expected.abs().max() > 1e-9
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


MODELS = {
    "middle": lambda: vim(depth=5),
    "first": lambda: vim(depth=4, class_token="first", order="hilbert"),
    "undivided": lambda: vim(depth=4, if_divide_out=False),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_against_loops(convention, name):
    model, inputs = MODELS[name](), images()
    expected, token = published(convention, model, inputs)
    recorder = ActivationRecorder()
    with torch.no_grad(), trace(model, rules=recorder) as record:
        model(inputs)
    for layer, (row, _) in zip(record.layers, expected, strict=True):
        if convention == "hidden_mamba":
            found = hidden_mamba_row(layer, token)
        else:
            found = unified_row(model.get_submodule(layer.name), layer, token, recorder.activated[layer.scan])
        close(found.detach(), row, 1e-12)


def test_the_hidden_mamba_row_has_no_self_term_and_is_not_the_true_row():
    model, inputs = vim(depth=1), images()
    ((row, _),), token = published("hidden_mamba", model, inputs)
    with torch.no_grad(), trace(model) as record:
        model(inputs)
    true = 2 * record.layers[0].row(token, fold="each")
    assert (row[..., token] == 0).all()
    assert (row - true)[..., :token].abs().max() > 1e-2 * true.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", ["middle", "first"])
def test_maps_against_the_published_steps_one_image_at_a_time(method, convention, name):
    model, inputs = MODELS[name](), images()
    layers, token = published(convention, model, inputs)
    layout = layers_of(model, inputs)[0].layout
    late = layers[round(len(layers) * 15 / 24) :]
    for chosen, options in ((late, {}), (layers, {"layers": ["*"]})):
        rows = torch.stack(
            [
                expected_map(method, convention, [r[i] for r, _ in chosen], [g[i] for _, g in chosen], token)
                for i in range(3)
            ]
        )
        expected = layout.to_pixels(layout.to_grid(rows), SIZE).unsqueeze(1)
        actual = method(model, convention=convention, **options).attribute(inputs, target=TARGET)
        close(actual, expected)


@pytest.mark.parametrize("signs", ["positive", "both"])
def test_the_rollout_has_its_closed_form(signs):
    vectors = [0.3 * torch.randn(4, 7, dtype=torch.float64) for _ in range(5)]
    vectors = [v.abs() if signs == "positive" else v for v in vectors]
    actual = broadcast_rollout(vectors, 3)
    for i in range(4):
        product = torch.eye(7, dtype=torch.float64)
        for vector in vectors:
            matrix = torch.eye(7, dtype=torch.float64) + vector[i]
            product = matrix / matrix.sum(1, keepdim=True) @ product
        close(actual[i], product[3])
    # arXiv 2403.01590's code: e / prod(1 + s_k) + sum_k v_k / prod_{m = start..k}(1 + s_m)
    sums = torch.stack([1 + v.sum(1) for v in vectors])
    closed = sum(v / sums[: k + 1].prod(0)[:, None] for k, v in enumerate(vectors))
    closed[:, 3] += 1 / sums.prod(0)
    close(actual, closed)
    close(actual.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_permuting_the_batch_permutes_the_maps_and_targets_matter_to_one_method(convention):
    model, order = vim(depth=5), torch.tensor([2, 0, 1])
    for method in METHODS:
        explain = method(model, convention=convention).attribute
        maps = explain(images(), target=TARGET)
        close(explain(images()[order], target=torch.tensor(TARGET)[order]), maps[order], 1e-13)
        other = explain(images(), target=[k + 1 if k < 4 else 1 for k in TARGET])
        assert torch.equal(other, maps) == (method is not MambaAttribution)
        assert (maps[0] - maps[1]).abs().max() > 1e-6


@pytest.mark.parametrize(("depth", "first"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (12, 8), (24, 15)])
def test_the_first_late_layer(depth, first):
    (layer,) = layers_of(vim(depth=1), images(1))
    layers = [ScanLayer(str(index), layer.scan) for index in range(depth)]
    assert late_layers(layers) == layers[first:]


def test_scaling_without_a_spread_is_zero_where_published_code_has_nan():
    assert torch.equal(min_max(torch.full((2, 3, 4), 5.0), (1, 2)), torch.zeros(2, 3, 4))
    maps = MambaAttribution(vim(depth=1), convention="hidden_mamba").attribute(images())
    assert torch.equal(maps, torch.zeros(3, 1, *SIZE, dtype=torch.float64))  # the last layer alone says nothing


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_models_and_queries_that_the_convention_has_no_row_for(method, convention):
    name = f"{method.__name__}\\(convention='{convention}'\\)"
    for model, kind in ((vmamba(), "VSSM"), (vim(depth=1, class_token=None), "VisionMamba")):
        with pytest.raises(
            ValueError, match=f"{name}: this convention reads the class token's row, and {kind} has no "
        ):
            method(model, convention=convention).attribute(images())
    with pytest.raises(ValueError, match=r"not one for pixel=\(3, 4\); leave pixel out, or use convention='exact'"):
        method(vim(depth=1), convention=convention).attribute(images(), pixel=(3, 4))


@pytest.mark.parametrize("method", METHODS)
def test_unknown_conventions_and_signed_ones(method):
    with pytest.raises(
        ValueError, match=r"\(convention='hidden_mambo'\): no such convention\. Did you mean 'hidden_mam"
    ):
        method(vim(depth=1), convention="hidden_mambo")
    with pytest.raises(
        ValueError,
        match=r"unified', signed=True\): convention='implicit_unified' is published code",
    ):
        method(vim(depth=1), convention="implicit_unified", signed=True)


def test_implicit_unified_needs_a_convolution():
    model, recorder = vim(depth=1), ActivationRecorder()
    with torch.no_grad(), trace(model, rules=recorder) as record:
        model(images())
    activated = recorder.activated[record.layers[0].scan]
    with pytest.raises(ValueError, match=r"layers\.0\.mixer is no Vim mixer \(a gate and causal convolutions"):
        unified_row(torch.nn.Identity(), record.layers[0], 7, activated)


@pytest.mark.parametrize(("owner", "option"), published_methods.METHODS)
def test_an_option_of_an_exact_method_is_a_published_class(owner, option):
    exact = getattr(attribution, owner)
    assert option in inspect.signature(exact.__init__).parameters
    for value, make in published_methods.METHODS[owner, option].items():
        assert value in exact.__doc__
        model = vmamba(depths=(1, 2, 1)) if "vmamba" in value else vim(depth=3)
        method = make(model, layers=None)
        expected = exact(model, **{option: value}).attribute(images(), TARGET)
        assert torch.equal(method.attribute(images(), TARGET), expected), value
        with pytest.raises(ValueError, match=rf"^{type(method).__name__}\.attribute\(target=9\): expected class ind"):
            method.attribute(images(), 9)
        with pytest.raises(ValueError, match=rf"^{owner}\({option}='{value}'\)\.attribute\(target=9\): expected class"):
            exact(model, **{option: value}).attribute(images(), 9)
