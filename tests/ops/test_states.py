"""States of a scan: the specification's, on every backend, and what they give with C and D."""

import pytest
import torch

from mamba_attn import models, ops, trace
from mamba_attn.errors import MatrixTooLargeError, NonFiniteError
from mamba_attn.ops import dispatch, reference, states
from tests.ops.bounds import assert_within, magnitude
from tests.ops.cases import CASES, Case, double, make

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
BACKENDS = [
    ("native", torch.float32, 1e-6),
    ("blocked", torch.float32, 1e-5),
    ("blocked", torch.float64, 1e-13),
    ("reference", torch.float64, 1e-13),
]
backends = pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS, ids=lambda x: str(x))


@cases
@backends
def test_states_equal_the_reference(case, backend, dtype, tolerance):
    record = make(case, dtype)
    found = ops.scan_states(record, backend=backend)
    truth, bound = (reference.states(each) for each in (double(record), magnitude(double(record))))
    assert found.dtype == dtype
    assert_within(found, truth, bound, tolerance)


@cases
def test_states_with_c_and_d_are_the_scans_output(case):
    record = make(case, torch.float64)
    C = record.C.repeat_interleave(record.channels // record.source_B.shape[2], dim=2)
    y = (C * ops.scan_states(record)).sum(3)
    if record.D is not None:
        y = y + record.D.unsqueeze(-1) * record.u
    truth, bound = (reference.selective_scan(each) for each in (record, magnitude(record)))
    assert_within(y, truth, bound, 1e-13)
    merged = reference.merge_tokens(record, y)
    torch.testing.assert_close(merged, ops.selective_scan(record), rtol=1e-11, atol=1e-11)


@cases
def test_some_routes_and_channels_are_those_of_all(case):
    record = make(case, torch.float64)
    every = ops.scan_states(record)
    channels = [record.channels - 1, 0, record.channels // 2]
    found = ops.scan_states(record, routes=[record.routes - 1, 0], channels=channels)
    torch.testing.assert_close(found, every[:, [record.routes - 1, 0]][:, :, channels], rtol=1e-12, atol=1e-12)
    alone = ops.scan_states(record, routes=0, channels=record.channels - 1)
    torch.testing.assert_close(alone, every[:, :1, -1:], rtol=1e-12, atol=1e-12)


def test_what_was_not_asked_for_is_not_computed():
    record = make(Case(routes=2, channels=6, heads=3, groups=3, states=2))
    truth = reference.states(double(record))
    spoilt = record.replace(source_u=record.source_u.clone(), source_B=record.source_B.clone())
    spoilt.source_u[:, 1], spoilt.source_u[:, 0, :4] = float("nan"), float("nan")
    spoilt.source_B[:, :, :2] = float("nan")
    found = ops.scan_states(spoilt, routes=0, channels=[5, 4])
    torch.testing.assert_close(found.double(), truth[:, :1, [5, 4]], rtol=1e-5, atol=1e-6)
    assert not bool(ops.scan_states(spoilt, routes=0, channels=[3]).isfinite().any())


@pytest.mark.parametrize("backend", ["native", "blocked"])
def test_channel_blocks_change_nothing(monkeypatch, backend):
    record = make(Case(routes=2, channels=7, states=3, grid=(3, 5)))
    whole = ops.scan_states(record, backend=backend)
    monkeypatch.setattr(states, "_WORKSPACE", 2 * record.batch * record.states * record.length)
    torch.testing.assert_close(ops.scan_states(record, backend=backend), whole, rtol=1e-6, atol=1e-6)
    leaf = record.replace(source_u=record.source_u.requires_grad_())
    found = ops.scan_states(leaf, backend=backend)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.square().sum(), leaf.source_u)
    monkeypatch.undo()
    (truth,) = torch.autograd.grad(reference.states(double(leaf)).square().sum(), leaf.source_u)
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)


