"""Scans seen at their doors: whatever code stands around them, what is recorded is what ran."""

import sys
import threading
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mamba_attn
from mamba_attn import attribution, orders
from mamba_attn.attribution.activation_recorder import ActivationRecorder
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.testing import _by_matrices
from mamba_attn.tracing import doors, frames, reachable, steps
from mamba_attn.tracing.selective_scans import scan_inputs
from tests.integrations import small_vim
from tests.leaks import state_of
from tests.tracing import foreign
from tests.tracing.foreign import Both, Cascade, Cross, Line, Net, Shuffled, Windows

GRID = (4, 5)
TOKENS = 20


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(batch=2):
    return torch.randn(batch, 3, 16, 20)


def cross(height, width):
    return orders.cross("raster", height, width)


def traced(model, x, **options):
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


def law_1(layer):
    """Matrices times inputs, plus D u, against what the scans themselves put out."""
    y = _by_matrices(layer.scan, torch.arange(layer.scan.channels))
    return float((y - layer.y.double()).abs().max() / layer.y.double().abs().max())


def order_of(trace, name="mixers.0.mixer.forth"):
    return trace[name].scan.write_order


def forth(tokens=TOKENS):
    return torch.arange(tokens)[None]


MODELS = {
    "line": (lambda: Net(Line(), Line()), {"mixers.0.forth": forth(), "mixers.0.back": forth().flip(1)}),
    "two scans of a module": (lambda: Net(Both()), {"mixers.0": orders.both_ways(forth()[0])}),
    "cross": (lambda: Net(Cross(cross), Cross(cross), grid=True), {"mixers.1": cross(*GRID)}),
    "flips around every second block": (
        lambda: Net(Line(), Line(), flips=True),
        {"mixers.0.forth": forth(), "mixers.1.forth": forth().flip(1), "mixers.1.back": forth()},
    ),
    "a permutation in the parent": (
        lambda: Net(Shuffled(orders.hilbert(*GRID))), {"mixers.0.mixer.forth": orders.hilbert(*GRID)[None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_laws_1_and_12_the_matrices_are_the_scans_and_the_orders_those_of_the_code(case):
    make, declared = MODELS[case]
    model = make().eval()
    x = images()
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            assert torch.equal(model(x), plain)
    for name, order in declared.items():
        assert torch.equal(trace[name].scan.write_order, order), name
        assert trace[name].share > 0.9
        assert trace[name].layout.grid == GRID
    assert max(law_1(layer) for layer in trace.layers) < 2e-6


def test_windows_with_padding_are_routes_of_an_image():
    trace = traced(Net(Windows()).eval(), images())
    scan = trace["mixers.0.mixer.forth"].scan
    assert scan.tokens == TOKENS + 7  # the most that one window has of padding that the scan takes in
    assert (scan.batch, scan.routes, scan.length) == (2, 4, 9)
    cells = torch.full((6, 6), -1)
    cells[:4, :5] = torch.arange(20).view(4, 5)
    expected = cells.view(2, 3, 2, 3).movedim(2, 1).reshape(4, 9)
    inside = expected >= 0
    assert torch.equal(scan.write_order[inside], expected[inside])
    assert bool((scan.write_order[~inside] >= TOKENS).all())
    layer = trace["mixers.0.mixer.forth"]
    assert layer.layout.to_grid(layer.row(7)).shape == (2, *GRID)
    assert law_1(layer) < 2e-6


def test_rows_of_a_batch_of_five_are_laid_as_those_of_two():
    model = Net(Windows()).eval()
    few, many = traced(model, images()), traced(model, images(5))
    a, b = few["mixers.0.mixer.forth"].scan, many["mixers.0.mixer.forth"].scan
    assert b.batch == 5
    assert torch.equal(a.write_order, b.write_order)
    assert law_1(many["mixers.0.mixer.back"]) < 2e-6


class Scanned(small_vim.Mamba):
    """Mamba's slow path through the package's scan, as an adapter knows it."""

    def scanned(self, u, projected, suffix, A):
        low, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], -1)
        step = self.get_submodule(f"dt_proj{suffix}")
        given = (-torch.exp(A), B.mT, C.mT, self.get_parameter(f"D{suffix}"), None, step.bias)
        return foreign.selective_scan_fn(u.mT, (low @ step.weight.T).mT, *given, delta_softplus=True).mT


def test_law_11_a_mixer_at_its_door_and_through_its_adapter(monkeypatch):
    model = Net(Scanned(foreign.CHANNELS, fast=False), Scanned(foreign.CHANNELS, fast=False)).eval()
    x, found = images(), []
    for known in (True, False):
        if not known:
            monkeypatch.setattr("mamba_attn.tracing.traceable.find_mixers", lambda *_: {})
        with mamba_attn.trace(model) as trace:
            logits = model(x)
        found.append((trace, trace.gradients(logits[:, 1].sum())))
    (adapted, expected), (at_doors, gradients) = found
    assert list(at_doors) == list(adapted)
    assert not any(hasattr(layer, "share") for layer in adapted.layers)
    for name in adapted:
        assert torch.equal(at_doors[name].scan.read_order, adapted[name].scan.read_order)
        for fold in ("mean", "absolute"):
            a, b = (trace[name].attention(fold) for trace in (at_doors, adapted))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", MODELS)
def test_gradients_are_those_of_the_scans_outputs(case):
    """Truth: how the logit moves when the scans' outputs are moved."""
    model = MODELS[case][0]().double().eval()
    x = images().double()
    with mamba_attn.trace(model) as trace:
        logits = model(x)
    gradients = trace.gradients(logits[:, 2].sum())
    assert all(p.grad is None for p in model.parameters())
    name = next(iter(trace))
    layer = trace[name]
    moved = torch.randn_like(layer.y)
    own, size = doors._forward, 1e-5

    def nudged(sign, done, door, *args):
        out, *rest = own(door, *args)
        call = layer.calls[len(done)] if len(done) < len(layer.calls) else None
        done.append(call)
        if call is None:
            return [out, *rest]
        order = layer.scan.write_order[len(done) - 1 if len(layer.calls) > 1 else slice(None)].view(-1, out.shape[-1])
        extra = moved[..., order].movedim(2, 1).reshape(out.shape) * sign * size
        gate = None if call.inputs.z is None else torch.nn.functional.silu(call.inputs.z)
        return [out + extra, rest[0], *([rest[1] + extra * gate] if gate is not None else [])]

    found = []
    for sign in (1.0, -1.0):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setitem(doors._SCAN, "fwd", partial(nudged, sign, []))
            with mamba_attn.trace(model):
                found.append(model(x)[:, 2].sum())
    expected = (found[0] - found[1]) / (2 * size) / layer.scan.routes  # each route was moved
    torch.testing.assert_close((gradients[name] * moved).sum(), expected, rtol=1e-5, atol=1e-9)
    assert gradients[name].shape == layer.y.shape


def test_an_attention_that_was_asked_for_is_computed_in_the_scans_place():
    for make, _ in MODELS.values():
        model = make().eval()
        x = images()
        with torch.no_grad():
            plain = model(x)
            with mamba_attn.trace(model, attention="mean") as trace:
                torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-6)
        again = traced(model, x)
        for name in trace:
            torch.testing.assert_close(trace[name].attention(), again[name].attention(), rtol=1e-5, atol=1e-7)
            assert "mean" in trace[name]._ready


def test_backward_runs_through_a_replaced_scan():
    model, x = Net(Line(), Both()).eval(), images()
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with mamba_attn.trace(model, attention="sum"):
        found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_scans_that_depend_on_each_other_are_several_layers():
    trace = traced(Net(Both(serial=True)).eval(), images())
    assert list(trace) == ["mixers.0", "mixers.0#2"]
    assert trace["mixers.0"].scan.routes == 1


def test_a_scan_that_feeds_another_in_its_module_is_placed_by_the_norm_between_them():
    first, second = traced(Net(Cascade(), grid=True).eval(), images()).layers
    raster = torch.arange(20).view(4, 5)
    assert [layer.layout.grid for layer in (first, second)] == [(4, 5)] * 2
    assert torch.equal(first.scan.write_order, raster)
    assert torch.equal(second.scan.write_order, raster.T)


def test_a_module_that_runs_twice_is_two_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Line(both=False)

        def forward(self, x):
            return self.one(x) + self.one(x.flip(1)).flip(1)

    trace = traced(Net(Twice()).eval(), images())
    assert list(trace) == ["mixers.0.one.forth", "mixers.0.one.forth#2"]
    assert torch.equal(trace["mixers.0.one.forth#2"].scan.write_order, forth().flip(1))


def test_a_second_forward_pass_is_refused():
    model = Net(Line()).eval()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images())
        model(images())
    with pytest.raises(TraceError, match=r"mixers\.0\.forth ran twice inside one trace"):
        trace["mixers.0.forth"]


