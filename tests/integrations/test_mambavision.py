"""MambaVision: mixers and attention inside windows, against models of our own whose every sum is a loop."""

import re
from functools import partial

import pytest
import torch
from mamba_attn.integrations.mambavision import MambaVisionAdapter
from mamba_attn.integrations.timm_vit import TimmViTAdapter
from mamba_attn.integrations.vim import VimAdapter
from torch import nn
from torch.utils.checkpoint import checkpoint

import mamba_attn
from mamba_attn.attribution import AttentionRollout, MambaAttribution, RawAttention, TransformerAttribution
from mamba_attn.attribution.attention_rollout import to_finer
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import MatrixTooLargeError, TraceError, UnsupportedModelError
from mamba_attn.testing import LawError, check_adapter
from mamba_attn.tracing.adapters import Seen, find_mixers
from tests.integrations.by_number import differs, refusal
from tests.integrations.small_mambavision import (
    Attention,
    Block,
    Mixer,
    Stage,
    build,
    close,
    entering,
    images,
    same_as_hooks,
    windows_of,
)

SIZES = {"whole": (64, 64), "several": (64, 96), "padded": (72, 104), "odd": (75, 43)}  # grids 8x8, 8x12, 9x13, 10x6
WINDOWS = {"whole": (8, 4)}  # else (4, 3)
SCANS = ["levels.1.blocks.0.mixer", "levels.2.blocks.0.mixer"]
HEADS = ["levels.1.blocks.1.mixer", "levels.2.blocks.1.mixer"]
VARIANTS = {
    "even taps": {"d_conv": 4},
    "biases": {"conv_bias": True, "bias": True},
    "wide": {"expand": 2, "d_state": 5},
    "norms, not fused": {"attention": {"qk_norm": True, "fused": False}},
    "gated": {"attention": {"gated": True}},
    "mixers alone": {"blocks": ("mixer", "mixer")},
}


def model_of(size, dtype=torch.float64, **options):
    return build(dtype, windows=WINDOWS.get(size, (4, 3)), **options), images(SIZES[size], dtype=dtype)


def traced(model, x, **options):
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


@pytest.mark.parametrize("size", SIZES)
def test_laws_in_float32(size):
    report = check_adapter(*model_of(size, torch.float32))
    assert [layer.name for layer in report.layers] == [SCANS[0], HEADS[0], SCANS[1], HEADS[1]]
    assert report.output_error <= 2e-6
    assert report.matrix_error <= 1e-5
    assert report.observed_identical


@pytest.mark.parametrize("size", SIZES)
def test_laws_in_float64(size):
    report = check_adapter(*model_of(size), tolerance=1e-11)
    assert report.matrix_error <= 1e-11


@pytest.mark.parametrize("name", VARIANTS)
def test_laws_of_variants(name):
    assert check_adapter(*model_of("odd", **VARIANTS[name]), tolerance=1e-11).output_error <= 1e-11


def test_one_module_alone_is_plain():
    mixer, x = Mixer(12).double(), torch.randn(3, 7, 12, dtype=torch.float64)
    assert check_adapter(mixer, x, tolerance=1e-12).matrix_error <= 1e-12
    layer = traced(mixer, x).layers[0]
    assert (layer.batch, layer.scan.routes, layer.tokens) == (3, 1, 7)
    with pytest.raises(TraceError, match="the tokens' place in the image is not known"):
        _ = layer.layout