def test_plain_tensors_with_and_without_routes():
    record = make(Case(routes=2, channels=4, states=3, grid=(2, 5)), torch.float64)
    truth = reference.states(record)
    tensors = record.u, record.delta, record.A, record.B[:, :, 0]
    torch.testing.assert_close(ops.scan_states(*tensors), truth, rtol=1e-12, atol=1e-12)
    one = record.u[:, 1], record.delta[:, 1], record.A[1], record.B[:, 1, 0]
    torch.testing.assert_close(ops.scan_states(*one, channels=[2]), truth[:, 1, 2:3], rtol=1e-12, atol=1e-12)


def test_gradcheck():
    record = make(Case(batch=1, routes=1, channels=2, states=2, grid=(2, 3)), torch.float64)
    names = ("source_u", "source_delta", "A", "source_B")
    values = [getattr(record, name).clone().requires_grad_() for name in names]

    def run(*given):
        own = record.replace(**dict(zip(names, given, strict=True)))
        return ops.scan_states(own, channels=[1], backend="blocked")

    assert torch.autograd.gradcheck(run, values)


def test_extremes():
    for scale in (0.0, 1e-6, 1e3):
        record = make(Case(routes=1, channels=3, states=2, grid=(4, 4)))
        own = record.replace(source_delta=torch.full_like(record.source_delta, scale))
        found = ops.scan_states(own)
        assert bool(found.isfinite().all())
        if scale == 0.0:
            assert not found.any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"routes": 2}, r"scan_states\(ScanRecord.*: routes=2: 2 must be an integer in 0..1"),
        ({"routes": [0, -1]}, r"routes=\[0, -1\]: -1 must be an integer in 0..1"),
        ({"channels": [4, 5]}, r"5 must be an integer in 0..4"),
        ({"channels": True}, r"True must be an integer"),
        ({"channels": []}, r"channels=\[\] is empty; leave it out for all 5"),
        ({"backend": "magic"}, r"backend='magic' is not one of"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.scan_states(make(Case()), **options)


def test_refusals_of_tensors():
    record = make(Case(routes=1))
    with pytest.raises(TypeError, match="the record already holds delta, B; leave them out"):
        ops.scan_states(record, record.delta, B=record.B)
    with pytest.raises(TypeError, match="scan_states: delta must be a floating-point tensor, got NoneType"):
        ops.scan_states(record.u)
    with pytest.raises(TypeError, match="B must be a floating-point tensor"):
        ops.scan_states(record.u, record.delta, record.A)
    with pytest.raises(ValueError, match="B does not agree with delta"):
        ops.scan_states(record.u, record.delta, record.A, record.B[..., :-1])


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(dispatch, "_UNASKED", 0)
    monkeypatch.setattr(dispatch, "free_bytes", lambda device: 1000)
    record = make(Case())
    with pytest.raises(MatrixTooLargeError, match=r"the states \(2, 2, 5, 3, 15\).*Choose fewer routes= or channels="):
        ops.scan_states(record)
    assert ops.scan_states(record, routes=0, channels=0).shape == (2, 1, 1, 3, 15)


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_states_of_a_traced_layer(order):
    model = models.create("vim_micro", image_size=(24, 40), patch_size=8, embed_dim=8, depth=1, d_state=3, order=order)
    with torch.no_grad(), trace(model) as record:
        model(torch.randn(2, 3, 24, 40))
    layer = record.layers[0]
    truth = reference.states(double(layer.scan))
    for route in range(layer.scan.routes):
        found = layer.states(route, [3, 1])
        assert found.shape == (2, 2, 3, 16)
        torch.testing.assert_close(found.double(), truth[:, route, [3, 1]], rtol=1e-4, atol=1e-6)
    assert layer.states(1).shape == (2, layer.scan.channels, 3, 16)
    with pytest.raises(ValueError, match=r"routes=2: 2 must be an integer in 0..1"):
        layer.states(2)


def test_states_of_a_layer_with_nan_are_refused():
    model = models.create("vim_micro", image_size=(24, 40), patch_size=8, embed_dim=8, depth=1)
    with torch.no_grad(), trace(model) as record:
        model(torch.full((1, 3, 24, 40), float("nan")))
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mixer: .* contain NaN or Inf"):
        record.layers[0].states()