def test_measuring_leaves_the_model_and_the_generators_as_they_were():
    model = Net(Line(), Both())
    model.register_buffer("seen", torch.zeros(3))
    model.stem.weight.requires_grad_(False)
    model.norms[0].eval()
    x = images()
    model(x).sum().backward()
    before = {name: state_of(module) for name, module in model.named_modules()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    trace = traced(model, x)
    state = torch.get_rng_state()
    assert trace["mixers.1"].scan.routes == 2
    assert torch.equal(state, torch.get_rng_state())
    for name, module in model.named_modules():
        assert (
            differences({"": before[name]}, {"": state_of(module)}) == [] if False else state_of(module) == before[name]
        )
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert foreign.selective_scan_cuda_oflex.fwd.__name__ == "oflex_fwd"


def test_orders_are_measured_once_and_again_when_the_model_runs_otherwise(monkeypatch):
    count = []
    own = frames.measure
    monkeypatch.setattr(steps, "measure", lambda *a: count.append(1) or own(*a))
    mixer = Shuffled(orders.hilbert(*GRID))
    model = Net(mixer).eval()
    for batch in (2, 2, 3, 7):
        order_of(traced(model, images(batch)))
    assert len(count) == 1
    with torch.no_grad():
        model.stem.weight.mul_(2)  # one weighted gradient says that the order still holds
    order_of(traced(model, images()))
    assert len(count) == 1
    mixer.order = orders.spiral(*GRID)
    with torch.no_grad():
        model.stem.weight.mul_(2)
    assert torch.equal(order_of(traced(model, images()))[0], orders.spiral(*GRID))
    assert len(count) == 2


def test_threads_see_their_own_scans_and_doors_close_in_any_order():
    first, second = Net(Line()).eval(), Net(Line(), Line()).eval()
    own = foreign.selective_scan_cuda_oflex.fwd
    entered, leave = threading.Event(), threading.Event()
    found = []

    def other():
        with torch.no_grad(), mamba_attn.trace(second) as trace:
            entered.set()
            leave.wait(30)
            second(images())
            first(images())
        found.append(len(trace._doors.watch.calls))

    thread = threading.Thread(target=other)
    with torch.no_grad(), mamba_attn.trace(first) as trace:
        thread.start()
        assert entered.wait(30)
        first(images())
        second(images())
    leave.set()
    thread.join()
    assert len(trace._doors.watch.calls) == 2
    assert found == [4]
    assert foreign.selective_scan_cuda_oflex.fwd is own


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_repeats_no_layer(inside):
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = Line()

        def forward(self, x):
            return checkpoint(self.line, x, use_reentrant=False)

    plain, saved = Line(), Saved()
    saved.line.load_state_dict(plain.state_dict())
    one, other = Net(plain).eval(), Net(saved).eval()
    other.load_state_dict({k.replace("mixers.0", "mixers.0.line"): v for k, v in one.state_dict().items()})
    x, found = images(), []
    for model in (one, other):
        with mamba_attn.trace(model) as trace:
            logits = model(x)
            gradients = trace.gradients(logits[:, 0].sum()) if inside else None
        gradients = gradients or trace.gradients(logits[:, 0].sum())
        assert len(trace) == 2
        found.append(list(gradients.values()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_an_order_that_cannot_be_measured_is_refused_and_can_be_given():
    class Blind(nn.Module):
        """Every token goes to every token behind the scan."""

        def __init__(self):
            super().__init__()
            self.scan, self.spread = foreign.Scan(gated=False), nn.Parameter(torch.randn(TOKENS, TOKENS))

        def forward(self, x):
            return (self.scan(x.mT) @ self.spread).mT

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.spread = nn.Parameter(-torch.rand(6, 3)), nn.Parameter(torch.randn(TOKENS, TOKENS))
            self.project = nn.Linear(6, 12)

        def forward(self, x):
            delta, B, C = self.project(x).mT.split([6, 3, 3], 1)
            y = foreign.selective_scan_fn(
                x.mT, delta, self.A - 0.1, B.contiguous(), C.contiguous(), None, None, None, True
            )
            return (y @ self.spread).mT

    x = images()
    trace = traced(Net(Inner()).eval(), x)
    with pytest.raises(TraceError, match=r"no tensor in the forward pass in which each of its steps answers to one"):
        order_of(trace, "mixers.0")
    assert trace["mixers.0"].scan_frame.length == TOKENS
    for given in (forth(), {"mixers.*": forth()}, lambda name, routes, length: forth(length)):
        layer = traced(Net(Inner()).eval(), x, orders=given)["mixers.0"]
        assert law_1(layer) < 2e-6
    with pytest.raises(ValueError, match=r"mixers.0 has 1 routes of 20 steps .* got torch.int64 \(1, 19\)"):
        order_of(traced(Net(Inner()).eval(), x, orders=forth(19)), "mixers.0")
    assert traced(Net(Blind()).eval(), x)["mixers.0.scan"].scan.tokens == TOKENS  # its own output shows it


def test_another_layout_can_be_given():
    layout = mamba_attn.TokenLayout(grid=(2, 10), patch_size=2)
    for given in (layout, {"mixers.*": layout}, lambda name, tokens: layout):
        assert traced(Net(Line()).eval(), images(), layout=given)["mixers.0.back"].layout == layout


def test_one_order_for_each_image():
    mixer = Shuffled(sort=True)
    model, x = Net(mixer).eval(), images()
    seen = []
    with torch.no_grad():
        mixer.register_forward_pre_hook(lambda m, args: seen.append(m.given(args[0])))
        model(x)
    layer = traced(model, x)["mixers.0.mixer.forth"]
    assert torch.equal(layer.scan.write_order[:, 0], seen[0])
    assert law_1(layer) < 2e-6
    alone = [order_of(traced(model, image[None])).tolist() for image in x]
    assert alone == [[order] for order in seen[0].tolist()]  # not that of the image before


def test_scans_of_other_names_and_signatures():
    """An extension under another name is a door; one that takes other arguments is another recurrence."""
    own = foreign.selective_scan_cuda_oflex

    def module(name, fwd, bwd):
        made = types.ModuleType(name)
        made.fwd, made.bwd = fwd, bwd
        return made

    named = module("selective_scan_vmamba_pt202", own.fwd, own.bwd)
    holder = types.ModuleType("holder_of_a_scan")
    holder.scans = named
    sys.modules["holder_of_a_scan"] = holder
    try:
        assert named in reachable.compiled_scans()
    finally:
        del sys.modules["holder_of_a_scan"]
    other = module("selective_scan_cuda_oflex_rh", lambda u, delta, A, B, D, bias, softplus, n, wide: [u, u], own.bwd)

    class Other(nn.Module):
        def forward(self, x):
            other.fwd(x, x, x, x, None, None, True, 1, True)
            return x

    Other.__module__ = "holder_of_another"
    holder = sys.modules["holder_of_another"] = types.ModuleType("holder_of_another")
    holder.scans = other
    try:
        with pytest.raises(UnsupportedModelError, match=r"selective_scan_cuda_oflex_rh.fwd takes other arguments"):
            traced(Net(Other()).eval(), images())
    finally:
        del sys.modules["holder_of_another"]


def test_rules_that_are_not_known_at_doors_are_refused_there():
    model = Net(Line()).eval()
    with pytest.raises(UnsupportedModelError, match=r"Scan: no adapter recognises this module, and .* use another"):
        with mamba_attn.trace(model, rules=ActivationRecorder()):
            model(images())


def test_a_scan_that_a_module_keeps_is_found():
    """mamba.py imports its scan when a model is built; a stand-in's module is gone by the time it is traced."""

    nowhere = {"__module__": "not_there_any_more"}
    kept = type("Kept", (nn.Module,), nowhere)()
    assert not reachable.reaches_a_door(kept)
    kept.scan = foreign.selective_scan_fn
    assert reachable.reaches_a_door(kept)
    assert reachable.reaches_a_door(type("Gone", (nn.Module,), {**nowhere, "forward": foreign.Scan.forward})())


def test_a_scan_that_takes_a_grid_is_another_recurrence():
    x = torch.ones(2, 6, 20)
    B = torch.ones(2, 1, 3, 20)
    given = (x, x, -torch.ones(6, 3), B, B, None, None, None, True)
    assert scan_inputs(given) is not None
    assert scan_inputs((*given, 4, 5)) is None


def test_methods_that_need_no_rules_run():
    model = Net(Line(), Both()).eval()
    x = images()
    for method in (attribution.RawAttention, attribution.AttentionRollout, attribution.MambaAttribution):
        assert method(model).attribute(x, target=1).shape == (2, 1, 16, 20)
