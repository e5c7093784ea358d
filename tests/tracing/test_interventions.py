"""Entries of matrices removed and matrices replaced, exactly, at adapters and at doors, and nothing left behind."""

import copy
import warnings
from functools import cache

import pytest
import torch

import mamba_attn
from mamba_attn import attribution, knockout, orders, replace_attention
from mamba_attn.errors import TraceError, UnknownLayerError, UnsupportedModelError
from mamba_attn.models import create
from mamba_attn.ops.reference import channel_matrices
from tests.integrations import small_vim
from tests.leaks import global_state, state_of
from tests.tracing import foreign
from tests.tracing.foreign import Cross, Line, Net, Shuffled, Windows
from tests.tracing.test_chunk_doors import Mamba2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def lively(model):
    """Weights with which layers matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("x_proj.weight", "out_proj.weight", "in_proj.weight", "x_proj_weight")):
                parameter.mul_(3)
    return model.eval()


def vim(**options):
    return lively(create("vim_tiny", depth=2, embed_dim=16, d_state=4, image_size=(32, 64), num_classes=5, **options))


def vmamba():
    return lively(create("vmamba_tiny", depths=(1, 1), dims=8, image_size=(32, 48), num_classes=5))


def text():
    """One causal mixer after the other, as a language model's."""
    return torch.nn.Sequential(*(small_vim.Mamba(6) for _ in range(2))).eval()


def cross(height, width):
    return orders.cross("raster", height, width)


CASES = {
    "vim": (lambda: vim().double(), lambda: torch.randn(2, 3, 32, 64, dtype=torch.float64), "layers.0.mixer"),
    "vmamba": (vmamba, lambda: torch.randn(2, 3, 32, 48), "layers.1.blocks.0.op"),
    "line at a door": (lambda: Net(Line(), Line()).eval(), lambda: torch.randn(2, 3, 16, 20), "mixers.1.back"),
    "cross at a door": (lambda: Net(Cross(cross), grid=True).eval(), lambda: torch.randn(2, 3, 16, 20), "mixers.0"),
    "windows at a door": (
        lambda: Net(Windows()).eval(), lambda: torch.randn(2, 3, 16, 20), "mixers.0.mixer.forth",
    ),
    "an order per image": (
        lambda: Net(Shuffled(sort=True)).eval(), lambda: torch.randn(2, 3, 16, 20), "mixers.0.mixer.forth",
    ),
    "chunks at a door": (lambda: Net(Mamba2()).eval(), lambda: torch.randn(2, 3, 16, 20), "mixers.0"),
}  # fmt: skip
ALL = {"rows": None, "columns": None, "routes": None, "channels": None}
CHOSEN = {
    "a column": {"columns": 3},
    "columns of the end": {"columns": [-1, 0, -2]},
    "a row": {"rows": 5},
    "some entries": {"rows": range(2, 6), "columns": [1, 2, 7]},
    "a route": {"columns": torch.tensor([1, 4]), "routes": -1},
    "channels": {"rows": [2, 5], "channels": [0, 3]},
    "all": {},
}


WHOLE = ["vim", "cross at a door"]
FEW = {"cross at a door": ("some entries", "a route", "channels", "all")}
SOME = [
    (kind, chosen) for kind in CASES for chosen in CHOSEN if kind == "vim" or chosen in FEW.get(kind, ("some entries",))
]


@cache
def made(kind):
    """(name, model, images, the layer, the layer in a plain pass, the plain output)."""
    torch.manual_seed(0)
    make, images, name = CASES[kind]
    model, x = make(), images()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), mamba_attn.trace(model) as trace:
        output = model(x)
    return kind, model, x, name, trace[name], output


@pytest.fixture(params=[*WHOLE, "chunks at a door"])
def case(request):
    return made(request.param)


def mask_of(chosen, count, batch=1):
    if isinstance(chosen, torch.Tensor) and chosen.dtype == torch.bool:
        return chosen.expand(batch, count)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(range(count)) if chosen is None else torch.as_tensor(chosen).tolist()] = True
    return mask.expand(batch, count)


