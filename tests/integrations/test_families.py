"""The laws on our own models: every configuration, odd and non-square inputs, both precisions."""

from typing import ClassVar

import pytest
import torch
from mamba_attn.integrations.vim import VimAdapter
from torch import nn

import mamba_attn
from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models import vim_mixer
from mamba_attn.testing import LawError, check_adapter
from mamba_attn.tracing.adapters import Adapter, Seen, _registered

VIM = {"depth": 2, "embed_dim": 16}
MODELS = {
    "vim middle": ("vim_micro", {**VIM, "image_size": (24, 40)}, (24, 40)),
    "vim first": ("vim_micro", {**VIM, "class_token": "first", "image_size": 32}, (40, 24)),
    "vim pooled": ("vim_micro", {**VIM, "class_token": None, "image_size": 32}, (32, 32)),
    "vim hilbert": ("vim_micro", {**VIM, "order": "hilbert", "image_size": 32}, (48, 32)),
    "vim overlapping": ("vim_tiny_stride8", {**VIM, "image_size": 48}, (48, 40)),
    "vmamba": ("vmamba_micro", {}, (100, 64)),
    "vmamba spiral": ("vmamba_micro", {"order": "spiral"}, (64, 96)),
    "vmamba v0": ("vanilla_vmamba_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, (68, 92)),
    "vmamba s2": ("vmamba_tiny_s2l5", {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, (65, 33)),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    model, options, size = MODELS[name]
    return mamba_attn.models.create(model, **options).to(dtype), torch.randn(2, 3, *size, dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_laws_in_float32(name: str) -> None:
    report = check_adapter(*build(name))
    assert report.output_error <= 1e-6
    assert report.matrix_error <= 1e-5
    assert report.observed_identical


@pytest.mark.parametrize("name", ["vim middle", "vim hilbert", "vmamba", "vmamba v0"])
def test_laws_in_float64(name: str) -> None:
    report = check_adapter(*build(name, torch.float64), tolerance=1e-11)
    assert report.matrix_error <= 1e-11


@pytest.mark.parametrize(
    ("name", "patch_sizes"),
    [("vim middle", [8]), ("vim overlapping", [16]), ("vmamba", 2 * [4] + 2 * [8] + 4 * [16] + 2 * [32])],
)
def test_layouts_tile_the_image(name: str, patch_sizes: list[int]) -> None:
    model, x = build(name)
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(x)
    found = [layer.layout.patch_size for layer in trace.layers]
    assert found[: len(patch_sizes)] == patch_sizes
    for layer in trace.layers:
        assert layer.layout.tokens == layer.scan.tokens
        covered = (layer.layout.grid[0] - 1) * layer.layout.step + layer.layout.patch_size
        assert abs(covered - x.shape[2]) < layer.layout.patch_size


def test_a_model_inside_another_is_found() -> None:
    model, x = build("vim middle")
    outer = nn.ModuleDict({"backbone": model})
    with torch.no_grad(), mamba_attn.trace(outer) as trace:
        outer["backbone"](x)
    assert trace["backbone.layers.0.mixer"].layout.grid == (3, 5)


def test_features_alone_are_enough() -> None:
    model, x = build("vmamba")
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model.forward_features(x)
    assert trace.layers[0].layout.patch_size == 4


class Wrong(VimAdapter):
    """Forgets the gate."""

    family: ClassVar[str] = "wrong"

    def finish(self, module: nn.Module, record: ScanRecord, y: torch.Tensor, rules: Rules) -> torch.Tensor:
        return vim_mixer.finish(module, record.replace(gate=None), y, rules)


class Misread(VimAdapter):
    """Runs on steps one percent too long."""

    family: ClassVar[str] = "misread"

    def project(
        self, module: nn.Module, x: torch.Tensor, orders: torch.Tensor | None = None, *, rules: Rules, seen: Seen
    ) -> ScanRecord:
        record = vim_mixer.project(module, x, orders=orders, rules=rules)
        return record.replace(source_delta=record.source_delta * 1.01)


@pytest.mark.parametrize("adapter", [Wrong(), Misread()])
def test_check_adapter_catches_a_wrong_adapter(adapter: Adapter) -> None:
    model, x = build("vim middle")
    sentence = rf"mixer \(VimMixer, family {adapter.family}\): .* differs from what the module itself returns by \d"
    with pytest.raises(LawError, match=sentence):
        check_adapter(model, x, adapters=[adapter])


def test_registered_adapters_come_first_and_must_be_adapters() -> None:
    model, x = build("vim middle")
    mamba_attn.register_adapter(Wrong())
    try:
        with pytest.raises(LawError):
            check_adapter(model, x)
    finally:
        _registered.clear()
    check_adapter(model, x)
    with pytest.raises(TypeError, match="Adapter"):
        mamba_attn.register_adapter(VimAdapter)


@pytest.mark.parametrize(("name", "offset"), [("vmamba", 0.5), ("vmamba v0", None)])
def test_centres_are_where_the_stem_looks(name: str, offset: float | None) -> None:
    """The gradient of one token before any scan is centred where its layout says."""
    model, x = build(name, torch.float64)
    images = torch.randn_like(x[:1, :, :64, :64]).requires_grad_()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images)
    layout = trace.layers[0].layout
    assert layout.offset == offset
    for module in model.patch_embed:  # centres do not depend on weights: make all of them count
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    tokens = nn.Sequential(*(module for module in model.patch_embed if isinstance(module, nn.Conv2d)))(images)
    (gradient,) = torch.autograd.grad(tokens[0, :, 5, 7].sum(), images)
    mass = gradient.abs().sum((0, 1))
    rows = (mass.sum(1) * (torch.arange(64) + 0.5)).sum() / mass.sum()
    columns = (mass.sum(0) * (torch.arange(64) + 0.5)).sum() / mass.sum()
    assert rows.item() == pytest.approx(5 * layout.step + layout.centre, abs=1e-9)
    assert columns.item() == pytest.approx(7 * layout.step + layout.centre, abs=1e-9)
