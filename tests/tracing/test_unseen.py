"""What mixes tokens in a model and was not traced is named, warned of, and refused where layers are multiplied."""

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn import attribution
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing import unseen
from mamba_attn.tracing.adapters import nothing_found
from tests.integrations import small_vim
from tests.leaks import state_of

MULTIPLIED = (
    attribution.AttentionRollout,
    attribution.MambaAttribution,
    attribution.ImplicitAttention,
    attribution.LaTIM,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Spelt(nn.Module):
    """Softmax attention that goes through no door."""

    def __init__(self, width):
        super().__init__()
        self.joint = nn.Linear(width, 3 * width)

    def forward(self, x):
        query, key, value = self.joint(x).chunk(3, -1)
        return (query @ key.mT).softmax(-1) @ value


class Attention(nn.Module):
    """Softmax attention, as a mixer of a block."""

    def __init__(self, width):
        super().__init__()
        self.attn = Spelt(width)

    def forward(self, x, *ignored, **also):
        return self.attn(x)


class Gate(nn.Module):
    """Scales every token by what it sees of all of them."""

    def __init__(self, width):
        super().__init__()
        self.squeeze = nn.Linear(width, width)

    def forward(self, x, **ignored):
        return x * self.squeeze(x.mean(1, keepdim=True)).sigmoid()


class Near(nn.Module):
    """A convolution along the tokens."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, x, **ignored):
        return self.conv(x.mT).mT


class Feed(nn.Module):
    """Token by token, in code of its own."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, **ignored):
        return self.down(self.drop(nn.functional.gelu(self.up(x))))


class Hybrid(nn.Module):
    """Mamba's own model of some attention layers: blocks of a norm and a mixer, added to what they were given."""

    def __init__(self, *kinds, width=8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "mixer": kind(width)}) for kind in kinds
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["mixer"](layer["norm"](x))
        return x.mean(1)


def traced(model, x, **options):
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


def half_unknown():
    model = mamba_attn.models.create("vim_micro").eval()
    width = model.layers[0].mixer.in_proj.in_features
    for block in model.layers[1::2]:
        block.mixer = Attention(width)
    return model


def test_a_model_whose_second_mixers_nobody_knows():
    model, x = half_unknown(), torch.randn(2, 3, 64, 64)
    names = [f"layers.{i}.mixer.attn" for i in range(1, len(model.layers), 2)]
    with pytest.warns(UserWarning, match=r"trace: layers\.1\.mixer\.attn, .* mix tokens next to") as caught:
        trace = traced(model, x)
    assert len(caught) == 1
    assert trace.unseen_mixers == names
    assert f"{names[0]}: mixes tokens, not traced" in repr(trace)
    for method in MULTIPLIED:
        with pytest.raises(UnsupportedModelError, match=rf"{method.__name__}: layers\.1\.mixer\.attn, .* mix tokens"):
            method(model).attribute(x)
        assert method(model, layers="layers.*").attribute(x).shape == (2, 1, 64, 64)


def test_every_second_block_of_a_list_is_attention():
    model = Hybrid(small_vim.Mamba, Attention, small_vim.Mamba, Attention).eval()
    with pytest.warns(UserWarning, match=r"layers\.1\.mixer\.attn, layers\.3\.mixer\.attn mix tokens"):
        trace = traced(model, torch.randn(2, 7, 8))
    assert list(trace) == ["layers.0.mixer", "layers.2.mixer"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Feed, {}), (Near, {"layers.1.mixer.conv": "mixes neighbouring tokens"}),
     (Gate, {"layers.1.mixer": "scales tokens by what it sees of all"})],
)  # fmt: skip
def test_what_does_not_mix_like_a_layer_is_no_reason_to_warn(kind, said):
    model = Hybrid(small_vim.Mamba, kind)  # in training mode: dropout moves nothing here
    trace = traced(model, torch.randn(2, 31, 8))
    assert trace.unseen == said
    assert trace.unseen_mixers == []


class Picky(nn.Module):
    """Takes what a norm has returned, and nothing else."""

    def __init__(self, width):
        super().__init__()
        self.leave = nn.Linear(width, width)

    def forward(self, x):
        if float(x.mean(-1).abs().max()) > 1e-4:
            raise ValueError("not normalised")
        return self.leave(x) + x.mean(1, keepdim=True)


def test_what_does_not_run_on_random_numbers_is_named():
    model, x = Hybrid(small_vim.Mamba, Picky).eval(), torch.randn(2, 31, 8)
    trace = traced(model, x)
    sentence = "could not be asked: it does not run on random numbers (ValueError: not normalised)"
    assert trace.unseen == {"layers.1.mixer": sentence}
    assert trace.unseen_mixers == []


def test_a_second_pass_looks_at_nothing_until_weights_or_shapes_change(monkeypatch):
    model, x, looked = Hybrid(small_vim.Mamba, Attention).eval(), torch.randn(2, 7, 8), []
    own = unseen._Called.of.__func__
    monkeypatch.setattr(unseen._Called, "of", classmethod(lambda *given: looked.append(1) or own(*given)))

    def looks(x):
        looked.clear()
        with pytest.warns(UserWarning, match="mix tokens"):
            assert traced(model, x).unseen == {"layers.1.mixer.attn": "mixes tokens"}
        return bool(looked)

    assert [looks(x), looks(x), looks(x[:, :5]), looks(x), looks(x[:, :5])] == [True, False, True, False, False]
    with torch.no_grad():
        model.layers[1]["mixer"].attn.joint.weight.mul_(2)
    assert looks(x)
    assert not looks(x)


def test_a_pass_that_raised_is_not_remembered():
    class Stops(Hybrid):
        stop = True

        def forward(self, x):
            x = x + self.layers[0]["mixer"](self.layers[0]["norm"](x))
            if self.stop:
                raise ZeroDivisionError
            return x + self.layers[1]["mixer"](self.layers[1]["norm"](x))

    model, x = Stops(small_vim.Mamba, Attention).eval(), torch.randn(2, 7, 8)
    with pytest.raises(ZeroDivisionError):
        traced(model, x)
    model.stop = False
    with pytest.warns(UserWarning, match="mix tokens"):
        traced(model, x)


def test_looking_leaves_random_numbers_modes_and_hooks_as_they_were():
    model = Hybrid(small_vim.Mamba, Attention, Feed)
    calls = []
    model.layers[1]["mixer"].register_forward_hook(lambda *given: calls.append(1))
    before = [state_of(module) for module in model.modules()]
    x = torch.randn(2, 7, 8)
    torch.manual_seed(3)
    with torch.no_grad():
        model(x)
    expected = torch.rand(3)
    calls.clear()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"layers\.1\.mixer\.attn mix tokens"):
        traced(model, x)
    assert torch.equal(torch.rand(3), expected)
    assert calls == [1]
    assert [state_of(module) for module in model.modules()] == before
    traced(model, x, layers="*")  # named: no warning


def test_the_nothing_found_message_names_what_looks_like_a_scan():
    class Mamba9(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log, self.conv = nn.Parameter(torch.zeros(3)), nn.Conv2d(3, 3, 1)

    model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(5)), Mamba9(), Mamba9())
    sentence = str(nothing_found(model))
    assert "looks like a scan in it: Mamba9 (with A_log) x 2. See" in sentence
    assert "Conv2d" not in sentence
