"""timm's ViT and DeiT: probabilities, gradients and layouts against the untouched models; what is refused."""

import inspect
import re
from contextlib import ExitStack
from typing import Any

import pytest
import timm
import torch
from mamba_attn.integrations.timm_vit import TimmViTAdapter
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mamba_attn
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.errors import NonFiniteError, TraceError, UnsupportedModelError
from mamba_attn.testing import LawError, check_adapter
from mamba_attn.tracing.adapters import AttentionAdapter, Seen, _registered
from mamba_attn.tracing.layers import ScanLayer, require
from mamba_attn.tracing.softmax_layers import AttentionLayer
from tests.integrations.by_number import differs, refusal

NEW = "scale_attn_norm" in inspect.signature(VisionTransformer.__init__).parameters  # not the oldest that is taken
new = pytest.mark.skipif(not NEW, reason="this timm's attention has no such thing")
TINY: dict[str, Any] = {"depth": 3, "num_classes": 7}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64}, (64, 64)),
    "not square": ("vit_tiny_patch16_224", {"img_size": (48, 80)}, (48, 80)),
    "any size": ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}, (48, 96)),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, (64, 64)),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (42, 56), "embed_dim": 96}, (42, 56)),
    "pooled": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg", "class_token": False}, (64, 64)),
    "pooled beside a class token": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}, (64, 64)),
    "norms": ("vit_tiny_patch16_224", {"img_size": 64, "qk_norm": True, "scale_attn_norm": True}, (64, 64)),
}
LAYOUTS = {
    "vit": ((4, 4), (0,), ()),
    "not square": ((3, 5), (0,), ()),
    "any size": ((3, 6), (0,), ()),
    "distilled": ((4, 4), (0, 1), ()),
    "registers": ((3, 4), (0,), (1, 2, 3, 4)),
    "pooled": ((4, 4), (), ()),
    "pooled beside a class token": ((4, 4), (), (0,)),
}


