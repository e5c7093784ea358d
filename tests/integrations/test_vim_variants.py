"""Vim's mixers in every variant against a loop over tokens; class tokens found wherever they stand; refusals."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.attribution import RawAttention
from mamba_attn.errors import TraceError
from mamba_attn.testing import check_adapter
from mamba_attn.tracing.patch_embedding import _tokens_of_patches
from tests.integrations.by_number import differs, refusal
from tests.integrations.small_vim import Backbone, Mamba, Vim

MARKS: dict[str, dict[str, Any]] = {
    "v2 halved": {"bimamba_type": "v2", "if_divide_out": True},
    "v2": {"bimamba_type": "v2", "if_divide_out": False},
    "v2 halved in forks": {"bimamba_type": "v2", "if_devide_out": True},
    "v2 in forks": {"bimamba_type": "v2", "if_devide_out": False},
    "v1": {"bimamba_type": "v1", "if_divide_out": False},
    "v1 never halved": {"bimamba_type": "v1", "if_divide_out": True},
    "none": {"bimamba_type": "none", "if_divide_out": True},
    "both scans": {"biscan": True},
    "one scan": {"biscan": False},
}
SLOW = r"Vim has use_fast_path=False: Vim's own code then runs the forward direction alone and halves nothing"


@pytest.mark.parametrize("name", MARKS)
def test_laws(name: str) -> None:
    mixer = Vim(6, MARKS[name])
    report = check_adapter(mixer, torch.randn(3, 11, 6), tolerance=1e-6)
    assert report.observed_identical
    report = check_adapter(mixer.double(), torch.randn(2, 7, 6, dtype=torch.float64), tolerance=1e-13)
    assert report.layers[0].matrix_error > 0
    with torch.no_grad(), mamba_attn.trace(mixer) as trace:
        mixer(torch.randn(2, 7, 6, dtype=torch.float64))
    scan = trace[""].scan
    assert scan.routes == (1 if name in ("none", "one scan") else 2)
    assert scan.scale == (0.5 if name in ("v2 halved", "v2 halved in forks", "both scans") else 1)


@pytest.mark.parametrize(
    "options", [{"conv_bias": False, "bias": True}, {"layer_scale": 0.3, "d_state": 5, "d_conv": 2}]
)
@pytest.mark.parametrize("name", ["v2 halved", "v1"])
def test_other_parts(name: str, options: dict[str, Any]) -> None:
    check_adapter(Vim(6, MARKS[name], **options), torch.randn(2, 8, 6), tolerance=1e-6)


@pytest.mark.parametrize("name", ["v2 halved", "v2 in forks", "v1", "both scans"])
def test_the_slow_path_is_the_forward_direction_alone_and_says_so_once_in_a_trace(name: str) -> None:
    model, x = Backbone([Vim(8, MARKS[name], fast=False) for _ in range(3)], (3, 2)), torch.randn(2, 3, 12, 8)
    with pytest.warns(UserWarning, match=SLOW) as caught:
        check_adapter(model, x, tolerance=2e-6)
    assert len(caught) == 2  # modes "route" and "observe"


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_the_slow_path_says_what_to_set(mode: str) -> None:
    model, x = Backbone([Vim(8, fast=False) for _ in range(2)], (3, 2)), torch.randn(2, 3, 12, 8)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad(), mamba_attn.trace(model, mode=mode) as trace:
        warnings.simplefilter("always")
        model(x)
        model.layers[0].mixer(torch.randn(1, 6, 8))
    assert ["Set use_fast_path = True on its mixers for both" in str(warning.message) for warning in caught] == [True]
    assert (trace["layers.1.mixer"].scan.routes, trace["layers.1.mixer"].scan.scale) == (1, 1)


def test_the_slow_path_of_one_direction_drops_nothing() -> None:
    mixer = Vim(6, MARKS["none"], fast=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_adapter(mixer, torch.randn(2, 8, 6), tolerance=1e-6)


@pytest.mark.parametrize("mode", ["route", "observe"])
@pytest.mark.parametrize("name", ["v1", "v2 halved"])
def test_gradients_equal_those_of_the_loop(name: str, mode: str) -> None:
    model = Backbone([Vim(8, MARKS[name]) for _ in range(2)], (3, 2), {"cls_token": (3,)}).double()
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    handles = [
        layer.mixer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in model.layers
    ]
    truth = torch.autograd.grad(model(x)[:, 2].sum(), seen)
    for handle in handles:
        handle.remove()
    with mamba_attn.trace(model, mode=mode) as trace:
        logits = model(x)
    found = trace.gradients(logits[:, 2].sum(), of="output")
    for layer, gradient in zip(trace.layers, truth, strict=True):
        torch.testing.assert_close(found[layer.name], gradient, rtol=1e-9, atol=1e-12)


PLACES: dict[str, dict[str, Any]] = {
    "none": {},
    "middle": {"others": {"cls_token": (7,)}},
    "first": {"others": {"cls_token": (0,)}},
    "last": {"others": {"cls_token": (15,)}},
    "head and tail": {"others": {"cls_token_head": (0,), "cls_token_tail": (16,)}},
    "registers among patches that have their positions": {"others": {"cls_token": (3, 7, 11)}, "position": "before"},
    "several side by side": {"others": {"cls_token": (4, 5, 6)}},
    "no positions": {"others": {"cls_token": (9,)}, "position": None},
    "overlapping patches": {"others": {"cls_token": (7,)}, "stride": 2, "patch_size": 6},
    "normed patches": {"others": {"cls_token": (2,)}, "norm": True},
    "registers alone": {"others": {"registers": (0, 8)}},
    "class token and registers": {"others": {"cls_token": (5,), "registers": (0, 8)}},
}


@pytest.mark.parametrize("name", PLACES)
def test_class_tokens_are_found_wherever_they_stand(name: str) -> None:
    options = PLACES[name]
    step, side = options.get("stride") or 4, options.get("patch_size", 4)
    model = Backbone([Vim(8), Vim(8)], (3, 5), **options)
    x = torch.randn(2, 3, 2 * step + side, 4 * step + side)
    check_adapter(model, x, tolerance=2e-6)
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(x)
    others = dict(options.get("others", {}))
    registers = others.pop("registers", ())
    classes = tuple(sorted(place for some in others.values() for place in some))
    for layout in (layer.layout for layer in trace.layers):
        assert (layout.grid, layout.class_tokens, layout.registers) == ((3, 5), classes, registers)
        assert (layout.patch_sizes, layout.steps) == ((side, side), (step, step))
        assert layout.tokens == trace.layers[0].tokens


@pytest.mark.parametrize("family", [Vim, Mamba])
def test_a_place_drawn_anew_in_every_pass(family: type[nn.Module]) -> None:
    model, x = Backbone([family(8)], (3, 5), {"cls_token": (7,)}), torch.randn(2, 3, 12, 20)
    for place in (0, 1, 9, 15):
        with torch.no_grad(), mamba_attn.trace(model) as trace:
            model(x, places={"cls_token": (place,)})
        assert trace.layers[0].layout.class_tokens == (place,)


def test_images_of_one_colour_hide_nothing() -> None:
    model = Backbone([Vim(8)], (3, 5), {"cls_token": (7,)}, position=None)
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.ones(1, 3, 12, 20))
    assert trace.layers[0].layout.class_tokens == (7,)


@pytest.mark.changes_model("training")
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"order": torch.arange(16).flip(0)}),
        ({}, {"order": torch.tensor([1, 0, *range(2, 16)])}),
    ],
    ids=["flipped", "two exchanged"],
)
def test_no_layout_where_the_patches_do_not_stand_in_raster_order(
    options: dict[str, Any], call: dict[str, Any]
) -> None:
    model = Backbone([Vim(8)], (3, 5), **{"others": {"cls_token": (7,)}, **options}).train()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(2, 3, 12, 20), **call)
    with pytest.raises(TraceError, match=r"layers\.0\.mixer: the tokens' place in the image is not known"):
        _ = trace.layers[0].layout


@pytest.mark.changes_model("training")
@pytest.mark.parametrize("options", [{"drop": 0.5}, {"patch_size": (4, 2)}], ids=["dropout", "not square"])
def test_the_place_of_patches_is_measured_where_no_value_tells_it(options: dict[str, Any]) -> None:
    model = Backbone([Vim(8)], (3, 5), others={"cls_token": (7,)}, **options).train()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(2, 3, 12, 10 if "patch_size" in options else 20))
    layout = trace.layers[0].layout
    assert (layout.grid, layout.class_tokens) == ((3, 5), (7,))
    assert layout.patch_sizes == options.get("patch_size", (4, 4))


def test_a_class_token_with_the_values_of_a_patch_is_told_from_it() -> None:
    model = Backbone([Vim(8)], (3, 5), {"cls_token": (7,)}, position=None)
    for parameter in (model.cls_token, *model.patch_embed.parameters()):
        nn.init.zeros_(parameter)
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(2, 3, 12, 20))
    assert (trace.layers[0].layout.grid, trace.layers[0].layout.class_tokens) == ((3, 5), (7,))


def test_position_embeddings_of_another_size_hide_no_patches() -> None:
    model = Backbone([Vim(8)], (3, 5), {"cls_token": (7,)})
    model.pos_embed = nn.Parameter(torch.randn(1, 1, 8))  # not this model's, and not those that were added
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(1, 3, 12, 20))
    assert (trace.layers[0].layout.grid, trace.layers[0].layout.class_tokens) == ((3, 5), (7,))


def test_another_pass_in_one_trace_has_its_own_layout() -> None:
    model, x = Backbone([Vim(8)], (3, 5), {"cls_token": (7,)}), torch.randn(1, 3, 12, 20)
    with torch.no_grad(), mamba_attn.trace(model, layers=["layers.0.mixer"]) as trace:
        model.layers[0](torch.randn(1, 16, 8))
    with pytest.raises(TraceError, match="is not known"):
        _ = trace.layers[0].layout
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(x)
    assert trace.layers[0].layout.grid == (3, 5)


def with_parts(marks: dict[str, Any], **changes: Any) -> Vim:
    mixer = Vim(8, marks)
    for name, value in changes.items():
        if value is None:
            delattr(mixer, name)
        else:
            setattr(mixer, name, value)
    return mixer


class OneWay(Vim):
    """Has the parts of both directions and runs one."""

    def forward(self, hidden_states, inference_params=None):
        mixed = self.direction(self.entering(hidden_states), "", "A_log") + 0 * self.A_log.sum()
        return nn.functional.linear(mixed, self.out_proj.weight, self.out_proj.bias)


V2 = MARKS["v2 halved"]
ACCEPTED = {
    "parts that nothing reads": with_parts(V2, A_c_log=nn.Parameter(torch.ones(3)), conv1d_c=nn.Identity()),
    "two spellings": with_parts(V2, if_devide_out=False),
    "another name": with_parts(V2, bimamba=True, T=3, config=object()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_computes_the_equations_is_used(name: str) -> None:
    check_adapter(Backbone([ACCEPTED[name]], (3, 5)), torch.randn(2, 3, 12, 20), tolerance=2e-6)


REFUSED = {
    "a type that is not known": with_parts(V2, bimamba_type="v3"),
    "a type switched off": with_parts(V2, bimamba_type="none"),
    "parts that the forward leaves out": OneWay(8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused_with_the_number(name: str) -> None:
    mixer = REFUSED[name]
    found = str(refusal(Backbone([mixer], (3, 5)), torch.randn(2, 3, 12, 20)))
    assert re.match(differs(r"layers\.0\.mixer", type(mixer).__name__, "Vim"), found), found


def test_parts_that_are_missing_are_said() -> None:
    class Many(nn.Module):
        """A mixer of as many directions as one wants."""

        def __init__(self) -> None:
            super().__init__()
            self.bimamba_type = "v2"
            self.in_proj, self.out_proj = nn.Linear(8, 32), nn.Linear(16, 8)
            self.A_log_0, self.A_log_1 = nn.Parameter(torch.ones(16, 3)), nn.Parameter(torch.ones(16, 3))

        def forward(self, hidden_states: torch.Tensor, inference_params: None = None) -> torch.Tensor:
            return hidden_states

    found = str(refusal(Backbone([Many()], (3, 5)), torch.randn(2, 3, 12, 20)))
    assert re.match(r"layers\.0\.mixer \(Many, family Vim\): this adapter cannot compute it: AttributeError", found)


def test_our_own_mixers_may_be_wrapped_and_carry_anything() -> None:
    class Doubled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    model = mamba_attn.models.create("vim_micro", image_size=32, depth=2, embed_dim=16)
    model.layers[0].mixer.in_proj = Doubled(model.layers[0].mixer.in_proj)
    model.layers[1].mixer.colour = "blue"
    check_adapter(model, torch.randn(2, 3, 32, 32), tolerance=1e-6)


def test_nothing_of_a_model_changes() -> None:
    model, x = Backbone([Vim(8), Vim(8, MARKS["v1"])], (3, 5), {"cls_token": (7,)}), torch.randn(2, 3, 12, 20)
    before, state = (
        [dict(vars(module)) for module in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    with torch.no_grad():
        plain = model(x)
        for mode in ("route", "observe"):
            with mamba_attn.trace(model, mode=mode, attention="mean"):
                traced = model(x)
        assert torch.equal(traced, plain)
        assert torch.equal(model(x), plain)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Twice(Backbone):
    """Runs its first layer on something else between the first and the second."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        handle = self.layers[1].register_forward_pre_hook(lambda *_: self.layers[0](torch.randn(1, 16, 8)) and None)
        try:
            return super().forward(images)
        finally:
            handle.remove()