@torch.no_grad()
def dense(record, *removed, beyond=None):
    """y in the token frame from explicit float64 matrices, without what is removed."""
    M, u = channel_matrices(record), record.u.double()
    M = M if beyond is None else M.triu(-beyond)
    read, write = (order.expand(record.batch, -1, -1) for order in (record.read_order, record.write_order))
    for entry in removed:
        chosen = ALL | entry
        rows, columns = (mask_of(chosen[k], record.tokens, record.batch)[:, None] for k in ("rows", "columns"))
        rows, columns = (m.expand_as(o[..., :1].expand(-1, -1, record.tokens)).gather(2, o.clamp(min=0))
                         for m, o in ((rows, write), (columns, read)))  # fmt: skip
        gone = (rows[..., None] & columns[:, :, None])[:, :, None]
        gone = gone & mask_of(chosen["routes"], record.routes).view(1, -1, 1, 1, 1)
        M = M.masked_fill(gone & mask_of(chosen["channels"], record.channels).view(1, 1, -1, 1, 1), 0)
    y = (M @ u[..., None])[..., 0]
    if record.D is not None and record.D.ndim == 2:
        y = y + record.D.double()[..., None] * u
    total = u.new_zeros(record.batch, record.channels, record.tokens + 1)
    for r in range(record.routes):
        index = write[:, r].where(write[:, r] >= 0, record.tokens)
        total.scatter_add_(2, index[:, None].expand_as(y[:, r]), y[:, r])
    return total[..., :-1] * record.scale


def close(a, b, tolerance):
    return float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max() + 1e-9)


def run(model, x, **options):
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        output = model(x)
    return trace, output


@pytest.mark.parametrize(("kind", "chosen"), SOME)
def test_what_is_removed_is_what_the_matrices_say(kind, chosen):
    _, model, x, name, plain, output = made(kind)
    removed = CHOSEN[chosen]
    with knockout(model, layers=name, **removed):
        trace, without = run(model, x)
    tolerance = 1e-12 if plain.y.dtype == torch.float64 else 3e-6
    assert close(trace[name].y, dense(plain.scan, removed), tolerance)
    assert torch.equal(trace[name].attention(), plain.attention())  # the model's own
    assert not torch.equal(without, output)
    assert torch.equal(trace.output, without)


def test_nothing_removed_changes_no_bit(case):
    _, model, x, name, _, output = case
    for nothing in ({"columns": []}, {"rows": [], "columns": 3}, {"columns": torch.zeros(1, dtype=torch.bool)}):
        with torch.no_grad(), knockout(model, layers=name, **nothing):
            assert torch.equal(model(x), output)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_more_steps_back_is_removed(kind):
    _, model, x, name, plain, output = made(kind)
    whole = dense(plain.scan)
    bound = 1e-9 if x.dtype == torch.float64 else 3e-6
    for steps in (0, 1, 5):
        wanted = dense(plain.scan, beyond=steps)
        with knockout(model, layers=name, beyond=steps):
            trace, _ = run(model, x)
        assert close(trace[name].y, wanted, bound)
        assert not close(wanted, whole, 1e-4)
    with torch.no_grad(), knockout(model, layers=name, beyond=10**6):
        assert close(model(x), output, 1e-6)


@pytest.mark.parametrize("kind", ["vim", "cross at a door"])
def test_steps_and_columns_are_removed_together(kind):
    _, model, x, name, plain, _ = made(kind)
    wanted = dense(plain.scan, {"rows": [4, 5], "columns": [2, 4]}, beyond=2)
    with knockout(model, layers=name, beyond=7), knockout(model, layers=name, rows=[4, 5], columns=[2, 4]):
        with knockout(model, layers=name, beyond=2):
            trace, _ = run(model, x)
        assert close(trace[name].y, wanted, 3e-6)


