"""SS2D's variants and forks: small modules with their names, computed token by token, against the adapter."""

import functools
import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.core.rules import Rules
from mamba_attn.testing import check_adapter
from mamba_attn.tracing.adapters import Seen
from tests.integrations.by_number import refusal
from tests.integrations.ss2d_variants import (
    FEATURES,
    V0,
    April,
    February,
    January,
    LowRank,
    Model,
    Moved,
    NormOfImages,
    Official,
    SpatialSoftmax,
    images,
)  # fmt: skip
from tests.models import naive

BOTH = [{"first": False}, {"first": True}]
VARIANTS: dict[str, Any] = {
    "v05": Official,
    "v05_noz": functools.partial(Official, gated=False),
    "v05_nozact": functools.partial(Official, gate_act=False),
    "v05_oact": functools.partial(Official, out_act=True),
    "v05_noz_oact": functools.partial(Official, gated=False, out_act=True),
    "v05_onnone": functools.partial(Official, norm=nn.Identity()),
    "v05_onsigmoid_noz": functools.partial(Official, norm=nn.Sigmoid(), gated=False),
    "v051d": functools.partial(Official, "unidi"),
    "v052d": functools.partial(Official, "bidi", gated=False),
    "no convolution": functools.partial(Official, conv=False, ratio=1),
    "GELU and biases": functools.partial(Official, act=nn.GELU, bias=True, ratio=2),
    "one file": functools.partial(Official, one_file=True),
    "one file v052d_noz": functools.partial(Official, "bidi", one_file=True, gated=False),
    "x_proj_bias": functools.partial(Official, x_proj_bias=True),
    "April": April,
    "April, one direction": functools.partial(April, 1),
    "April, two directions, norm of images": functools.partial(April, 2, "v1", norm=nn.Sigmoid()),
}
OLD: dict[str, Any] = {
    "v0": V0,
    "v0seq": functools.partial(V0, True, x_proj_bias=True),
    "January": functools.partial(January, bias=True),
    "February": February,
    "February softmax": functools.partial(February, True),
    "February v0_seq": functools.partial(February, core="forward_corev0_seq", conv=False),
    "April, a line for the norm": functools.partial(April, norm=nn.Softmax(1)),
}
CASES = [(name, options) for name in VARIANTS for options in BOTH] + [(name, {}) for name in OLD]


def build(name: str, **options: Any) -> Model:
    if "April" in name and options.get("first") and "images" not in name:
        options["norm"] = nn.LayerNorm(int(1.5 * FEATURES))  # it stands between permutations
    return Model({**VARIANTS, **OLD}[name](**options)).eval()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_laws_in_float32(name: str, options: dict[str, bool]) -> None:
    report = check_adapter(build(name, **options), images(), tolerance=2e-6)
    assert [layer.name for layer in report.layers] == ["mixers.0"]
    assert report.observed_identical


@pytest.mark.parametrize("name", ["v05", "v052d", "one file", "April", "v0", "January", "February softmax"])
def test_laws_in_float64(name: str) -> None:
    check_adapter(build(name).double(), images(torch.float64), tolerance=1e-11)


@pytest.mark.parametrize("first", [False, True])
def test_norms_that_mix_tokens_get_the_frame_they_expect(first: bool) -> None:
    channels = 6
    convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    into, back = (nn.Identity(), nn.Identity()) if first else (Moved(3, 1), Moved(1, 3))
    norm = NormOfImages(channels) if first else nn.LayerNorm(channels)
    softmax = Official(first=first, norm=SpatialSoftmax(first))
    cnorm = Official(first=first, norm=nn.Sequential(norm, into, convolution, back), gated=False)
    check_adapter(Model(softmax, cnorm).eval(), images(), tolerance=5e-6)


def test_variants_differ() -> None:
    """Else the laws above would not tell them apart."""
    outputs = []
    for scan, gate_act, out_act in [("cross2d", True, False), ("unidi", True, False), ("bidi", True, False),
                                    ("cross2d", False, False), ("cross2d", True, True)]:  # fmt: skip
        torch.manual_seed(0)
        outputs.append(Model(Official(scan, gate_act=gate_act, out_act=out_act)).eval()(torch.ones(1, 3, 12, 20)))
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("name", ["v05", "one file", "v0", "January"])
def test_autocast_keeps_the_scans_precision_as_the_model_does(name: str) -> None:
    model, x = build(name, **({"one_file": True} if name == "one file" else {})), images()
    mixer = model.mixers[0]
    entering: list[torch.Tensor] = []
    handle = mixer.out_norm.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = mixer(x.new_ones(2, 3, 5, FEATURES))
        with mamba_attn.trace(model) as trace:
            traced = mixer(x.new_ones(2, 3, 5, FEATURES))
    handle.remove()
    assert [value.dtype for value in entering] == [torch.float32, torch.float32]
    assert entering[0].numel() == entering[1].numel()
    assert plain.dtype == traced.dtype == torch.bfloat16
    assert trace["mixers.0"].scan.source_u.dtype == torch.bfloat16
    assert trace["mixers.0"].scan.source_delta.dtype == torch.float32
    assert (plain - traced).abs().max() <= 0.02 * plain.abs().max()


