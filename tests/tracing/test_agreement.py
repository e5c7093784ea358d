"""An adapter is used where its numbers agree: compared once, remembered, and nothing of the model disturbed."""

import copy
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.core.rules import Rules
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing import agreement
from mamba_attn.tracing.agreement import Call, difference, latest
from mamba_attn.tracing.undisturbed import settings, undisturbed
from tests.integrations.small_vim import Mamba
from tests.leaks import state_of


class Counted(Mamba):
    """Counts its own forwards outside the module, where a trace does not look."""

    def __init__(self, **options: Any) -> None:
        super().__init__(6, **options)
        self.counts = [0]
        self.__dict__["_calls"] = CALLS
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6)
        self.kept: list[torch.Tensor] = []
        self.settings = SimpleNamespace(factor=1.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        CALLS.append(tuple(hidden_states.shape))
        self.kept.append(hidden_states)
        self.norm(hidden_states.mT)  # its statistics alone
        return super().forward(hidden_states) * self.settings.factor


CALLS: list[tuple[int, ...]] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    CALLS.clear()


def run(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_compared_once_per_shape_type_mode_and_value(mode: str) -> None:
    mixer, x = Counted().eval(), torch.randn(2, 5, 6)
    extra = 1 if mode == "observe" else 0  # then the module's own forward runs anyway

    def compared(value: torch.Tensor) -> int:
        CALLS.clear()
        run(mixer, value, mode=mode)
        return len(CALLS) - extra

    assert [compared(x), compared(x), compared(x + 1)] == [1, 0, 0]
    assert [compared(x[:, :4]), compared(x[:, :4]), compared(x)] == [1, 0, 0]
    mixer.double()
    assert [compared(x.double()), compared(x.double())] == [1, 0]
    mixer.d_extra = 3
    assert [compared(x.double()), compared(x.double())] == [1, 0]
    mixer.settings.other = "inside"
    assert [compared(x.double()), compared(x.double())] == [1, 0]
    with torch.no_grad():
        mixer.D.add_(1)
    assert [compared(x.double()), compared(x.double())] == [1, 0]
    mixer.train()
    assert compared(x.double()) > 0


def test_a_changed_setting_is_found() -> None:
    mixer, x = Counted().eval(), torch.randn(2, 5, 6)
    run(mixer, x)
    mixer.settings.factor = 1.01
    with pytest.raises(UnsupportedModelError, match=r"differs from what the module itself returns by 0\.009\d"):
        run(mixer, x)
    mixer.settings.factor = 1.0
    run(mixer, x)


def test_an_update_that_was_silent_is_found_when_it_is_trained() -> None:
    class Update(nn.Module):
        """Beside a weight that the mixer's own forward reads alone."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.change = base, nn.Parameter(torch.zeros(()))
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * (1 + self.change)

    mixer, x = Mamba(6), torch.randn(2, 5, 6)
    mixer.in_proj = Update(mixer.in_proj)
    run(mixer, x)
    with torch.no_grad():
        mixer.in_proj.change.fill_(0.1)
    with pytest.raises(UnsupportedModelError, match="differs"):
        run(mixer, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["route", "observe"])
def test_nothing_is_disturbed(mode: str, training: bool) -> None:
    mixer, x, seen = Counted().train(training), torch.randn(2, 5, 6), []
    for module in (mixer, mixer.in_proj, mixer.norm):
        module.register_forward_hook(lambda module, *_: seen.append(module))
        module.register_forward_pre_hook(lambda module, *_: seen.append(module))
    twin = copy.deepcopy(mixer)
    run(twin, x, mode=mode)  # compares
    expected = (copy.deepcopy(dict(mixer.named_buffers())), len(mixer.kept))
    before, given = state_of(mixer), x.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seen.clear()
    trace = run(mixer, x, mode=mode)
    first = list(seen)
    assert torch.equal(torch.get_rng_state(), state)
    assert {key: value for key, value in state_of(mixer).items() if before.get(key) is not value} == {}
    assert torch.equal(x, given)
    seen.clear()
    statistics = copy.deepcopy(dict(mixer.named_buffers()))
    assert len(mixer.kept) - expected[1] == (1 if mode == "observe" else 0)
    if mode == "route" or not training:
        assert all(torch.equal(value, expected[0][name]) for name, value in statistics.items())
    run(mixer, x, mode=mode)
    assert first == seen  # the hooks see as much as when nothing is compared
    assert trace[""].tokens == 5


def test_rules_see_a_call_once_and_no_comparison() -> None:
    class Seeing(Rules):
        def __init__(self) -> None:
            self.seen = 0

        def gate(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return super().gate(y, gate)

    rules = Seeing()
    run(Mamba(6), torch.randn(2, 5, 6), rules=rules)
    assert rules.seen == 1


class Dropping(Mamba):
    """Drops, as an adapter cannot know in which order."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(hidden_states), 0.3, self.training)


@pytest.mark.changes_model("training")
def test_dropout_is_no_difference_and_a_difference_behind_it_is_one() -> None:
    mixer, x = Dropping(6).train(), torch.randn(2, 5, 6)
    run(mixer, x)
    verdict = latest(mixer)
    assert verdict is not None
    assert verdict.agrees
    mixer.dt_proj.register_parameter("bias", nn.Parameter(torch.zeros(12)))
    mixer.scanned = lambda *args: 1.1 * Mamba.scanned(mixer, *args)
    with pytest.raises(UnsupportedModelError, match="differs"):
        run(mixer, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_to_its_own_rounding(dtype: torch.dtype) -> None:
    class Wide(Mamba):
        factor = 1.0

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            twin = copy.deepcopy(self).float()
            return (Mamba.forward(twin, hidden_states.float()) * self.factor).to(hidden_states.dtype)

    mixer, x = Wide(6).to(dtype), torch.randn(2, 9, 6, dtype=dtype)
    run(mixer, x)
    mixer.factor = 1.3
    with pytest.raises(UnsupportedModelError, match="differs"):
        run(mixer, x)


def test_a_mixer_whose_values_are_all_nan_is_traced_and_compared_later() -> None:
    mixer, x = Counted().eval(), torch.randn(2, 5, 6)
    run(mixer, x * torch.nan)
    run(mixer, x)
    run(mixer, x)
    assert len(CALLS) == 2


def test_not_compared_while_code_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_compiling", "is_dynamo_compiling"):
        monkeypatch.setattr(torch.compiler, name, lambda: True)
    run(Counted(), torch.randn(2, 5, 6))
    assert CALLS == []


def test_other_threads_see_the_hooks_and_keep_what_they_put_on(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, seen = Mamba(6), []
    mixer.register_forward_hook(lambda *_: seen.append(1))
    with undisturbed(mixer):
        mixer(torch.randn(1, 3, 6))
        handle = mixer.register_forward_pre_hook(lambda *_: None)
    assert (seen, len(mixer._forward_pre_hooks)) == ([], 1)
    handle.remove()
    mixer(torch.randn(1, 3, 6))
    assert seen == [1]


def test_settings_tell_functions_and_configurations_apart() -> None:
    mixer = Mamba(6)
    mixer.config = SimpleNamespace(inner=SimpleNamespace(rank=1))
    before = settings(mixer)
    assert settings(mixer) == before
    mixer.config.inner.rank = 2
    assert settings(mixer) != before
    mixer.config.inner.rank = 1
    assert settings(mixer) == before
    mixer.core = mixer.forward
    other = settings(mixer)
    mixer.core = mixer.direction
    assert settings(mixer) != other


def test_differences() -> None:
    x = torch.tensor([1.0, -4.0, torch.nan])
    assert difference(x + torch.tensor([0.0, 0.4, 0.0]), x) == pytest.approx(0.1)
    assert difference(torch.tensor([1.0, torch.nan, 0.0]), x) == float("inf")
    assert difference(x[:2], x) == float("inf")
    assert difference(x * torch.nan, x * torch.nan) != difference(x, x)
    assert Call((x,), {"a": [x.long()], "cache": object()}).opaque == ["object"]
    assert Call((x, torch.autograd.Function), {"merge": torch.nn.functional.relu}).opaque == []


def test_no_more_calls_are_remembered_than_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_REMEMBERED", 2)
    mixer = Counted().eval()
    for tokens in (3, 4, 5, 5, 3):
        run(mixer, torch.randn(1, tokens, 6))
    assert [shape[1] for shape in CALLS] == [3, 4, 5, 3]


def test_warnings_are_not_errors_of_a_mixer_that_agrees() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Mamba(6), torch.randn(2, 5, 6))


def test_the_sentence_without_a_name() -> None:
    class Scaled(Mamba):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 1.5 * super().forward(hidden_states)

    with pytest.raises(UnsupportedModelError) as error:
        run(Scaled(6), torch.randn(2, 5, 6))
    assert re.match(r"the model \(Scaled, family Mamba\): .* by 0\.33 \(relative; 1e-05 is allowed\)", str(error.value))
