"""Where mixers' tokens stand in the model: flips outside a mixer, layouts from feature maps, and what both cost."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.tracing import standing
from mamba_attn.tracing.door_layers import DoorLayer
from tests.integrations.small_vim import Backbone, Block, Mamba, Vim
from tests.leaks import state_of
from tests.tracing.foreign import selective_scan_fn


class Compiled(Mamba):
    """Its scan goes through a compiled extension's stand-in."""

    def scanned(self, u: torch.Tensor, projected: torch.Tensor, suffix: str, A: torch.Tensor) -> torch.Tensor:
        low, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], -1)
        delta, D = nn.functional.linear(low, self.dt_proj.weight), self.D
        given = (u.mT, delta.mT, -torch.exp(A), B.mT.contiguous(), C.mT.contiguous(), D, None, self.dt_proj.bias)
        y: torch.Tensor = selective_scan_fn(*given, delta_softplus=True).mT
        return y


class BothWays(nn.Module):
    """As SEMamba's: one mixer gets the tokens as they are, the other backwards, by flips around it."""

    def __init__(self, forward: nn.Module, backward: nn.Module) -> None:
        super().__init__()
        self.forward_block, self.backward_block = Block(8, forward), Block(8, backward)
        self.join = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        there, first = self.forward_block(x)
        back, second = self.backward_block(x.flip(1))
        return self.join(torch.cat([there + first, (back + second).flip(1)], -1)) + x


class Lines(nn.Module):
    """Mixers over the rows of a map: many sequences of one image."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.permute(0, 2, 3, 1).flatten(0, 1)
        out: torch.Tensor = self.inner(rows).unflatten(0, (x.shape[0], x.shape[2])).permute(0, 3, 1, 2)
        return out


class Flat(nn.Module):
    """As U-Mamba's: the map's pixels one after the other."""

    def __init__(self, mixer: nn.Module, channels: bool = False) -> None:
        super().__init__()
        self.mixer, self.channels = mixer, channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2) if self.channels else x.flatten(2).mT
        mixed = self.mixer(tokens)
        out: torch.Tensor = x + (mixed if self.channels else mixed.mT).reshape(x.shape)
        return out


def run(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


def compiled() -> nn.Module:
    return Compiled(8)


def lower(matrix: torch.Tensor) -> bool:
    return bool((matrix.triu(1) == 0).all())


class Scaled(Compiled):
    """Something else behind the scan than Mamba has."""

    def forward(self, hidden_states: torch.Tensor, inference_params: None = None) -> torch.Tensor:
        return super().forward(hidden_states) * 0.8


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_what_differs_is_taken_at_its_door_with_one_warning_that_gives_the_number(mode: str) -> None:
    model, x = nn.Sequential(Scaled(8), Scaled(8), Compiled(8)), torch.randn(2, 7, 8)
    with torch.no_grad():
        plain = model(x)
    sentence = (
        r"^trace: [01] \(Scaled, family Mamba\): .* by 0\.\d+ \(.*\), and 1 more like it\. What enters a compiled scan"
    )
    for _ in range(2):
        with pytest.warns(UserWarning, match=sentence) as caught, torch.no_grad():
            with mamba_attn.trace(model, mode=mode) as trace:
                traced = model(x)
        assert len(caught) == 1
        torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)
        assert [isinstance(trace[name], DoorLayer) for name in ("0", "1", "2")] == [True, True, False]
        assert trace.names == ["2", "0", "1"] or trace.names == ["0", "1", "2"]
    twin = Compiled(8)
    twin.load_state_dict(model[0].state_dict())
    torch.testing.assert_close(trace["0"].attention(), run(twin, x)[""].attention())


@pytest.mark.parametrize("mode", ["route", "observe"])
def test_flipped_tokens_are_taken_in_the_models_order_at_the_door(mode: str) -> None:
    model, x = BothWays(compiled(), compiled()), torch.randn(2, 7, 8)
    with torch.no_grad():
        plain = model(x)
    trace = run(model, x, mode=mode)
    forward, backward = trace["forward_block.mixer"], trace["backward_block.mixer"]
    assert not isinstance(forward, DoorLayer)
    assert isinstance(backward, DoorLayer)
    assert lower(forward.attention())
    assert lower(backward.attention().mT)  # it reads what follows
    assert not lower(backward.attention())
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    alone = run(model.backward_block, x.flip(1))["mixer"].attention()
    torch.testing.assert_close(backward.attention(), alone.flip(1, 2))


def test_rows_of_an_image_go_to_their_doors_together_where_one_is_flipped() -> None:
    model, x = Lines(BothWays(compiled(), compiled())), torch.randn(2, 8, 3, 5)
    layers = run(model, x).layers
    assert [isinstance(layer, DoorLayer) for layer in layers] == [True, True]
    assert [(layer.batch, layer.tokens, layer.layout.grid) for layer in layers] == [(2, 15, (3, 5))] * 2
    matrix = layers[0].attention()
    for row in range(3):
        inside = slice(5 * row, 5 * row + 5)
        assert bool(matrix[:, inside, inside].any())
        assert not bool(matrix[:, inside, : 5 * row].any() or matrix[:, inside, 5 * row + 5 :].any())


def test_rows_that_nobody_flips_stay_with_the_adapter() -> None:
    model, x = Lines(nn.Sequential(compiled())), torch.randn(2, 8, 3, 5)
    layer = run(model, x).layers[0]
    assert (isinstance(layer, DoorLayer), layer.batch, layer.tokens) == (False, 6, 5)


def test_without_a_door_it_is_said() -> None:
    model, x = BothWays(Mamba(8), Mamba(8)), torch.randn(2, 7, 8)
    sentence = r"^trace: backward_block\.mixer get the tokens in another order than the model around them has"
    with pytest.warns(UserWarning, match=sentence) as caught:
        trace = run(model, x)
    assert len(caught) == 1
    assert lower(trace["backward_block.mixer"].attention())


def test_tokens_in_order_are_silent_and_stay_with_the_adapter() -> None:
    model, x = Backbone([Vim(8) for _ in range(3)], (3, 5), {"cls_token": (7,)}), torch.randn(2, 3, 12, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = run(model, x)
    assert [name for name, _ in trace._ahead._found.orders] == list(trace)
    assert trace._ahead._found.moved == []


@pytest.mark.parametrize("sizes", [(4, 6), (2, 3, 4)])
def test_layouts_come_from_the_nearest_map_whatever_its_rank(sizes: tuple[int, ...]) -> None:
    kind = nn.Conv2d if len(sizes) == 2 else nn.Conv3d
    model = nn.Sequential(kind(3, 8, 2, 2), Flat(Mamba(8)), kind(8, 8, 3, padding=1))
    layer = run(model, torch.randn(2, 3, *(2 * size for size in sizes))).layers[0]
    assert layer.layout.grid == sizes
    assert layer.layout.patch_sizes == (2,) * len(sizes)


def test_channels_taken_for_tokens_have_no_place_in_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), Flat(Mamba(8), channels=True))  # as many channels as cells
    assert not run(model, torch.randn(2, 3, 4, 8)).layers[0].has_layout


def test_maps_that_lie_across_the_input_are_no_layout() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.flat = nn.Conv2d(1, 8, 2, 2), Flat(Mamba(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.flat(self.stem(x.mT[:, None]))
            return out

    assert not run(Turned(), torch.randn(2, 8, 12)).layers[0].has_layout


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


def test_a_model_that_does_not_run_on_one_image_is_traced() -> None:
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
    assert trace._ahead._found.orders == []
