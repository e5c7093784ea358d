"""Mamba-2's chunk scans seen at their doors, with heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamba_attn
from mamba_attn import attribution, ops
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.stand_ins import ssd
from mamba_attn.testing import _by_matrices
from tests.tracing.foreign import CHANNELS, Line, Net, selective_scan_fn

with mamba_attn.cpu_stand_ins():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

GRID, TOKENS, STATES = (4, 5), 20, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Mamba2(nn.Module):
    """A mixer of Mamba-2 with its parts' names: one fused call, or a convolution and a scan; both ways if asked."""

    def __init__(self, heads=4, groups=2, fused=True, normed=True, ways=1, **options):
        super().__init__()
        self.heads, self.groups, self.fused, self.ways, self.options = heads, groups, fused, ways, options
        self.inner = 2 * CHANNELS
        wide = self.inner + 2 * groups * STATES
        self.in_proj = nn.Linear(CHANNELS, self.inner + wide + heads)
        self.conv1d = nn.Conv1d(wide, wide, 3, padding=2, groups=wide)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.randn(heads) / 2) for _ in range(3))
        self.norm = nn.Parameter(torch.rand(self.inner)) if normed else None
        self.out_proj = nn.Linear(self.inner, CHANNELS)

    def way(self, row):
        A, width = -torch.exp(self.A_log), self.inner // self.heads
        if self.fused:
            return mamba_split_conv1d_scan_combined(
                row, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, A, self.D, 8, headdim=width,
                rmsnorm_weight=self.norm, outproj_weight=self.out_proj.weight, outproj_bias=self.out_proj.bias,
                ngroups=self.groups, **self.options,
            )  # fmt: skip
        z, xBC, dt = row.split([self.inner, self.inner + 2 * self.groups * STATES, self.heads], -1)
        xBC = F.silu(self.conv1d(xBC.mT)[..., : row.shape[1]]).mT
        x, B, C = xBC.split([self.inner, self.groups * STATES, self.groups * STATES], -1)
        y = mamba_chunk_scan_combined(
            x.unflatten(-1, (self.heads, -1)), dt, A, B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)), 8, self.D, z.unflatten(-1, (self.heads, -1)), self.dt_bias,
            dt_softplus=True, **self.options,
        )  # fmt: skip
        return self.out_proj(y.flatten(2))

    def forward(self, x):
        row = self.in_proj(x)
        y = self.way(row)
        return y if self.ways == 1 else y + self.way(row.flip(1)).flip(1)


class Spread(Mamba2):
    """The same through a selective scan, with every head's step and decay spelt out for its channels."""

    def way(self, row):
        each = self.inner // self.heads
        z, xBC, dt = row.split([self.inner, self.inner + 2 * self.groups * STATES, self.heads], -1)
        xBC = F.silu(self.conv1d(xBC.mT)[..., : row.shape[1]])
        x, B, C = xBC.split([self.inner, self.groups * STATES, self.groups * STATES], 1)
        A = -torch.exp(self.A_log).repeat_interleave(each)[:, None].expand(-1, STATES)
        B, C = (t.unflatten(1, (self.groups, STATES)).contiguous() for t in (B, C))
        delta, D, bias = (t.repeat_interleave(each, axis) for t, axis in ((dt.mT, 1), (self.D, 0), (self.dt_bias, 0)))
        y = selective_scan_fn(x.contiguous(), delta.contiguous(), A, B, C, D, z.mT, bias, delta_softplus=True)
        return self.out_proj(y.mT)


KINDS = {
    "fused, normed": {}, "fused, gated": {"normed": False}, "apart": {"fused": False},
    "limits": {"fused": False, "dt_limit": (0.3, 0.8)}, "both ways": {"ways": 2, "fused": False},
    "one group": {"groups": 1},
}  # fmt: skip