def test_all_removed_leaves_d_u(case):
    _, model, x, name, plain, _ = case
    scan = plain.scan
    with knockout(model, layers=name):
        trace, _ = run(model, x)
    assert close(trace[name].y, dense(scan, {}), 1e-6)
    assert scan.D is None or trace[name].y.any()


@pytest.mark.parametrize("kind", ["vim", "vmamba", "windows at a door"])
def test_its_own_matrix_changes_nothing_and_another_does(kind):
    _, model, x, name, plain, output = made(kind)
    own = plain.attention("each", routes="each")
    with torch.no_grad(), replace_attention(model, layers=name, matrix=own):
        assert close(model(x), output, 1e-6)
    mean = own.mean(0)
    with replace_attention(model, matrix={name: mean}):
        trace, changed = run(model, x)
    assert not torch.equal(changed, output)
    wanted = by_tokens(plain.scan, mean.expand_as(own))
    assert close(trace[name].y, wanted, 3e-6)
    with replace_attention(model, layers=name, matrix=own[:1, :1, :1]), knockout(model, layers=name, columns=2):
        trace, _ = run(model, x)
    kept = own[:1, :1, :1].expand_as(own).clone()
    kept[..., 2] = 0
    assert close(trace[name].y, by_tokens(plain.scan, kept), 3e-6)


@torch.no_grad()
def by_tokens(record, matrix):
    """Matrices in the token frame times inputs, and D u."""
    total = dense(record, {})
    for b in range(record.batch):
        for r in range(record.routes):
            read = record.read_order[b, r] if record.read_order.ndim == 3 else record.read_order[r]
            u = torch.zeros(record.channels, record.tokens, dtype=torch.float64)
            u[:, read[read >= 0]] = record.u[b, r][:, read >= 0].double()
            total[b] += torch.einsum("cij,cj->ci", matrix[b, r].double(), u)
    return total


def test_entries_named_twice_are_removed_once(case):
    _, model, x, name, plain, _ = case
    mask = torch.rand(len(x), plain.tokens) < 0.3
    parts = [{"rows": range(4), "columns": [0, 1]}, {"rows": [3, 6], "columns": mask}, {"columns": 1}]
    with knockout(model, layers=name, **parts[0]), knockout(model, layers=name, **parts[1]):
        with knockout(model, layers=name, **parts[2]):
            trace, _ = run(model, x)
    tolerance = 1e-12 if plain.y.dtype == torch.float64 else 3e-6
    assert close(trace[name].y, dense(plain.scan, *parts), tolerance)


def test_a_trace_around_it_or_inside_it_shows_the_same(case):
    kind, model, x, name, _, _ = case
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        with knockout(model, columns=2), mamba_attn.trace(model) as inside:
            a = model(x)
        with mamba_attn.trace(model) as around, knockout(model, columns=2):
            b = model(x)
        with knockout(model, columns=2):
            c = model(x)
            assert torch.equal(model(x), c)
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    assert torch.equal(inside[name].y, around[name].y)
    assert torch.equal(inside[name].attention(), around[name].attention())
    if kind == "vim":
        with torch.no_grad(), knockout(model, columns=2), mamba_attn.trace(model, mode="observe") as observed:
            assert torch.equal(model(x), c)
        assert close(observed[name].y, inside[name].y, 1e-6)


