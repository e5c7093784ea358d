"""mamba_ssm's Mamba on both of its paths against a loop over tokens; what is refused, by its sentence."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mamba_attn
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.testing import LawError, check_adapter
from tests.integrations.by_number import differs, refusal
from tests.integrations.small_vim import Backbone, Mamba

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias of the convolution": {"conv_bias": False},
    "biases": {"bias": True, "dt_rank": 5},
    "other sizes": {"d_state": 5, "d_conv": 2, "expand": 1.5, "dt_rank": 1},
}


class Alone(nn.Module):
    """One mixer, called as some model does."""

    def __init__(self, mixer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.mixer, self.args, self.kwargs = mixer, args, kwargs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(x, *self.args, **self.kwargs)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_laws(name: str, fast: bool) -> None:
    mixer = Mamba(6, **VARIANTS[name], fast=fast)
    report = check_adapter(mixer, torch.randn(3, 11, 6), tolerance=1e-6)
    assert report.observed_identical
    report = check_adapter(mixer.double(), torch.randn(2, 7, 6, dtype=torch.float64), tolerance=1e-13)
    assert report.layers[0].matrix_error > 0


@pytest.mark.changes_model("training")
@pytest.mark.parametrize("training", [True, False])
def test_training_changes_nothing(training: bool) -> None:
    model = Backbone([Mamba(8), Mamba(8)], (3, 2)).train(training)
    report = check_adapter(model, torch.randn(2, 3, 12, 8), tolerance=2e-6)
    assert [layer.name for layer in report.layers] == ["layers.0.mixer", "layers.1.mixer"]


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_gradients_equal_those_of_the_loop(mode: str) -> None:
    model, x = Mamba(6).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    with mamba_attn.trace(model, mode=mode) as trace:
        scalar = model(x).square().sum()
    seen: list[torch.Tensor] = []
    direction = model.scanned

    def kept(*args: Any) -> torch.Tensor:
        seen.append(direction(*args))
        return seen[0]

    model.scanned = kept
    truth = torch.autograd.grad(model(x).square().sum(), seen)[0]
    del model.scanned
    found = trace.gradients(scalar)[""]
    torch.testing.assert_close(found, truth.mT, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trace[""].y, seen[0].mT, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("call", [Alone, lambda m: Alone(m, None), lambda m: Alone(m, inference_params=None)])
def test_calls(call: Any) -> None:
    assert check_adapter(call(Mamba(6)), torch.randn(2, 5, 6)).output_error <= 1e-6


def test_the_input_by_name() -> None:
    mixer, x = Mamba(6), torch.randn(2, 5, 6)
    with torch.no_grad(), mamba_attn.trace(mixer) as trace:
        mixer(hidden_states=x)
    assert trace[""].tokens == 5


class Cached(Mamba):
    """Starts from what a cache holds, and leaves its last token there."""

    def forward(self, hidden_states: torch.Tensor, inference_params: Any = None) -> torch.Tensor:
        if inference_params is None:
            return super().forward(hidden_states)
        started = hidden_states + getattr(inference_params, "state", 0)
        inference_params.state = hidden_states[:, -1:]
        return super().forward(started)


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_a_cache_is_filled_as_without_a_trace_and_refused_where_it_holds_something(mode: str) -> None:
    model, x, cache = Alone(Cached(6)), torch.randn(1, 5, 6), SimpleNamespace()
    model.kwargs = {"inference_params": cache}
    with torch.no_grad(), mamba_attn.trace(model, mode=mode) as trace:
        model(x)
    assert trace["mixer"].tokens == 5
    assert torch.equal(cache.state, x[:, -1:])
    with torch.no_grad(), mamba_attn.trace(model, mode=mode):
        with pytest.raises(UnsupportedModelError, match=r"differs .* was called with SimpleNamespace, which may hold"):
            model(x)


class Open(Mamba):
    """Takes any input by name, as the stand-in for mamba_ssm's does."""

    def forward(self, hidden_states: torch.Tensor, inference_params: None = None, **more: Any) -> torch.Tensor:
        return super().forward(hidden_states)


