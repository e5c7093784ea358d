"""Where mixers' tokens stand in the model: flips outside a mixer, and layouts from feature maps."""

import random
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.attribution import AttentionRollout, RawAttention
from mamba_attn.tracing import standing
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.replay import Replay
from tests.integrations.small_vim import Backbone, Mamba, Vim
from tests.tracing.turned import BothWays, Compiled, Flat, Groups, Lines, compiled, run

with mamba_attn.cpu_stand_ins():
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn


def fused_norm(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    out: torch.Tensor = layer_norm_fn(x, torch.ones(shape), torch.zeros(shape))
    return out


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


@pytest.mark.parametrize("norm", [nn.functional.layer_norm, fused_norm])
def test_a_norm_that_is_called_as_a_function_is_seen_behind_the_last_flip(norm: Any) -> None:
    """As Vim's if_bidirectional: what the flipped block returns is all that a module returns of its tokens."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Added(compiled())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = norm(x + self.block(x.flip(1)).flip(1), (8,))[:, 3]
            return out

    layer = run(Last(), torch.randn(2, 7, 8)).layers[0]
    assert isinstance(layer, DoorLayer)
    assert lower(layer.attention().mT)
    assert not lower(layer.attention())


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


@pytest.mark.parametrize("mixers", [lambda: Flat(Mamba(8)), lambda: Lines(BothWays(compiled(), compiled()))])
def test_a_map_on_its_side_is_laid_over_the_input(mixers: Any) -> None:
    """As SEMamba: the input is turned, and its columns are halved."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(2, 8, (1, 2), (1, 2)), mixers()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.block(self.stem(x.mT))
            return out

    model, x = Turned(), torch.randn(2, 2, 14, 5)
    for layer in run(model, x).layers:
        assert (layer.layout.grid, layer.layout.patch_sizes) == ((7, 5), (2, 1))
        assert torch.equal(layer.layout.patches.view(7, 5), torch.arange(35).view(5, 7).T)
    assert RawAttention(model).attribute(x).shape == (2, 1, 14, 5)


def test_every_run_of_a_module_has_the_layout_of_its_map() -> None:
    """As UltraLight VM-UNet: one mixer runs on groups of channels in turn."""
    mixer = Flat(Mamba(4))
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), Groups(mixer))
    trace = run(model, torch.randn(2, 3, 8, 12))
    assert list(trace) == ["1.inner.mixer", "1.inner.mixer#2"]
    assert [layer.layout.grid for layer in trace.layers] == [(4, 6)] * 2


def test_channels_taken_for_tokens_have_no_place_in_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), Flat(Mamba(8), channels=True))  # as many channels as cells
    assert not run(model, torch.randn(2, 3, 4, 8)).layers[0].has_layout