def test_gradients_are_those_of_what_runs(case):
    kind, model, x, name, _, _ = case
    x = x.clone().requires_grad_()
    step = torch.randn_like(x)
    with knockout(model, layers=name, rows=range(3, 9), columns=[1, 2]):
        if kind == "chunks at a door":
            with pytest.raises(UnsupportedModelError, match=r"gradients through a chunk scan .* torch.no_grad"):
                model(x).sum().backward()
            return
        (found,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
        with torch.no_grad():
            size = 1e-6 if x.dtype == torch.float64 else 1e-2
            ends = [model(x + sign * size * step)[:, 1].double().sum() for sign in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * size)
    assert float((found * step).sum()) == pytest.approx(slope, rel=2e-2 if size > 1e-3 else 1e-6)


def test_parameters_have_gradients_at_a_door_as_at_the_extension():
    model, x = Net(Line()).eval(), torch.randn(2, 3, 16, 20)
    model(x).square().sum().backward()
    own = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with knockout(model, rows=3, columns=4, layers="mixers.0.forth"):  # above the diagonal: there is nothing
        model(x).square().sum().backward()
    for parameter, wanted in zip(model.parameters(), own, strict=True):
        assert close(parameter.grad, wanted, 1e-5)


def test_nothing_is_left_behind(case):
    _, model, x, name, _, output = case
    before = {id(m): state_of(m) for m in model.modules()}
    everywhere, door = global_state(), vars(foreign.selective_scan_cuda_oflex)["fwd"]
    with torch.no_grad():
        with knockout(model, columns=1), replace_attention(model, layers=name, matrix=torch.ones(1, 1)):
            with pytest.raises(ValueError, match="takes what broadcasts over"):
                model(x)
        with pytest.raises(TypeError, match="no_such"), knockout(model, columns=1):
            model(x, no_such=1)
        assert torch.equal(model(x), output)
    assert {id(m): state_of(m) for m in model.modules()} == before
    assert global_state() == everywhere
    assert vars(foreign.selective_scan_cuda_oflex)["fwd"] is door


def test_a_copy_made_inside_is_plain():
    model, x = vim(), torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        output = model(x)
        with knockout(model, columns=1):
            assert torch.equal(copy.deepcopy(model)(x), output)


def test_a_causal_line_of_tokens_forgets_what_is_removed():
    model, x = text(), torch.randn(2, 9, 6)
    trace, output = run(model, x)
    with torch.no_grad(), knockout(model, layers=[0, 1], columns=4):
        without = model(x)
    assert close(without[:, :4], output[:, :4], 1e-6)
    assert not any(close(without[:, i], output[:, i], 1e-5) for i in range(4, 9))
    assert trace.names == ["0", "1"]


def test_softmax_attention_loses_probabilities():
    model, x = (
        create("vit_micro", depth=1, embed_dim=16, num_heads=2, image_size=32, patch_size=8),
        torch.randn(2, 3, 32, 32),
    )
    trace, output = run(model, x)
    own = trace["blocks.0.attn"].attention("each", routes="each")
    with torch.no_grad():
        with replace_attention(model, layers="blocks.0.attn", matrix=own):
            assert close(model(x), output, 1e-6)
        with knockout(model, layers="blocks.0.attn", rows=0, columns=[3, -1], channels=1):
            changed = model(x)
        own[:, 0, 1, 0, [3, -1]] = 0
        with replace_attention(model, layers="blocks.0.attn", matrix=own):
            assert close(model(x), changed, 1e-6)
    assert not torch.equal(changed, output)
    with knockout(model, beyond=1), pytest.raises(UnsupportedModelError, match=r"blocks.0.attn is softmax .* no steps"):
        model(x)


class Softmax(torch.nn.Module):
    """Attention that no adapter knows."""

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(*[x[:, None]] * 3)[:, 0]


def test_softmax_attention_at_torchs_function_is_refused_unless_other_layers_are_named():
    net, x = Net(Line(both=False), Softmax()).eval(), torch.randn(2, 3, 16, 20)
    with torch.no_grad():
        with knockout(net, columns=1), pytest.raises(UnsupportedModelError, match=r"mixers\.1 is softmax .* layers="):
            net(x)
        plain = net(x)
        with knockout(net, columns=1, layers="mixers.0.*"):
            assert not torch.equal(net(x), plain)


def test_relevance_is_conserved_in_what_runs():
    model, x = vim(), torch.randn(1, 3, 32, 64)
    plain = attribution.MambaLRP(model).attribute(x, target=1)
    with knockout(model, layers=0, rows=-1, columns=[0, 1]):  # checks that the shares sum to the logit
        assert not torch.equal(attribution.MambaLRP(model).attribute(x, target=1), plain)
    net, images = Net(Line()).eval(), torch.randn(1, 3, 16, 20)
    with knockout(net, columns=1), pytest.raises(UnsupportedModelError, match="rules are not known at the door"):
        attribution.MambaLRP(net).attribute(images, target=1)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        (
            {"columns": True},
            TypeError,
            r"knockout\(columns=True\): expected a number or several, .* True and False per",
        ),
        ({"rows": torch.rand(3)}, TypeError, r"knockout\(rows=tensor"),
        ({"routes": torch.ones(2, dtype=torch.bool)}, TypeError, r"knockout\(routes=tensor.*: expected a number"),
        ({"layers": True}, TypeError, r"knockout\(layers=...\): expected names, patterns or numbers"),
        ({"layers": 7}, UnknownLayerError, r"knockout\(layers=...\): there is no layer 7 of 2 layers; expected -2..1"),
        ({"layers": "conv"}, UnknownLayerError, r"'conv' fits no layer"),
        ({"columns": 9}, ValueError, r"knockout\(columns=9\): layers.0.mixer has 9 tokens; expected -9..8"),
        ({"rows": -10}, ValueError, r"knockout\(rows=-10\)"),
        ({"routes": 2}, ValueError, r"knockout\(routes=2\): layers.0.mixer has 2 routes"),
        ({"beyond": True}, TypeError, r"knockout\(beyond=True\): expected a whole number of steps"),
        ({"beyond": -1}, ValueError, r"knockout\(beyond=-1\): expected at least 0 steps"),
        ({"beyond": 1, "rows": 2}, ValueError, r"leave out rows, columns, routes and channels; blocks may be nested"),
        ({"channels": [0, 32]}, ValueError, r"knockout\(channels=32\): layers.0.mixer has 32 channels"),
        (
            {"rows": torch.ones(3, 9, dtype=torch.bool)},
            ValueError,
            r"layers.0.mixer has 1 x 9 tokens; expected a mask",
        ),
    ],
)
def test_what_is_not_there_is_refused(given, error, sentence):
    model = vim()
    with torch.no_grad(), pytest.raises(error, match=sentence), knockout(model, **given):
        model(torch.randn(1, 3, 32, 64))