def test_inputs_that_are_named_in_the_call_alone() -> None:
    assert check_adapter(Alone(Open(6), seq_idx=None), torch.randn(2, 5, 6)).output_error <= 1e-6
    model = Alone(Open(6), seq_idx=torch.zeros(1, 5))
    assert check_adapter(model, torch.randn(2, 5, 6)).output_error <= 1e-6


class Masking(Mamba):
    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states if attention_mask is None else hidden_states * attention_mask[..., None])


def test_a_mask_is_compared_by_what_it_does() -> None:
    mixer, x, mask = Masking(6), torch.randn(2, 5, 6), torch.ones(2, 5)
    model = Alone(mixer, attention_mask=mask)
    assert refusal(model, x) is None
    mask[:, :2] = 0  # the same tensor
    assert re.match(differs("mixer", "Masking", "Mamba"), str(refusal(model, x)))
    model.kwargs = {"attention_mask": torch.ones(2, 5)}
    assert refusal(model, x) is None


def test_inputs_of_other_ranks_are_refused() -> None:
    class AnyRank(Mamba):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states.flatten(1, -2)).view_as(hidden_states)

    found = refusal(Alone(AnyRank(6)), torch.randn(2, 3, 4, 6))
    assert re.search(r"shape \(2, 3, 4, 6\); this adapter knows \(batch, tokens", str(found))


def test_maps_need_a_patch_embedding() -> None:
    blocks = nn.Sequential(Mamba(6), Mamba(6))
    with torch.no_grad(), mamba_attn.trace(blocks) as trace:
        blocks(torch.randn(1, 6, 6))
    with pytest.raises(TraceError, match="the tokens' place in the image is not known"):
        _ = trace.layers[0].layout
    layout = mamba_attn.TokenLayout((2, 3))
    with torch.no_grad(), mamba_attn.trace(blocks, layout=layout) as trace:
        blocks(torch.randn(1, 6, 6))
    assert trace.layers[1].layout is layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_bias_of_the_steps_in_full(dtype: torch.dtype) -> None:
    """A step of 0.01 has a bias of -4.6, which bfloat16 knows to 0.02 only: 2 % of the step."""
    mixer, x = Mamba(6), torch.randn(2, 9, 6)
    nn.init.constant_(mixer.dt_proj.bias, -4.6)
    nn.init.normal_(mixer.dt_proj.weight, std=0.3)
    with torch.no_grad(), mamba_attn.trace(mixer) as trace:
        mixer(x)
    with torch.no_grad(), mamba_attn.trace(mixer.to(dtype)) as half:
        mixer(x.to(dtype))
    low = half[""].scan.u[:, 0].mT.to(dtype) @ mixer.x_proj.weight.T
    product = low[..., : mixer.dt_rank] @ mixer.dt_proj.weight.T
    expected = torch.nn.functional.softplus(product.float() + mixer.dt_proj.bias.float())
    torch.testing.assert_close(half[""].scan.delta[:, 0].mT, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(half[""].y, trace[""].y, rtol=0.1, atol=0.05)


def test_autocast() -> None:
    model, x = Backbone([Mamba(8)], (2, 3)), torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16), mamba_attn.trace(model) as trace:
            traced = model(x)
    torch.testing.assert_close(traced.float(), plain, rtol=0, atol=0.1)
    assert trace.layers[0].scan.delta.dtype == torch.float32
    assert trace.layers[0].layout.grid == (2, 3)


class Wrapped(nn.Module):
    """A layer inside another, as LoRA's are: ``weight`` is still there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 1


class Merging(nn.Linear):
    """A linear layer that adds something of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def changed(**changes: Any) -> Mamba:
    mixer = Mamba(6)
    for name, value in changes.items():
        setattr(mixer, name, value)
    return mixer


class Windowed(Mamba):
    """Takes another input."""

    def forward(self, hidden_states: torch.Tensor, rate: int = 10) -> torch.Tensor:
        return super().forward(hidden_states)