def test_modules_of_the_one_file_version_are_called() -> None:
    model = build("one file")
    mixer, called = model.mixers[0], []
    for name in ("in_proj", "conv2d", "x_proj", "dt_projs", "out_norm", "out_act", "out_proj", "dropout"):
        mixer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad(), mamba_attn.trace(model):
        model(images())
    assert called == ["in_proj", "conv2d", "x_proj", "dt_projs", "out_norm", "out_act", "out_proj", "dropout"]


def adapted(mixer: Any) -> Any:
    for name in ("in_proj", "out_proj"):
        base = mixer.get_submodule(name)
        down, up = nn.Linear(base.in_features, 1, bias=False), nn.Linear(1, base.out_features, bias=False)
        setattr(mixer, name, LowRank(base, nn.Sequential(down, up)))
    channels = mixer.d_inner
    mixer.conv2d = LowRank(mixer.conv2d, nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
    return mixer


@pytest.mark.parametrize("kind", [Official, V0, January])
def test_low_rank_updates_around_projections_work(kind: Any) -> None:
    check_adapter(Model(adapted(kind())).eval(), images(), tolerance=2e-6)


@pytest.mark.parametrize("first", [False, True])
def test_dropout_while_training(first: bool) -> None:
    model, x = Model(Official(dropout=0.5, first=first)).train(), images()
    torch.manual_seed(0)
    plain = model(x)
    with mamba_attn.trace(model):
        torch.manual_seed(0)
        traced = model(x)
    torch.testing.assert_close(traced, plain, rtol=2e-6, atol=2e-6)


def test_traces_inside_traces_and_gradients() -> None:
    model, x = Model(Official("bidi", first=True), V0()).eval().double(), images(torch.float64).requires_grad_()
    names = [name for name, _ in model.named_parameters()]
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    with mamba_attn.trace(model) as outer, mamba_attn.trace(model) as inner:
        traced = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    assert len(outer) == len(inner) == 2
    for name, one, other in zip(["x", *names], traced, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)
    assert model.mixers[0].forward == model.mixers[0].forwardv2


@pytest.mark.parametrize("kind", [Official, functools.partial(Official, first=True), V0, January, April])
def test_rules_see_the_grid_channels_last(kind: Any) -> None:
    class Shapes(Rules):
        def norm(self, module: nn.Module, x: torch.Tensor, call: Any = None) -> torch.Tensor:
            output = super().norm(module, x, call)
            shapes.extend([tuple(x.shape), tuple(output.shape)])
            return output

    model, shapes = Model(kind()).eval(), list[tuple[int, ...]]()
    with torch.no_grad(), mamba_attn.trace(model, rules=Shapes()):
        model(images())
    assert shapes == [(2, 3, 5, 6), (2, 3, 5, 6)]


def test_layouts_of_an_encoder_and_decoder() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, FEATURES, 4, 4)
            self.down = nn.Conv2d(FEATURES, FEATURES, 2, 2)
            self.encoder = nn.ModuleList([January(), January()])
            self.decoder = nn.ModuleList([January(), January()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).permute(0, 2, 3, 1)
            skip = self.encoder[0](x)
            x = self.encoder[1](self.down(skip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            x = self.decoder[0](x).repeat_interleave(2, 1).repeat_interleave(2, 2)
            return self.decoder[1](x[:, : skip.shape[1], : skip.shape[2]] + skip[:, : x.shape[1], : x.shape[2]])

    net = naive.randomise(Net()).eval()
    with torch.no_grad(), mamba_attn.trace(net) as trace:
        net(torch.randn(1, 3, 40, 24))
    assert {name: (layer.layout.grid, layer.layout.patch_size) for name, layer in trace.items()} == {
        "encoder.0": ((10, 6), 4),
        "encoder.1": ((5, 3), 8),
        "decoder.0": ((5, 3), 8),
        "decoder.1": ((10, 6), 4),
    }


@pytest.mark.parametrize(
    ("image", "grid", "size"),
    [
        ((224, 224), (7, 7), 32),
        ((68, 92), (9, 12), 8),  # rounded up
        ((68, 92), (4, 5), 16),  # rounded down
        ((68, 92), (2, 2), 32),
        ((65, 33), (3, 2), 32),
        ((100, 64), (4, 2), 32),
        ((12, 20), (12, 20), 1),
        ((12, 20), (24, 40), 1),  # finer than the image
        ((17, 21), (17, 10), (1, 2)),  # along one axis only
        ((196, 196), (14, 14), 14),
        (None, (5, 3), 1),
    ],
)
def test_patch_sizes_of_a_pyramid(
    image: tuple[int, int] | None, grid: tuple[int, int], size: int | tuple[int, int]
) -> None:
    layout = Seen(image_size=image).grid_layout(*grid)
    assert (layout.grid, layout.patch_size) == (grid, size)


def test_an_attribute_that_the_model_sets_itself_is_not_ours() -> None:
    model = build("January")
    assert "selective_scan" not in vars(model.mixers[0])
    check_adapter(model, images())
    assert "selective_scan" in vars(model.mixers[0])


def test_inputs_that_are_no_grid() -> None:
    class Lines(Official):
        def __init__(self) -> None:
            super().__init__()
            self.forward = lambda x: x

    found = refusal(nn.Sequential(Lines()), torch.randn(1, 15, FEATURES))
    assert re.search(r"input of shape \(1, 15, 4\); .*height", str(found))