@pytest.mark.parametrize(
    ("matrix", "error", "sentence"),
    [
        (torch.ones(9, 9, dtype=torch.int64), TypeError, r"expected a floating-point tensor, .* got torch.int64"),
        ({"layers.1.*": torch.ones(9, 9)}, ValueError, r"there is none for layers.0.mixer"),
        (torch.ones(9, 6), ValueError, r"replace_attention\(matrix=\(9, 6\)\): expected \(tokens, tokens\)"),
        (torch.ones(3, 9, 9), ValueError, r"layers.0.mixer takes what broadcasts over .* = \(1, 2, 32, 9, 9\)"),
    ],
)
def test_what_is_no_matrix_of_the_layer_is_refused(matrix, error, sentence):
    model = vim()
    with torch.no_grad(), pytest.raises(error, match=sentence), replace_attention(model, matrix=matrix, layers=[0, 1]):
        model(torch.randn(1, 3, 32, 64))


def test_steps_of_another_matrix_are_refused():
    model, x = vim(), torch.randn(1, 3, 32, 64)
    with torch.no_grad(), replace_attention(model, layers=[0], matrix=torch.eye(9)), knockout(model, beyond=1):
        with pytest.raises(ValueError, match=r"knockout\(beyond=1\): the matrix of layers.0.mixer is replaced"):
            model(x)


def test_a_part_called_alone_at_doors_is_refused():
    model = Net(Line()).eval()
    with torch.no_grad(), knockout(model, columns=1), pytest.raises(TraceError, match="call the model itself inside"):
        model.mixers[0](torch.randn(1, 20, 6))
