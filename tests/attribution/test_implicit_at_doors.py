"""ImplicitAttention of mixers that are seen at the doors of their scans: M x + constant is what their code computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamba_attn
from mamba_attn.attribution import ImplicitAttention
from mamba_attn.attribution.implicit_map import Implicit, MixerRecorder
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.door_layers import DoorLayer
from tests.integrations import small_vim
from tests.tracing.foreign import CHANNELS, RANK, STATES, Cross, Line, Net, selective_scan_fn

GRID = (4, 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(batch=2):
    return torch.randn(batch, 3, 16, 20, dtype=torch.float64)


class Directions(nn.Module):
    """Convolution, activation and scan each way, in one module; the gate inside the scan, or behind it."""

    def __init__(self, ways=2, fused=True, padded=False, act=F.silu, other=False):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        before = 0 if padded else 3
        self.convs = nn.ModuleList(
            nn.Conv1d(CHANNELS, CHANNELS, 4, groups=CHANNELS, padding=before) for _ in range(ways)
        )
        self.project = nn.Linear(CHANNELS, RANK + 2 * STATES)
        self.step = nn.Linear(RANK, CHANNELS)
        self.A, self.D = nn.Parameter(torch.randn(ways, CHANNELS, STATES) / 2), nn.Parameter(torch.randn(CHANNELS))
        self.fused, self.padded, self.act, self.other = fused, padded, act, other

    def direction(self, way, x, z):
        given = F.pad(x, (3, 0)) if self.padded else x
        u = self.act(self.convs[way](given)[..., : x.shape[-1]])
        low, B, C = self.project(u.mT).mT.split([RANK, STATES, STATES], 1)
        delta = self.step.weight @ low
        parts = (B.contiguous(), C.contiguous(), self.D, z if self.fused else None, self.step.bias)
        y = selective_scan_fn(u, delta, -torch.exp(self.A[way]), *parts, delta_softplus=True)
        return y if self.fused else y * F.silu(z)

    def forward(self, x):
        x, z = self.enter(x).mT.chunk(2, 1)
        y = self.direction(0, x, z)
        if len(self.convs) > 1:
            back = (2 * x if self.other else x).flip(-1)
            y = y + self.direction(1, back, z.flip(-1)).flip(-1)
        return self.leave(y.mT)


class GatedCross(Cross):
    """Its merged scans multiplied by a gate before anything else."""

    def __init__(self, orders):
        super().__init__(orders)
        self.gate, own = nn.Linear(CHANNELS, CHANNELS), self.leave
        self.leave, self.last = nn.Identity(), own

    def forward(self, x):
        return self.last(super().forward(x) * F.silu(self.gate(x)))


def cross(height, width):
    grid = torch.arange(height * width).view(height, width)
    down, along = grid.flatten(), grid.mT.flatten()
    return down, along, down.flip(0), along.flip(0)


def seen(model, inputs, name, **parts):
    """Implicit of the first layer, what came into its last projection as (batch, channels, tokens), and its name."""
    into = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: into.append(args[0].detach()))
    recorder = MixerRecorder()
    with torch.no_grad(), mamba_attn.trace(model, rules=recorder) as record:
        model(inputs)
        layer = record[0]
        assert isinstance(layer, DoorLayer)
        implicit = Implicit(layer, recorder, **parts)
    handle.remove()
    return implicit, into[0].flatten(1, -2).mT


CASES = {
    "one way": (lambda: Net(Directions(1)), "mixers.0.leave"),
    "both ways": (lambda: Net(Directions()), "mixers.0.leave"),
    "gates behind the scans": (lambda: Net(Directions(fused=False)), "mixers.0.leave"),
    "zeros in front": (lambda: Net(Directions(padded=True)), "mixers.0.leave"),
    "GELU": (lambda: Net(Directions(act=F.gelu)), "mixers.0.leave"),
    "no activation": (lambda: Net(Directions(act=lambda x: x)), "mixers.0.leave"),
    "over a grid": (lambda: Net(Cross(cross), grid=True), "mixers.0.leave"),
    "over a grid, gated": (lambda: Net(GatedCross(cross), grid=True), "mixers.0.last"),
}


@pytest.mark.parametrize("case", CASES)
def test_m_x_plus_constant_is_what_enters_the_last_projection(case):
    make, name = CASES[case]
    implicit, out = seen(make().double().eval(), images(), name)
    found = implicit.apply(implicit.x) + implicit.constant()
    assert float((found - out).abs().max()) < 1e-9 * float(out.abs().max())
    assert float(implicit.constant().abs().max()) > 1e-3 * float(out.abs().max())
    row, column = torch.randn_like(implicit.x), torch.randn_like(implicit.x)
    matrix = implicit.matrix(row, column)
    torch.testing.assert_close((implicit.rows(row) * column).sum(1), matrix.sum(1), rtol=1e-9, atol=1e-9)


class Convolved(small_vim.Vim):
    """Vim as small as it gets, its convolutions modules and its scans at a door."""

    def direction(self, xz, suffix="", A="A_log"):
        x, z = xz.mT.chunk(2, 1)
        u = F.silu(self.get_submodule(f"conv1d{suffix}")(x)[..., : x.shape[-1]])
        weight = self.get_submodule(f"x_proj{suffix}").weight
        step, D = self.get_submodule(f"dt_proj{suffix}"), self.get_parameter(f"D{suffix}")
        low, B, C = (weight @ u).split([self.dt_rank, self.d_state, self.d_state], 1)
        parts = (B.contiguous(), C.contiguous(), D, z, step.bias)
        y = selective_scan_fn(u, step.weight @ low, -torch.exp(self.get_parameter(A)), *parts, delta_softplus=True)
        return y.mT


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("marks", [{}, {"bimamba_type": "v2"}])
def test_maps_at_doors_are_those_of_the_adapter(monkeypatch, marks, gradient):
    mixers = [Convolved(CHANNELS, marks=marks or {"none": 0}) for _ in range(2)]
    model, x = Net(*mixers).double().eval(), images()
    method = ImplicitAttention(model, gradient=gradient)
    calls = [
        lambda: method.attribute(x, target=1, grid=True),
        lambda: ImplicitAttention(model, gradient=gradient, gate=False).attribute(x, target=1, grid=True),
        lambda: ImplicitAttention(model, gradient=gradient, rollout=False).attribute(x, target=1, pixel=(3, 9)),
    ]
    expected = [call() for call in calls]
    monkeypatch.setattr("mamba_attn.tracing.traceable.find_mixers", lambda *_: {})
    for call, its in zip(calls, expected, strict=True):
        found = call()
        assert float((found - its).abs().max()) < 1e-9 * float(its.abs().max())


def test_what_was_not_seen_is_named():
    refused = (
        (Line(), "mixers.0.forth was traced at the scan's door, and no depthwise convolution .* of 0 before it"),
        (Directions(act=torch.tanh), "mixers.0 was .* no depthwise convolution .* of 2 before it"),
        (Directions(other=True), "mixers.0 receive different tokens"),
    )
    for mixer, sentence in refused:
        with pytest.raises(UnsupportedModelError, match=sentence):
            ImplicitAttention(Net(mixer).double().eval()).attribute(images(), target=0)


def test_a_pass_that_is_looked_at_leaves_values_and_gradients_alone():
    model, x = Net(Directions(), GatedCross(cross)).double().eval(), images()
    model.mixers[1].forward = lambda t, own=model.mixers[1].forward: own(t.unflatten(1, GRID)).flatten(1, 2)
    expected = torch.autograd.grad(model(x)[:, 1].sum(), list(model.parameters()))
    with mamba_attn.trace(model, rules=MixerRecorder()):
        logits = model(x)
        found = torch.autograd.grad(logits[:, 1].sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