@pytest.mark.changes_model("hooks")
def test_a_first_layer_that_runs_again_leaves_the_layout() -> None:
    model = Twice([Vim(8), Vim(8)], (3, 5), {"cls_token": (7,)})
    with torch.no_grad(), mamba_attn.trace(model, layers=["layers.1.mixer"]) as trace:
        model(torch.randn(1, 3, 12, 20))
    assert trace.layers[0].layout.class_tokens == (7,)


def test_every_feature_of_every_image_counts() -> None:
    tokens = torch.randn(2, 7, 3)
    patches = tokens[:, [0, 1, 2, 4, 5, 6]]
    assert _tokens_of_patches(tokens, patches, None) == [0, 1, 2, 4, 5, 6]
    for image in (0, 1):
        for feature in (0, 2):
            changed = tokens.clone()
            changed[image, 5, feature] += 1
            assert _tokens_of_patches(changed, patches, None) is None
    assert _tokens_of_patches(tokens[:, :5], patches, None) is None
    assert _tokens_of_patches(tokens[:1], patches, None) is None


def test_the_published_convention_of_forks_is_for_directions_with_parts_of_their_own() -> None:
    for name, refused in (("v1", True), ("v2 halved", False), ("none", False)):
        model = Backbone([Vim(8, MARKS[name])], (3, 5), {"cls_token": (7,)})
        method = RawAttention(model, convention="implicit_unified")
        if refused:
            with pytest.raises(ValueError, match=r"layers\.0\.mixer is no Vim mixer .* one for each"):
                method.attribute(torch.randn(1, 3, 12, 20), target=0)
        else:
            assert method.attribute(torch.randn(1, 3, 12, 20), target=0).shape[-2:] == (12, 20)
