"""The look at a model ahead of its first pass: what it costs, what it leaves alone, and where cheap gradients do."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mamba_attn
from mamba_attn.tracing import standing
from mamba_attn.tracing.replay import Replay
from tests.integrations.small_vim import Mamba
from tests.leaks import state_of
from tests.tracing.turned import BothWays, Compiled, Flat, compiled, run


def test_a_look_that_fails_is_said_with_its_error() -> None:
    class Stern(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mamba(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("only without gradients")
            out: torch.Tensor = self.mixer(x)
            return out

    with pytest.warns(UserWarning, match=r"^trace: whether code around .*\(RuntimeError: only without gradients\)"):
        trace = run(Stern(), torch.randn(2, 7, 8))
    assert trace["mixer"].tokens == 7


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_disturbed_and_it_is_looked_at_once(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []
    measured = standing._measured

    def counted(*args: Any) -> Any:
        times.append(1)
        return measured(*args)

    monkeypatch.setattr(standing, "_measured", counted)
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8), Flat(Mamba(8)), nn.Dropout(0.2)).train(training)
    seen: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 3, 4, 8)
    run(model, x)
    first, before = len(seen), [state_of(module) for module in model.modules()]
    statistics = model[1].running_mean.clone()
    with torch.no_grad():
        model[1].running_mean.zero_()
    torch.manual_seed(3)
    plain = model(x)
    torch.manual_seed(3)
    with torch.no_grad():
        model[1].running_mean.zero_()
    seen.clear()
    with mamba_attn.trace(model):
        traced = model(x)
    torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)
    assert len(seen) == first
    assert times == [1]
    assert [state_of(module) for module in model.modules()] == before
    assert bool(statistics.any()) == training


def test_a_model_that_does_not_run_on_one_image_is_looked_at_with_all() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mamba(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x
            out: torch.Tensor = self.mixer(torch.stack([first, second]))
            return out

    trace = run(Pair(), torch.randn(2, 7, 8))
    assert trace["mixer"].tokens == 7
    assert trace._ahead._found.failed == ""


class Perceptron(nn.Module):
    """Layers of features behind a mixer, as VMamba has."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(8), mixer
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm(x))
        out: torch.Tensor = x + self.mlp(x)
        return out


class TurnedByALayer(nn.Module):
    """Gives its tokens to the inner module in the order that a linear layer over them makes, and back."""

    def __init__(self, inner: nn.Module, tokens: int) -> None:
        super().__init__()
        self.inner, self.turn = inner, nn.Linear(tokens, tokens, bias=False)
        self.turn.weight.data = torch.eye(tokens).flip(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.turn(self.inner(self.turn(x.mT).mT).mT).mT
        return out


def look(model: nn.Module, x: torch.Tensor) -> Any:
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, Mamba)}
    return standing.standing(model, Replay.of((x,), {}), mixers)


def test_of_mixers_of_one_kind_one_runs_and_all_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(*[Perceptron(compiled()) for _ in range(4)]), torch.randn(1, 7, 8)
    ran, own = [], Compiled.scanned

    def counted(self: Compiled, *args: Any) -> torch.Tensor:
        ran.append(self)
        return own(self, *args)

    monkeypatch.setattr(Compiled, "scanned", counted)
    found = look(model, x)
    assert len({id(module) for module in ran}) == 1
    assert [(name, order.tolist()) for name, order in found.orders] == [
        (f"{i}.mixer", [list(range(7))]) for i in range(4)
    ]
    assert found.doors == [f"{i}.mixer" for i in range(4)]


@pytest.mark.parametrize("tokens", [7, 8])
def test_tokens_turned_by_a_layer_over_them_are_caught_beside_cheap_layers_of_features(tokens: int) -> None:
    turned = nn.Sequential(Perceptron(compiled()), TurnedByALayer(Perceptron(compiled()), tokens), nn.LayerNorm(8))
    found = look(turned, torch.randn(1, tokens, 8))
    assert found.moved == ["1.inner.mixer"]
    orders = dict(found.orders)
    assert orders["1.inner.mixer"].tolist() == [list(range(tokens))[::-1]]


class WrittenOver(Perceptron):
    """Adds to what a layer of features returned, in its place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm(x))
        out: torch.Tensor = self.mlp(x)
        out += x
        return out


def test_what_a_layer_of_features_returned_may_be_written_over() -> None:
    found = look(nn.Sequential(WrittenOver(compiled()), WrittenOver(compiled())), torch.randn(1, 7, 8))
    assert not found.failed
    assert found.whole == ["0.mixer", "1.mixer"]


def test_cheap_gradients_of_layers_of_features_show_what_their_own_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[Perceptron(compiled()) for _ in range(3)], BothWays(compiled(), compiled()))
    x = torch.randn(1, 7, 8)
    cheap: list[bool] = []
    own = standing.OnItsToken.apply
    monkeypatch.setattr(standing.OnItsToken, "apply", lambda *args: (cheap.append(True), own(*args))[1])
    found = look(model, x)
    assert len(cheap) >= 6
    standing._remembered.pop(model)
    monkeypatch.setattr(standing._Pass, "_on_its_token", lambda self, x, weight, out, axis: out)
    exact = look(model, x)
    assert found.moved == exact.moved == ["3.backward_block.mixer"]
    assert [(name, order.tolist()) for name, order in found.orders] == [(n, o.tolist()) for n, o in exact.orders]


class Repeated(nn.Module):
    """A block whose activations are computed again in the backward pass, a layer of features before its mixer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(8, 8), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(lambda t: self.inner(t + self.before(t)), x, use_reentrant=False)
        return out


def test_blocks_that_are_computed_again_get_the_same_gradients_again() -> None:
    model = nn.Sequential(nn.LayerNorm(8), *[Repeated(Perceptron(compiled())) for _ in range(2)], nn.LayerNorm(8))
    found = look(model, torch.randn(1, 7, 8))
    assert not found.failed
    assert [name for name, _ in found.orders] == ["1.inner.mixer", "2.inner.mixer"]
    assert not found.moved