@pytest.mark.parametrize("size", SIZES)
def test_layouts(size):
    model, x = model_of(size)
    sides = WINDOWS.get(size, (4, 3))
    for layer in traced(model, x).layers:
        stage = int(layer.name[7])
        grid = tuple(-(-pixels // (8 * stage)) for pixels in SIZES[size])
        assert layer.layout == TokenLayout(grid, 8 * stage, offset=0.5, window=sides[stage - 1])
        padded = [-(-n // sides[stage - 1]) * sides[stage - 1] for n in grid]
        assert (layer.batch, layer.tokens) == (2, padded[0] * padded[1])


@pytest.mark.parametrize("size", ["whole", "padded", "odd"])
def test_matrices_are_those_of_the_windows_and_zero_between_them(size):
    model, x = model_of(size)
    trace, parts = traced(model, x), {}
    for name in trace:
        mixer = model.get_submodule(name)
        handle = mixer.register_forward_pre_hook(lambda _, args, name=name: parts.__setitem__(name, args[0]))
        with torch.no_grad():
            model(x)
        handle.remove()
    for layer in trace.layers:
        alone = traced(model.get_submodule(layer.name), parts[layer.name]).layers[0]
        fold, order = alone.attention(), windows_of(layer.layout)
        assert fold.shape[0] == 2 * len(order)
        expected = torch.zeros(2, layer.tokens, layer.tokens, dtype=torch.float64)
        for image in range(2):
            for window, tokens in enumerate(order):
                expected[image, tokens[:, None], tokens] = fold[image * len(order) + window]
        torch.testing.assert_close(layer.attention(), expected, rtol=1e-9, atol=1e-13)
        between = expected == 0
        assert (layer.attention()[between] == 0).all()
        for token in (0, layer.tokens - 1, layer.tokens // 2):
            torch.testing.assert_close(layer.row(token), expected[:, token], rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(layer.column(token), expected[:, :, token], rtol=1e-9, atol=1e-13)
        vector = torch.randn(2, layer.tokens, dtype=torch.float64)
        close(layer.left_product(vector), vector + torch.einsum("bi,bij->bj", vector, expected))


@pytest.mark.parametrize("mode", ["route", "observe"])
@pytest.mark.parametrize("size", ["whole", "padded", "odd"])
def test_gradients_equal_hooks(size, mode):
    model, x = model_of(size, attention={"fused": False})
    truth = entering(model, x, SCANS + HEADS, lambda logits: logits[:, 3].sum())
    with mamba_attn.trace(model, mode=mode) as trace:
        logits = model(x)
    gradients = trace.gradients(logits[:, 3].sum())
    for layer in trace.layers:
        same_as_hooks(layer, gradients[layer.name], *truth[layer.name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_gradients_of_models_that_checkpoint_their_blocks(mode):
    """A block runs again in the backward pass, its stage does not: the windows must still be known."""
    model, x = model_of("padded", dtype=torch.float32)
    with mamba_attn.trace(model, mode=mode) as trace:
        expected = trace.gradients(model(x)[:, 3].sum())
    for level in model.levels:
        level.run = partial(checkpoint, use_reentrant=False)
    with mamba_attn.trace(model, mode=mode) as trace:
        gradients = trace.gradients(model(x)[:, 3].sum())
    for name, gradient in expected.items():
        close(gradients[name], gradient, 1e-5)


@pytest.mark.parametrize("names", [SCANS, HEADS])
def test_windows_are_known_when_layers_of_one_kind_are_traced(names):
    model, x = model_of("padded")
    trace = traced(model, x, layers=names)
    assert [layer.layout.window for layer in trace.layers] == [4, 3]


def test_blocks_called_by_themselves_have_no_windows():
    model, _ = model_of("padded")
    tokens = torch.randn(5, 16, 16, dtype=torch.float64)
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model.levels[1].blocks[0](tokens)
    layer = trace[SCANS[0]]
    assert (layer.batch, layer.tokens, layer.scan.layout) == (5, 16, None)
    with torch.no_grad(), mamba_attn.trace(model, layers=SCANS[1:]) as trace:
        model(images((72, 104)))
        tokens = model.levels[1].blocks[1](tokens)  # windows of the right size, but not those of two images
    assert trace.layers[0].layout.window == 3


def test_a_stage_by_itself_knows_its_windows():
    stage = Stage([Block(Mixer(8), 8), Block(Attention(8), 8)], 8, 3, downsample=False).double()
    x = torch.randn(2, 8, 4, 7, dtype=torch.float64)
    assert check_adapter(stage, x, tolerance=1e-12).output_error <= 1e-12
    for layer in traced(stage, x).layers:
        assert (layer.batch, layer.layout) == (2, TokenLayout((4, 7), window=3))


def test_a_layout_of_the_users_is_used_where_it_fits():
    model, x = model_of("padded")
    mine = TokenLayout((9, 13), 100, window=4)
    trace = traced(model, x, layout=mine)
    assert trace[SCANS[0]].layout is trace[HEADS[0]].layout is mine
    assert trace[SCANS[1]].layout == traced(model, x)[SCANS[1]].layout


def test_frames_fit_or_are_not_used():
    module, layout = nn.Identity(), TokenLayout((9, 13), window=4)
    seen = Seen(batch=2, frames={module: layout})
    assert seen.frame_of(module, 24, 16) is layout
    assert seen.frame_of(nn.Identity(), 24, 16) is None
    assert seen.frame_of(module, 12, 16) is None  # windows of one image, and there are two
    assert seen.frame_of(module, 24, 9) is None
    assert Seen(frames={module: layout}).frame_of(module, 24, 16) is None
    whole = TokenLayout((2, 3), class_tokens=(0,))
    assert Seen(layout=whole).frame_of(module, 5, 7) is whole
    assert Seen(layout=whole).frame_of(module, 5, 6) is None


class LoRA(nn.Module):
    """A low-rank change beside a linear layer, whose weight and bias show through."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_wrapped_projections_act(name):
    model, x = model_of("odd")
    with torch.no_grad():
        before = model(x)
    for path in SCANS:
        mixer = model.get_submodule(path)
        setattr(mixer, name, LoRA(getattr(mixer, name)))
    with torch.no_grad():
        assert not torch.allclose(model(x), before)
    assert check_adapter(model, x, tolerance=1e-11).output_error <= 1e-11


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return 2 * nn.functional.conv1d(x, self.weight, self.bias, padding="same", groups=4)


def _with(**parts):
    mixer = Mixer(8)
    for name, part in parts.items():
        setattr(mixer, name, part)
    return mixer


class OtherCall(Mixer):
    def forward(self, tokens, cu_seqlens=None):
        return super().forward(tokens)


class Doubled(Mixer):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize(
    "mixer",
    [
        _with(norm=nn.LayerNorm(4)),
        _with(A_c_log=nn.Parameter(torch.ones(4, 3))),
        _with(scan_order="hilbert", sub=2, half=0.5),
        OtherCall(8),
        _with(conv1d_x=Wrapped(nn.Conv1d(4, 4, 3, groups=4))),  # its weight alone is read
        _with(conv1d_z=Wrapped(nn.Conv1d(4, 4, 3, groups=4))),
    ],
)
def test_what_computes_the_equations_is_used(mixer):
    assert check_adapter(Block(mixer, 8), torch.randn(2, 7, 8)).output_error <= 1e-6


def test_what_computes_something_else_is_refused_with_the_number():
    found = refusal(Block(Doubled(8), 8), torch.randn(2, 7, 8))
    assert re.match(differs("mixer", "Doubled", "MambaVision"), str(found)), found


def test_attention_that_drops_in_eval_mode_is_seen_at_the_door():
    block, x = Block(Attention(8, attn_drop=0.2), 8).eval(), torch.randn(2, 5, 8)
    reason = r"by 0\.\d+ \(.*, and so does the module's own output from call to call"
    with pytest.warns(UserWarning, match=reason), torch.no_grad(), mamba_attn.trace(block) as trace:
        block(x)
    assert list(trace.softmax) == ["mixer"]
    assert not torch.equal(block(x), block(x))
    block.mixer.fused_attn = False
    assert check_adapter(block, x).output_error <= 1e-6


@pytest.mark.changes_model("training")
def test_dropout_draws_what_the_model_draws():
    model, x = model_of("padded", attention={"attn_drop": 0.3, "fused": False})
    model.train()
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    with mamba_attn.trace(model) as trace:
        output = model(x)
    close(output.detach(), plain.detach())
    sums = trace[HEADS[0]].attention().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))  # before dropout


def test_each_mixer_has_one_family():
    mixers = find_mixers(build())
    assert {name: adapter.family for name, (_, adapter) in mixers.items()} == {
        **dict.fromkeys(SCANS, "MambaVision"), **dict.fromkeys(HEADS, "timm ViT")
    }  # fmt: skip
    assert not VimAdapter().recognises(Mixer(8))
    assert not TimmViTAdapter().recognises(Mixer(8))
    vim = mamba_attn.models.create("vim_micro", depth=1, embed_dim=16).layers[0].mixer
    assert not MambaVisionAdapter().recognises(vim)


def test_windows_too_many_for_one_matrix_are_refused(monkeypatch):
    model, x = model_of("padded")
    monkeypatch.setattr("mamba_attn.ops.dispatch._UNASKED", 0)
    monkeypatch.setattr("mamba_attn.ops.dispatch.free_bytes", lambda device: 10**6)
    with torch.no_grad(), mamba_attn.trace(model):
        with pytest.raises(
            MatrixTooLargeError,
            match=r"of 2 heads over all windows \(2 images, 192 x 192\) needs 1,179,648 bytes, .* Trace fewer images",
        ):
            model(x)


def test_autocast():
    model, x = model_of("padded", dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            output = model(x)
    torch.testing.assert_close(output, plain, rtol=0, atol=0.05 * plain.abs().max().item())
    assert trace[SCANS[0]].attention().dtype == torch.float32


class Gating(MambaVisionAdapter):
    """Takes the channels that go around the scan for a gate."""

    def project(self, module, *args, **kwargs):
        record = super().project(module, *args, **kwargs)
        return record.replace(source_u=record.source_u * record.bypass.mean())


class ColumnsFirst(MambaVisionAdapter):
    """Takes the tokens of a window column by column."""

    def project(self, module, *args, **kwargs):
        record = super().project(module, *args, **kwargs)
        side = record.layout.window
        order = record.read_order.unflatten(1, (side, side)).mT.flatten(1)
        return record.replace(read_order=order, write_order=order)


@pytest.mark.parametrize("adapter", [Gating(), ColumnsFirst()])
def test_check_adapter_catches_a_wrong_adapter(adapter):
    with pytest.raises(LawError, match="differs from what the module itself returns by"):
        check_adapter(*model_of("padded"), adapters=[adapter])


def steps_of(model, x):
    """Per layer (layout, dense signed matrix), first to last."""
    return [(layer.layout, layer.attention()) for layer in traced(model, x).layers]


def crop_and_halve(finer, coarser):
    """(coarser tokens, finer tokens): patches from blocks of patches; padding reads nothing and is read by nothing."""
    matrix = torch.zeros(coarser.tokens, finer.tokens, dtype=torch.float64)
    (rows, columns), (lower, right) = finer.grid, (finer.padded[1], coarser.padded[1])
    for i in range(coarser.grid[0]):
        for j in range(coarser.grid[1]):
            block = [(r, c) for r in (2 * i, 2 * i + 1) for c in (2 * j, 2 * j + 1) if r < rows and c < columns]
            for r, c in block:
                matrix[i * right + j, r * lower + c] = 1 / len(block)
    return matrix


@pytest.mark.parametrize("size", ["whole", "padded", "odd"])
@pytest.mark.parametrize("signed", [False, True])
def test_rollout_over_the_whole_hybrid_is_the_dense_product(size, signed):
    model, x = model_of(size)
    product, before = None, None
    for layout, matrix in steps_of(model, x):
        step = torch.eye(layout.tokens, dtype=torch.float64) + (matrix if signed else matrix.clamp(min=0))
        step = step if signed else step / step.sum(-1, keepdim=True)
        between = torch.eye(layout.tokens, dtype=torch.float64)
        if before is not None and before != layout:
            between = crop_and_halve(before, layout)
        product = step if product is None else step @ between @ product
        before = layout
    first = steps_of(model, x)[0][0]
    row = product[:, before.patches].mean(1)[:, first.patches].unflatten(1, first.grid)
    actual = AttentionRollout(model, signed=signed).attribute(x, grid=True)
    close(actual[:, 0], row)
    if not signed and size == "whole":
        torch.testing.assert_close(actual.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    if not signed:
        assert (actual.sum((1, 2, 3)) <= 1 + 1e-12).all()  # what padding keeps is not on the map


@pytest.mark.parametrize("names", [SCANS, HEADS, SCANS + HEADS])
def test_raw_attention_is_the_mean_over_layers_in_pixels(names):
    model, x = model_of("padded")
    trace = traced(model, x)
    maps = []
    for layer in (layer for layer in trace.layers if layer.name in names):
        layout = layer.layout
        row = layer.attention()[:, layout.patches].mean(1).clamp(min=0)[:, layout.patches].unflatten(1, layout.grid)
        plain = TokenLayout(layout.grid, layout.patch_size, offset=0.5)  # the grid without its padding
        maps.append(plain.to_pixels(row, SIZES["padded"]) * len(layout.patches) / (9 * 13))
    actual = RawAttention(model, layers=names).attribute(x)
    close(actual[:, 0], torch.stack(maps).mean(0))


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
def test_a_query_reads_its_window_alone(method):
    model, x = model_of("padded")
    actual = method(model, layers=["levels.1.*"]).attribute(x, pixel=(33, 89), grid=True)[:, 0]  # patch 4, 11 of 9 x 13
    inside = torch.zeros(9, 13, dtype=torch.bool)
    inside[4:8, 8:12] = True
    assert (actual[:, ~inside] == 0).all()
    assert (actual[:, inside] > 0).any(1).all()


@pytest.mark.parametrize("size", ["whole", "padded"])
def test_attribution_by_class_of_one_kind_of_layers(size):
    model, x = model_of(size)
    with mamba_attn.trace(model) as trace:
        logits = model(x)
    gradients = trace.gradients(logits[:, 1].sum())

    def rolled(names, weighted):
        layers = [trace[name] for name in names]
        last = layers[-1].layout
        alone = torch.zeros(2, last.tokens, dtype=torch.float64)
        alone[:, last.patches] = 1 / len(last.patches)
        row = alone
        for later, earlier in zip(layers[::-1], [*layers[-2::-1], None], strict=True):
            step = torch.eye(later.tokens, dtype=torch.float64) + weighted(later) * len(later.layout.patches)
            row = (row.unsqueeze(1) @ step).squeeze(1)
            if earlier is not None:
                row, alone = (to_finer(part, earlier.layout, later.layout) for part in (row, alone))
        layout = layers[0].layout
        return (row - alone)[:, layout.patches].unflatten(1, layout.grid)

    def by_scans(layer):
        return layer.attention("sum", row_weight=gradients[layer.name], col_weight=layer.scan.u).clamp(min=0)

    def by_heads(layer):
        return (gradients[layer.name] * layer.attention("each")).clamp(min=0).mean(1)

    for method, names, weighted in (
        (MambaAttribution, SCANS, by_scans),
        (TransformerAttribution, HEADS, by_heads),
    ):
        actual = method(model, layers=names).attribute(x, target=1, grid=True)[:, 0]
        close(actual, rolled(names, weighted).detach(), 1e-9)


@pytest.mark.parametrize("options", [{"rule": "paper"}, {"rule": "published_code"}, {"signed": True}])
def test_every_rule_runs_in_windows_as_it_does_window_by_window(options):
    """One stage: the map of an image of two windows is the maps of the windows, next to each other."""
    stage = Stage([Block(Mixer(8), 8), Block(Mixer(8), 8)], 8, 3, downsample=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), stage, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    method = MambaAttribution(model, layers=["1.blocks.*"], **options)
    actual = method.attribute(x, target=1, grid=True)
    assert actual.shape == (2, 1, 3, 6)
    if options != {"rule": "published_code"}:  # which takes its largest entry over the image
        apart = torch.cat([method.attribute(x[..., cut], target=1, grid=True) for cut in (slice(3), slice(3, 6))], -1)
        close(actual, apart / 2)


@pytest.mark.parametrize("method", [MambaAttribution, TransformerAttribution])
def test_methods_for_one_kind_refuse_the_other(method):
    model, x = model_of("whole")
    with pytest.raises(UnsupportedModelError, match=r"name other layers with layers="):
        method(model).attribute(x)