class CrossHeads(nn.Module):
    """As VMamba's m0: four ways over the grid side by side in one scan, as groups of heads."""

    def __init__(self, heads=2):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.project = nn.Parameter(torch.randn(4, heads + 2 * STATES, CHANNELS) / 2)
        self.A_logs, self.dt_projs_bias = (nn.Parameter(torch.randn(4, heads) / 2) for _ in range(2))
        self.Ds = nn.Parameter(torch.randn(4, heads, CHANNELS // heads))
        self.heads = heads

    def forward(self, x):
        orders, heads = orders_of(*x.shape[1:3]), self.heads
        u = self.enter(x).flatten(1, 2)[:, orders.T]  # (batch, length, ways, channels)
        dt, B, C = torch.einsum("blkc,kdc->blkd", u, self.project).split([heads, STATES, STATES], -1)
        y, _ = mamba_chunk_scan_combined(
            u.reshape(*u.shape[:2], 4 * heads, -1), dt.flatten(2), -torch.exp(self.A_logs).flatten(), B, C, 8,
            D=self.Ds.flatten(0, 1), dt_bias=self.dt_projs_bias.flatten(), dt_softplus=True, return_final_states=True,
        )  # fmt: skip
        y = y.reshape(*u.shape[:2], 4, -1)
        merged = sum(torch.zeros_like(y[:, :, 0]).index_copy(1, order, y[:, :, k]) for k, order in enumerate(orders))
        return self.leave(merged).unflatten(1, x.shape[1:3])


class Strict(Mamba2):
    """As Hydra: both ways in one batch, every step's output moved on by one token, a skip outside the scan."""

    def __init__(self, shift=1):
        super().__init__(fused=False, groups=1)
        self.same = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.shift = shift

    def forward(self, x):
        rows = self.in_proj(self.same(x.mT).mT)
        z, xBC, dt = rows.split([self.inner, self.inner + 2 * self.groups * STATES, self.heads], -1)
        xBC, dt = (torch.cat([t, t.flip(1)]) for t in (xBC, dt))
        u, B, C = xBC.split([self.inner, self.groups * STATES, self.groups * STATES], -1)
        y = mamba_chunk_scan_combined(
            u.unflatten(-1, (self.heads, -1)), dt, -torch.exp(self.A_log), B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)), 8, dt_bias=self.dt_bias, dt_softplus=True,
        ).flatten(2)  # fmt: skip
        y = F.pad(y, (0, 0, self.shift, 0))[:, : y.shape[1]]
        return self.out_proj((y[: len(x)] + y[len(x) :].flip(1) + u[: len(x)]) * F.silu(z))


def orders_of(height, width):
    rows = torch.arange(height * width)
    ways = torch.stack([rows, rows.view(height, width).T.flatten()])
    return torch.cat([ways, ways.flip(1)])


def images(batch=2):
    return torch.randn(batch, 3, 16, 20)


def forth():
    return torch.arange(TOKENS)[None]


@pytest.mark.parametrize("kind", KINDS)
def test_laws_1_and_12_and_the_heads(kind):
    model, x = Net(Mamba2(**KINDS[kind]), Mamba2(**KINDS[kind])).eval(), images(3)
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            assert torch.equal(model(x), plain)
    assert list(trace) == ["mixers.0", "mixers.1"]
    for layer in trace.layers:
        scan = layer.scan
        assert (scan.batch, scan.channels, scan.heads, scan.states) == (3, 2 * CHANNELS, 4, STATES)
        order = torch.cat([forth(), forth().flip(1)])[: KINDS[kind].get("ways", 1)]
        assert torch.equal(scan.write_order, order)
        y = _by_matrices(scan, torch.arange(scan.channels))
        assert float((y - layer.y.double()).abs().max() / layer.y.double().abs().max()) < 2e-6
        assert layer.layout.grid == GRID
        assert layer.share > 0.9