def build(name: str, *, fused: bool = True, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model whose attention is far from uniform, and images for it."""
    architecture, options, size = MODELS[name]
    if "scale_attn_norm" in options and not NEW:
        pytest.skip("this timm has no such option")
    model = timm.create_model(architecture, **{**TINY, **options, **more}).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model, torch.randn(2, 3, *size, dtype=dtype)


def seen_by_hooks(model: nn.Module, x: torch.Tensor, scalar: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(probabilities, gradient) of every layer, by hooks on the dropout of the untouched, not fused, model."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for index, block in enumerate(model.blocks):
        block.attn.fused_attn = False

        def keep(module: nn.Module, args: tuple[torch.Tensor], name: str = f"blocks.{index}.attn") -> None:
            args[0].retain_grad()
            seen[name] = args[0]

        handles.append(block.attn.attn_drop.register_forward_pre_hook(keep))
    scalar(model(x)).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {name: (value.detach(), value.grad) for name, value in seen.items()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_laws_in_float32(name: str, fused: bool) -> None:
    report = check_adapter(*build(name, fused=fused))
    assert [layer.name for layer in report.layers] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert report.output_error <= 2e-6  # of a whole model
    assert report.matrix_error <= 5e-6
    assert max(layer.row_sum_error for layer in report.layers) <= 1e-6
    assert report.observed_identical


@pytest.mark.parametrize("name", ["vit", "norms", "registers"])
def test_laws_in_float64(name: str) -> None:
    assert check_adapter(*build(name, dtype=torch.float64), tolerance=1e-13).output_error <= 1e-13


@pytest.mark.parametrize("fused", [True, False])
def test_one_module_gives_its_own_output(fused: bool) -> None:
    model, _ = build("norms", fused=fused)
    attention, x = model.blocks[1].attn, torch.randn(2, 11, 192)
    with torch.no_grad():
        record = TimmViTAdapter().project(attention, x, rules=PLAIN, seen=Seen())
        output = TimmViTAdapter().finish(attention, record, record.probabilities, PLAIN)
        expected = attention(x)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@new
def test_gated_attention_with_a_scale_of_its_own() -> None:
    model, x = build("vit", fused=False)
    for block in model.blocks:
        block.attn.scale = 0.3
        block.attn.gate = nn.Linear(192, 192)
    assert check_adapter(model, x).output_error <= 2e-6
    for block in model.blocks:
        block.attn.fused_attn = True  # the kernel ignores the module's scale, and so do we
    assert check_adapter(model, x).output_error <= 2e-6


class LoRA(nn.Module):
    """A low-rank change beside a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("fused", [True, False])
def test_wrapped_projections_act(fused: bool) -> None:
    model, x = build("vit", fused=fused)
    with torch.no_grad():
        before = model(x)
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = LoRA(block.attn.qkv), LoRA(block.attn.proj)
    with torch.no_grad():
        assert not torch.allclose(model(x), before)
    assert check_adapter(model, x).output_error <= 2e-6


@pytest.mark.parametrize("mode", ["route", "observe"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["not square", "distilled", "registers", "norms"])
def test_probabilities_and_gradients_equal_hooks(name: str, fused: bool, mode: str) -> None:
    model, x = build(name, dtype=torch.float64)
    truth = seen_by_hooks(model, x, lambda logits: logits[:, 3].sum())
    for block in model.blocks:
        block.attn.fused_attn = fused
    with mamba_attn.trace(model, mode=mode, attention="mean") as trace:
        logits = model(x)
    gradients = trace.gradients(logits[:, 3].sum())
    assert list(gradients) == list(trace) == list(truth)
    for layer in trace.layers:
        probabilities, gradient = truth[layer.name]
        torch.testing.assert_close(layer.attention("each"), probabilities, rtol=1e-10, atol=1e-14)
        assert gradients[layer.name].shape == (2, probabilities.shape[1], layer.tokens, layer.tokens)
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradients[layer.name], gradient, rtol=0, atol=1e-10 * scale)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_outputs_and_their_gradients_equal_those_of_the_untouched_model(mode: str) -> None:
    model, x = build("vit", dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for index, block in enumerate(model.blocks):

            def keep(module: nn.Module, args: object, output: torch.Tensor, name: str = f"blocks.{index}.attn") -> None:
                seen[name] = output

            stack.callback(block.attn.register_forward_hook(keep).remove)
        truth = torch.autograd.grad(model(x)[:, 3].sum(), list(seen.values()))
    with mamba_attn.trace(model, mode=mode) as trace:
        logits = model(x)
    gradients = trace.gradients(logits[:, 3].sum(), of="output")
    assert list(gradients) == list(trace) == list(seen)
    for layer, gradient in zip(trace.layers, truth, strict=True):
        torch.testing.assert_close(layer.output, seen[layer.name], rtol=1e-10, atol=1e-12)
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[layer.name], gradient, rtol=0, atol=1e-10 * scale)


def test_gradients_of_a_frozen_model_and_of_a_pass_without_them() -> None:
    model, x = build("vit")
    model.requires_grad_(False)
    with mamba_attn.trace(model) as trace:
        logits = model(x)
    assert trace.gradients(logits[0, 1])["blocks.0.attn"].abs().max() > 0
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        logits = model(x)
    assert not trace.layers[0].attention().requires_grad
    with pytest.raises(TraceError, match="ran without gradients; call the model outside no_grad"):
        trace.gradients(logits[0, 1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    model, x = build(name)
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(x)
    for layer in trace.layers:
        layout = layer.layout
        assert (layout.grid, layout.class_tokens, layout.registers) == LAYOUTS[name]
        assert layout.tokens == layer.tokens
        assert layout.patch_size == layout.step == (14 if name == "registers" else 16)


def test_layout_of_a_hybrid_counts_the_pixels_of_its_backbone() -> None:
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1).eval()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(1, 3, 64, 64))
    assert trace.layers[0].layout == mamba_attn.TokenLayout((2, 2), patch_size=32, stride=32, class_tokens=(0,))


def test_no_layout_where_patches_are_dropped_or_not_square() -> None:
    model, x = build("vit", patch_drop_rate=0.5)
    with torch.no_grad(), mamba_attn.trace(model.train()) as trace:
        model(x)
    with pytest.raises(TraceError, match=r"blocks\.0\.attn: the tokens' place in the image is not known"):
        _ = trace.layers[0].layout
    model, x = build("vit", patch_size=(16, 8))
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(x)
    with pytest.raises(TraceError, match="is not known"):
        _ = trace.layers[0].layout
    layout = mamba_attn.TokenLayout((4, 8), class_tokens=(0,))
    with torch.no_grad(), mamba_attn.trace(model, layout=layout) as trace:
        model(x)
    assert trace.layers[2].layout is layout


@pytest.fixture(scope="module")
def layer() -> AttentionLayer:
    torch.manual_seed(0)
    probabilities = torch.randn(2, 3, 7, 7, dtype=torch.float64).softmax(-1)
    return AttentionLayer("attn", AttentionRecord(probabilities=probabilities, value=torch.randn(2, 3, 7, 4)))


FOLDS = {
    "mean": lambda m: m.mean(1),
    "sum": lambda m: m.sum(1),
    "each": lambda m: m,
    "positive": lambda m: m.clamp(min=0).mean(1),
    "absolute": lambda m: m.abs().mean(1),
}


@pytest.mark.parametrize("fold", FOLDS)
def test_attention_rows_and_columns_of_every_fold(layer: AttentionLayer, fold: str) -> None:
    A = layer.record.probabilities
    rows, columns = (torch.randn(2, 3, 7, dtype=torch.float64) for _ in range(2))
    weighted = torch.einsum("bhi,bhij->bhij", rows, A)
    torch.testing.assert_close(layer.attention(fold), FOLDS[fold](A))
    torch.testing.assert_close(layer.attention(fold, row_weight=rows), FOLDS[fold](weighted))
    both = FOLDS[fold](torch.einsum("bhij,bhj->bhij", weighted, columns))
    torch.testing.assert_close(layer.attention(fold, row_weight=rows, col_weight=columns), both)
    for token in (0, 5):
        torch.testing.assert_close(layer.row(token, fold=fold), layer.attention(fold)[..., token, :])
        torch.testing.assert_close(layer.column(token, fold=fold), layer.attention(fold)[..., token])
        row = layer.row(token, fold=fold, row_weight=rows, col_weight=columns)
        torch.testing.assert_close(row, both[..., token, :])
        column = layer.column(token, fold=fold, row_weight=rows, col_weight=columns)
        torch.testing.assert_close(column, both[..., token])


@pytest.mark.parametrize("fold", ["mean", "sum"])
def test_left_product(layer: AttentionLayer, fold: str) -> None:
    vector, rows = torch.randn(2, 7, dtype=torch.float64), torch.randn(1, 3, 7, dtype=torch.float64)
    columns = torch.randn(2, 3, 7, dtype=torch.float64)
    for weights in ({}, {"row_weight": rows}, {"row_weight": rows, "col_weight": columns}):
        product = torch.einsum("bi,bij->bj", vector, layer.attention(fold, **weights))
        torch.testing.assert_close(layer.left_product(vector, fold=fold, **weights), vector + product)
        torch.testing.assert_close(layer.left_product(vector, fold=fold, residual=False, **weights), product)


def test_wrong_arguments_of_a_layer(layer: AttentionLayer) -> None:
    with pytest.raises(ValueError, match=r"attn\.attention\(fold='max'\): expected one of"):
        layer.attention("max")
    with pytest.raises(ValueError, match=r"row_weight must be \(batch, heads, tokens\) = \(2, 3, 7\), got \(2, 7\)"):
        layer.attention(row_weight=torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"attn\.row\(7\): expected the index of a token, 0\.\.6"):
        layer.row(7)
    with pytest.raises(ValueError, match=r"attn\.column\(-1\): expected the index of a token"):
        layer.column(-1)
    with pytest.raises(ValueError, match=r"left_product\(fold='positive'\): expected one of \('mean', 'sum'\)"):
        layer.left_product(torch.ones(2, 7), fold="positive")
    with pytest.raises(ValueError, match=r"left_product\(vector\(2, 6\)\): expected \(batch, tokens\) = \(2, 7\)"):
        layer.left_product(torch.ones(2, 6))
    assert repr(layer) == "AttentionLayer('attn', batch=2, heads=3, tokens=7)"


def test_layers_that_must_be_scans(layer: AttentionLayer) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^Method is defined for selective scans, and attn are softmax"):
        require("Method", [layer], ScanLayer)
    assert require("Method", [], ScanLayer) == []


def test_not_finite() -> None:
    model, x = build("vit")
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(x * torch.nan)
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.attn: probabilities, value contain NaN or Inf"):
        trace.layers[0].attention()


@pytest.mark.changes_model("training")
def test_dropout() -> None:
    model, x = build("vit", fused=False, attn_drop_rate=0.3, proj_drop_rate=0.2)
    model.train()
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    with mamba_attn.trace(model) as trace:
        traced = model(x)
    torch.testing.assert_close(traced, plain, rtol=0, atol=2e-6)
    torch.testing.assert_close(trace.layers[0].attention().sum(-1), torch.ones(2, 17))  # before dropout
    assert trace.gradients(traced.sum())["blocks.0.attn"].abs().max() > 0
    with mamba_attn.trace(model, mode="observe") as trace:
        logits = model(x)
    with pytest.raises(TraceError, match=r"cannot repeat active dropout in mode='observe'; use mode='route'"):
        trace.gradients(logits.sum())


def test_autocast() -> None:
    model, x = build("vit")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            traced = model(x)
    torch.testing.assert_close(traced, plain, rtol=0, atol=0.05 * plain.abs().max().item())
    torch.testing.assert_close(trace.layers[1].attention().sum(-1), torch.ones(2, 17), rtol=0, atol=1e-2)


class Caller(nn.Module):
    """One attention module, called as some model does."""

    def __init__(self, attn: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.attn = attn
        self.arguments = arguments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, **self.arguments)


@pytest.mark.parametrize("attention", [WindowAttention(24, 3, window_size=4)])
def test_other_attention_is_refused_with_the_number(attention: nn.Module) -> None:
    nn.init.normal_(attention.relative_position_bias_table)
    found = str(refusal(Caller(attention), torch.randn(2, 16, 24)))
    assert re.match(differs("attn", type(attention).__name__, "timm ViT"), found), found


def test_rotary_positions_count_where_they_are_given() -> None:
    AttentionRope = pytest.importorskip("timm.layers.attention").AttentionRope  # not in the oldest timm
    attention, x = AttentionRope(24, 3, num_prefix_tokens=0).eval(), torch.randn(2, 16, 24)
    assert refusal(Caller(attention), x) is None
    model = Caller(attention, rope=torch.randn(16, 16))
    reason = r"trace: attn \(AttentionRope, family timm ViT\): this adapter cannot compute it: TypeError"
    with pytest.warns(UserWarning, match=reason), torch.no_grad(), mamba_attn.trace(model) as trace:
        model(x)
    assert list(trace.softmax) == ["attn"]


def test_attention_without_dropout() -> None:
    class Bare(nn.Module):
        """Its attention is timm's, and drops nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.scale = 3, 8**-0.5
            self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 8).permute(2, 0, 3, 1, 4)
            return self.proj(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))

    assert check_adapter(Caller(Bare()), torch.randn(2, 7, 24)).output_error <= 1e-6


@new
@pytest.mark.parametrize(
    ("arguments", "shape", "reason"),
    [
        ({"attn_mask": torch.zeros(5, 5)}, (2, 5, 192), "with an attn_mask, which this adapter does not know"),
        ({"is_causal": True}, (2, 5, 192), "with is_causal=True, which this adapter does not know"),
    ],
)
def test_calls_that_the_adapter_does_not_know_are_seen_at_the_door(
    arguments: dict[str, Any], shape: tuple[int, ...], reason: str
) -> None:
    model, x = Caller(build("vit")[0].blocks[0].attn, **arguments), torch.randn(shape)
    with pytest.warns(UserWarning, match=reason), torch.no_grad(), mamba_attn.trace(model) as trace:
        traced = model(x)
    with torch.no_grad():
        torch.testing.assert_close(traced, model(x), rtol=1e-5, atol=1e-6)
    matrix = trace.softmax["attn"].attention()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 5))
    assert bool((matrix.triu(1) == 0).all()) == ("is_causal" in arguments)


class Unscaled(TimmViTAdapter):
    """Forgets that the rows sum to one."""

    def project(self, module: nn.Module, *args: Any, **kwargs: Any) -> AttentionRecord:
        record = super().project(module, *args, **kwargs)
        return AttentionRecord(probabilities=record.probabilities * 2, value=record.value / 2, layout=record.layout)


class Forgetful(TimmViTAdapter):
    """Forgets the projection's dropout and half of the values."""

    def finish(
        self, module: nn.Module, record: AttentionRecord, probabilities: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        return super().finish(module, record, probabilities, rules) / 2


@pytest.mark.parametrize(
    ("adapter", "sentence"), [(Unscaled(), "a row of probabilities misses 1 by 1: law 9"), (Forgetful(), "differs")]
)
def test_check_adapter_catches_a_wrong_adapter(adapter: AttentionAdapter, sentence: str) -> None:
    model, x = build("vit")
    with pytest.raises(LawError, match=sentence):
        check_adapter(model, x, adapters=[adapter])


def test_an_adapter_of_attention_can_be_registered() -> None:
    model, x = build("vit")
    mamba_attn.register_adapter(Forgetful())
    try:
        with pytest.raises(LawError):
            check_adapter(model, x)
    finally:
        _registered.clear()