class Spectrogram(nn.Module):
    """As Audio Mamba: turned on its side, its convolution called as a function, a class token in the middle."""

    def __init__(self, turn_back: bool = False, both: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 2, 3))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 4 * 4 + 1, 8))
        self.turn_back = turn_back
        self.blocks = nn.ModuleList([BothWays(compiled(), compiled()) if both else Vim(8) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.conv2d(x[:, None].transpose(2, 3), self.weight, stride=(2, 3))
        patches = (patches.mT if self.turn_back else patches).flatten(2).mT
        half = patches.shape[1] // 2
        token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([patches[:, :half], token, patches[:, half:]], 1) + self.places[:, : patches.shape[1] + 1]
        for block in self.blocks:
            x = x + block(nn.functional.layer_norm(x, (8,)))
        return x


@pytest.mark.parametrize("turn_back", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("size", [(12, 6), (9, 4), (6, 6)])
def test_a_spectrogram_on_its_side_is_numbered_by_columns(size: tuple[int, int], both: bool, turn_back: bool) -> None:
    x = torch.randn(2, *size)  # (time, frequency)
    trace = run(Spectrogram(turn_back, both), x)
    times, tones = size[0] // 3, size[1] // 2
    raster = torch.arange(times * tones).view((times, tones) if turn_back else (tones, times))
    raster = raster if turn_back else raster.T
    tokens = raster.flatten() + (raster.flatten() >= times * tones // 2)
    assert len(trace.layers) == (4 if both else 2)
    for layer in trace.layers:
        assert isinstance(layer, DoorLayer) == (both and "backward" in layer.name)
        assert (layer.layout.grid, layer.layout.steps) == ((times, tones), (3, 2))
        assert layer.layout.class_tokens == (times * tones // 2,)
        assert torch.equal(layer.layout.patches, tokens)
        assert layer.layout.columns_first != turn_back or 1 in (times, tones)


def test_what_is_drawn_at_random_is_no_layout() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mixer = nn.Conv2d(3, 8, 2, 2), Vim(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).flatten(2).mT
            out: torch.Tensor = x + self.mixer(x.roll(random.randint(1, 3), 1))
            return out

    trace = standing.standing(model := Shuffled(), Replay.of((torch.randn(2, 3, 4, 6),), {}), {"mixer": model.mixer})
    assert trace.embedded is None


class Added(nn.Module):
    """A mixer, added to what it was given."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.mixer(x)
        return out


class Video(nn.Module):
    """As VideoMamba: tubelets, a class token of the first frame, positions in space and in time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (1, 2, 2), (1, 2, 2))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.places, self.times = nn.Parameter(torch.randn(1, 6, 8)), nn.Parameter(torch.randn(3, 1, 8))
        self.blocks = nn.Sequential(Added(Vim(8)), Added(Vim(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(3).permute(0, 2, 3, 1) + self.places + self.times
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], 1)
        out: torch.Tensor = self.blocks(x)[:, 0]
        return out


def test_a_video_with_a_class_token_has_its_layout() -> None:
    layers = run(Video(), torch.randn(2, 3, 3, 4, 6)).layers
    for layer in layers:
        assert (layer.layout.grid, layer.layout.patch_sizes) == ((3, 2, 3), (1, 2, 2))
        assert layer.layout.class_tokens == (0,)
    maps = AttentionRollout(Video()).attribute(torch.randn(2, 3, 3, 4, 6))
    assert maps.shape == (2, 1, 3, 4, 6)


class Frames(nn.Module):
    """As Vivim: (batch, frames, colours, height, width), frames by themselves, then mixers over space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.merge = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)
        self.first, self.second = Flat(Mamba(8)), Flat(Mamba(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = x.shape[1]
        x = self.first(self.stem(x.flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2))
        x = self.second(self.merge(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2))
        return x


@pytest.mark.parametrize("frames", [5, 2])
def test_colours_are_not_taken_for_frames(frames: int) -> None:
    x = torch.randn(2, frames, 3, 8, 12)
    layers = run(model := Frames(), x).layers
    assert [layer.layout.grid for layer in layers] == [(frames, 4, 6), (frames, 2, 3)]
    assert [layer.layout.patch_sizes for layer in layers] == [(1, 2, 2), (1, 4, 4)]
    for method in (RawAttention(model), AttentionRollout(model)):
        assert method.attribute(x).shape == (2, 1, frames, 8, 12)
        maps = method.attribute(x, expand=True)
        assert maps.shape == x.shape
        torch.testing.assert_close(maps.sum(2, keepdim=True).transpose(1, 2), method.attribute(x))


class OwnAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each[:, None] for each in self.qkv(x).chunk(3, -1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


class OwnNet(torch.nn.Module):
    """A network that no adapter knows: two tokens of a parameter of that name in front of 5 x 3 patches."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 8, 8)
        self.register_parameter(name, torch.nn.Parameter(torch.randn(1, 2, 16)))
        self.mixers = torch.nn.ModuleList([OwnAttention(), OwnAttention()])
        self.norm, self.name = torch.nn.LayerNorm(16), name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = getattr(self, self.name).expand(len(images), -1, -1)
        x = torch.cat([first, self.stem(images).flatten(2).mT], 1)
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.norm(x).mean(1)


@pytest.mark.parametrize(("name", "classes", "registers"), [("cls_token", (0, 1), ()), ("memory", (), (0, 1))])
def test_tokens_that_are_no_patches_are_named_by_the_parameter_that_makes_them(
    name: str, classes: tuple[int, ...], registers: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = OwnNet(name).eval()
    with torch.no_grad(), mamba_attn.trace(model) as record:
        model(torch.randn(2, 3, 40, 24))
    for layer in record.layers:
        layout = layer.layout
        assert (layout.grid, layout.class_tokens, layout.registers) == ((5, 3), classes, registers)