@pytest.mark.parametrize("shift", [0, 1])
def test_steps_that_write_the_token_after_their_own(shift):
    model, x = Net(Strict(shift), Strict(shift)).eval(), images()
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            assert torch.equal(model(x), plain)
    for layer in trace.layers:
        assert layer.tokens == TOKENS
        assert torch.equal(layer.scan.read_order, torch.cat([forth(), forth().flip(1)]))
        assert bool((layer.scan.write_order < 0).any()) == bool(shift)
        each = ops.hidden_attention(layer.scan_frame, fold="each")
        there, back = F.pad(each, (0, 0, shift, 0))[..., :TOKENS, :].chunk(2)
        matrix = layer.attention("each")
        torch.testing.assert_close(matrix, there + back.flip(-1, -2), rtol=1e-5, atol=1e-6)
        assert bool((matrix.diagonal(dim1=-2, dim2=-1) == 0).all()) == bool(shift)
        y = _by_matrices(layer.scan, torch.arange(layer.scan.channels))
        assert float((y - layer.y.double()).abs().max() / layer.y.double().abs().max()) < 2e-6
    with torch.no_grad(), mamba_attn.trace(model, attention="mean") as ready:
        model(x)
    torch.testing.assert_close(ready.layers[0].attention(), trace.layers[0].attention(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:trace. mixers.0 .CrossHeads, family VMamba.. this adapter cannot compute it")
def test_ways_that_stand_side_by_side_as_groups_of_heads_are_routes():
    model, x = Net(CrossHeads(), CrossHeads(), grid=True).eval(), images(3)
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            assert torch.equal(model(x), plain)
    for layer in trace.layers:
        scan = layer.scan
        assert (scan.channels, scan.heads, scan.layout.grid) == (CHANNELS, 2, GRID)
        assert torch.equal(scan.write_order, orders_of(*GRID))
        y = _by_matrices(scan, torch.arange(scan.channels))
        assert float((y - layer.y.double()).abs().max() / layer.y.double().abs().max()) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_scans_output(kind, monkeypatch):
    """Truth: a zero that is added to the scan's output, differentiated."""
    model, x = Net(Mamba2(**KINDS[kind])).double().eval(), images().double()
    with mamba_attn.trace(model) as trace:
        logits = model(x)
    found = trace.gradients(logits[:, 2].sum())["mixers.0"]
    zeros, width = [], 2 * CHANNELS // 4

    def plain(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, *rest, dt_softplus=True, **options):
        y, _, _ = ssd._scan(x, dt, A, B, C, D, None, dt_bias, None, dt_softplus, options.get("dt_limit", ssd.NO_LIMIT))
        zeros.append(torch.zeros_like(y, requires_grad=True))
        y = y + zeros[-1]
        y = y if z is None else y * F.silu(z)
        return (y, None) if options.get("return_final_states") else y

    monkeypatch.setattr(ssd, "mamba_chunk_scan_combined", plain)
    monkeypatch.setattr("tests.tracing.test_chunk_doors.mamba_chunk_scan_combined", plain)
    (expected, *other) = torch.autograd.grad(model(x)[:, 2].sum(), zeros)
    assert expected.shape == (2, TOKENS, 4, width)
    torch.testing.assert_close(found, expected.flatten(2).mT, rtol=1e-9, atol=1e-12)
    for back in other:
        torch.testing.assert_close(found, back.flip(1).flatten(2).mT, rtol=1e-9, atol=1e-12)


def test_training_is_not_changed_by_a_trace():
    model, x = Net(Mamba2(), Line()).eval(), images()
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    with mamba_attn.trace(model, attention="mean"):
        found = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_methods_run_but_one_that_looks_into_mixers():
    model, x = Net(Mamba2(), Mamba2(ways=2, fused=False)).eval(), images()
    for method in (attribution.RawAttention, attribution.AttentionRollout, attribution.MambaAttribution):
        assert method(model).attribute(x, target=1).shape == (2, 1, 16, 20)
    with pytest.raises(UnsupportedModelError, match=r"mixers\.0 was .* its scan shares step sizes"):
        attribution.ImplicitAttention(model).attribute(x, target=1)


def test_tensors_of_a_subclass_are_read_as_plain_ones():
    """As VSSD's, which counts operations by one."""

    class Counted(torch.Tensor):
        pass

    class Wrapped(Mamba2):
        def way(self, row):
            return super().way(row.as_subclass(Counted)).as_subclass(torch.Tensor)

    model = Net(Wrapped(fused=False)).eval()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images())
    layer = trace.layers[0]
    assert type(layer.attention()) is type(layer.y) is torch.Tensor
    truth = layer.attention()[:, 3]
    torch.testing.assert_close(layer.row(3), truth, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        layer.left_product(F.one_hot(torch.tensor([3, 3]), TOKENS).float(), residual=False), truth
    )


def test_states_from_outside_are_refused_by_name():
    mixer = Mamba2(fused=False, initial_states=torch.zeros(2, 4, 2 * CHANNELS // 4, STATES))
    with (
        pytest.raises(UnsupportedModelError, match=r"mixers\.0: its chunk scan is called with initial_states, so that"),
        mamba_attn.trace(Net(mixer).eval()) as trace,
    ):
        trace._doors.model(images())