class Unlike(Mamba):
    """Another name, other words, another input."""

    def forward(self, tokens: torch.Tensor, rate: int = 10) -> torch.Tensor:
        mixed = self.direction(tokens @ self.in_proj.weight.mT)
        return torch.nn.functional.linear(mixed, self.out_proj.weight)


ACCEPTED = {
    "other words": Unlike(6),
    "no projection is called": changed(act=nn.GELU(), activation="gelu"),
    "a norm that nothing calls": changed(dt_layernorm=nn.LayerNorm(2)),
    "a parameter": changed(biases=nn.Parameter(torch.ones(3))),
    "settings": changed(hidden_size=6, time_step_limit=(0.0, 1.0), config=SimpleNamespace(cells=3), args=object()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_computes_the_equations_is_used(name: str) -> None:
    report = check_adapter(nn.ModuleDict({"mixer": ACCEPTED[name]})["mixer"], torch.randn(2, 7, 6), tolerance=1e-6)
    assert len(report.layers) == 1


def test_a_buffer_is_no_reason() -> None:
    mixer = Mamba(6)
    mixer.register_buffer("memory", torch.ones(2))
    check_adapter(mixer, torch.randn(2, 5, 6), tolerance=1e-6)


class Scaled(Mamba):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 1.001


class Smoothed(Mamba):
    def scanned(self, u: torch.Tensor, *args: Any) -> torch.Tensor:
        return super().scanned((u + u.roll(1, 1)) / 2, *args)


class Stopped(Mamba):
    """Steps are limited from above."""

    def scanned(self, u: torch.Tensor, projected: torch.Tensor, *args: Any) -> torch.Tensor:
        return super().scanned(u, projected.clamp(max=0.1), *args)


REFUSED = {
    "a wrapped projection": changed(in_proj=Wrapped(nn.Linear(6, 24, bias=False))),
    "a projection of another kind": changed(x_proj=Merging(12, 8, bias=False)),
    "a bias of x_proj": changed(x_proj=nn.Linear(12, 8)),
    "another convolution": changed(conv1d=nn.Conv1d(12, 12, 3, groups=12, padding=1)),
    "output scaled": Scaled(6),
    "a convolution added": Smoothed(6),
    "limited": Stopped(6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused_with_the_number(name: str) -> None:
    mixer = REFUSED[name]
    found = str(refusal(nn.ModuleDict({"mixer": mixer})["mixer"], torch.randn(2, 7, 6)))
    assert re.match(differs("the model", type(mixer).__name__, "Mamba"), found), found


def test_parts_that_are_missing_are_said() -> None:
    model = Alone(changed(dt_proj=nn.Identity()))
    model.mixer.forward = lambda x: x
    assert re.search(
        r"mixer \(Mamba, family Mamba\): this adapter cannot compute it: AttributeError",
        str(refusal(model, torch.randn(2, 5, 6))),
    )


def test_parametrised_weights_are_weights() -> None:
    mixer = Mamba(6)
    parametrizations.weight_norm(mixer.in_proj)
    assert check_adapter(mixer, torch.randn(2, 5, 6)).output_error <= 1e-6


def test_results_that_a_fork_keeps_are_no_change_and_no_setting() -> None:
    class Keeping(Mamba):
        def forward(self, hidden_states: torch.Tensor, inference_params: None = None) -> torch.Tensor:
            self.kept = hidden_states
            return super().forward(hidden_states)

    mixer, x = Keeping(6), torch.randn(2, 5, 6)
    assert check_adapter(mixer, x).output_error <= 1e-6
    assert mixer.kept is x
    assert check_adapter(mixer, x).output_error <= 1e-6


def test_check_adapter_says_when_nothing_enters_the_projection() -> None:
    class Fused(Mamba):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.direction(self.entering(hidden_states)) @ self.out_proj.weight.T

    with pytest.raises(LawError, match="no hook saw its matrices"):
        check_adapter(Fused(6), torch.randn(1, 5, 6))
