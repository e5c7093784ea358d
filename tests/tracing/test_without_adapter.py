"""A self-written model, whose scans and attention go through doors, through the whole package."""

import numpy as np
import pytest
import torch

import mamba_attn
from mamba_attn import attribution, erf, models
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.attribution import catalogue
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.datasets import open_data
from mamba_attn.datasets.loading import complete
from mamba_attn.datasets.made_of import made_of
from mamba_attn.errors import TraceError
from mamba_attn.explanations.choices import parse_methods
from tests.datasets.cases import CLASSES, class_folders
from tests.tracing.foreign import Both, Line, Net, Shuffled
from tests.tracing.test_softmax_doors import Attention

GRID, TOKENS, SIZE = (4, 5), 20, (16, 20)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(batch=2):
    return torch.randn(batch, 3, *SIZE)


def hybrid():
    """Scans both ways in one module, attention, and scans whose tokens a parent shuffles."""
    return Net(Both(), Attention(), Shuffled(torch.randperm(TOKENS))).eval()


def wide():
    """The same layers as a trace names them."""
    return ["mixers.0", "mixers.1", "mixers.2.mixer.forth"]


def test_maps_of_methods_that_need_no_rules():
    model, x = hybrid(), images(3)
    assert list(_traced(model, x)) == wide()
    for method in (attribution.RawAttention, attribution.AttentionRollout):
        found = method(model).attribute(x, target=1)
        assert found.shape == (3, 1, *SIZE)
        alone = torch.cat([method(model).attribute(image[None], target=1) for image in x])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)
        assert method(model).attribute(x, pixel=(3, 17), grid=True).shape == (3, 1, *GRID)
    scans = Net(Both(), Line()).eval()
    assert attribution.MambaAttribution(scans).attribute(x, target=1).shape == (3, 1, *SIZE)


def _traced(model, x, **options):
    with torch.no_grad(), mamba_attn.trace(model, **options) as trace:
        model(x)
    return trace


def test_a_layout_that_is_given_moves_the_map():
    model, x = Net(Line()).eval(), images()
    layout = mamba_attn.TokenLayout(grid=(2, 10), patch_size=(8, 2))
    for method in (attribution.RawAttention, attribution.AttentionRollout, attribution.MambaAttribution):
        found = method(model, layout=layout).attribute(x, target=0, grid=True)
        assert found.shape == (2, 1, 2, 10)
        torch.testing.assert_close(found.flatten(2), method(model).attribute(x, target=0, grid=True).flatten(2))
    assert attribution.RawAttention(model, layout=layout).rows(x)[0].shape == (2, TOKENS)


@pytest.mark.parametrize("method", [attribution.MambaLRP, attribution.FrozenContribution, attribution.LayerGradCam])
def test_methods_that_follow_the_pass_take_the_layout_too(method):
    model, x = Net(Line()).eval(), images()
    layout = {"mixers.*": mamba_attn.TokenLayout(grid=(2, 10), patch_size=(8, 2))}
    found = method(model, layout=layout).attribute(x, target=0, grid=True)
    assert found.shape == (2, 1, 2, 10)
    torch.testing.assert_close(found.flatten(2), method(model).attribute(x, target=0, grid=True).flatten(2))


def test_what_a_trace_finds_says_which_methods_fit():
    mixed, scans = (LoadedModel(net.eval(), Transform(SIZE)) for net in (hybrid(), Net(Both(), Line())))
    assert made_of(complete(mixed)) == ["selective scans", "softmax attention"]
    assert [its.name for its in parse_methods([], mixed)] == [
        "frozen_contribution", "raw_attention", "attention_rollout",
    ]  # fmt: skip
    assert made_of(complete(scans)) == ["selective scans"]
    assert parse_methods([], scans)[-1].name == "mamba_attribution"
    with pytest.raises(ValueError, match="Net is made of selective scans; use mamba_attribution"):
        parse_methods(["transformer_attribution"], scans)
    fitting = catalogue.fitting(scans.model, made_of(scans))
    assert {"mamba_attribution", "mamba_lrp", "grad_cam", "random"} <= set(fitting)
    assert "raw_attention" not in catalogue.fitting(scans.model)  # its adapters alone know no layer


class Tangled(torch.nn.Module):
    """A scan behind which every token goes to every token: its order cannot be measured."""

    def __init__(self):
        super().__init__()
        self.both, self.spread = Both(), torch.nn.Parameter(torch.randn(TOKENS, TOKENS))
        self.both.leave = torch.nn.Identity()

    def forward(self, x):
        u, z = self.both.enter(x).mT.chunk(2, 1)
        return (self.both.scan(0, u, z) @ self.spread).mT


def test_an_order_that_is_given_reaches_methods_collect_and_fields(tmp_path):
    model, x = Net(Tangled()).eval(), images()
    order = torch.arange(TOKENS)[None]
    layout = mamba_attn.TokenLayout(grid=GRID, patch_size=4)
    with pytest.raises(TraceError, match="the order of its scan's tokens is not known"):
        attribution.RawAttention(model).attribute(x)
    given = {"orders": order, "layout": layout}
    assert attribution.RawAttention(model, **given).attribute(x).shape == (2, 1, *SIZE)
    collected, store = _collect(model, tmp_path, **given)
    assert collected.counted == 6
    np.testing.assert_array_equal(store.layers[0].orders, order.numpy())
    assert erf.receptive_field(model, x, reach=True, **given).gradient.shape == SIZE


def _collect(model, tmp_path, **options):
    subject = LoadedModel(model, models.transform("vim_micro", SIZE), [*CLASSES, "d", "e"], name="net")
    data = open_data(str(class_folders(tmp_path / "photos", 2)))
    collected = collect(Request(subject, data, batch=2, part=4, keep=2, **options), tmp_path / "store")
    return collected, AttentionStore.open(tmp_path / "store")


@pytest.mark.parametrize("routes", ["each", "sum"])
def test_a_store_of_it_holds_what_a_trace_gives(tmp_path, routes):
    model = hybrid()
    collected, store = _collect(model, tmp_path, routes=routes)
    assert (collected.counted, collected.unreadable) == (6, {})
    assert [layer.name for layer in store.layers] == wide()
    assert [layer.routes for layer in store.layers] == [2, 1, 1]
    assert all(layer.layout.grid == GRID for layer in store.layers)
    data = open_data(str(tmp_path / "photos"))
    pixels = [data.load(n, models.transform("vim_micro", SIZE)).pixels for n in range(6)]
    trace = _traced(model, mamba_attn.images.normalise(np.stack(pixels)))
    for layer in store.layers:
        exact = trace[layer.name].attention().double().numpy()
        np.testing.assert_allclose(store.mean(layer, "sum"), exact.mean(0), atol=2e-6 * np.abs(exact).max())
        np.testing.assert_array_equal(layer.orders[0] if layer.orders.size else 0, _order(trace[layer.name]))


def _order(layer):
    return layer.scan.read_order[0].numpy() if hasattr(layer, "scan") else np.arange(TOKENS)


def test_one_order_per_image_is_collected_and_none_is_stored(tmp_path):
    _, store = _collect(Net(Shuffled(sort=True)).eval(), tmp_path)
    assert store.layers[0].orders.shape[-1] == 0
    assert store.mean(store.layers[0], "sum").shape == (TOKENS, TOKENS)


@pytest.mark.parametrize("layer", [None, "mixers.1", 0])
def test_receptive_fields(layer):
    model, x = hybrid(), images(3)
    field = erf.receptive_field(model, x, layer=layer, pixel=(9, 6))
    assert field.gradient.shape == SIZE
    assert field.layer == {None: wide()[2], "mixers.1": "mixers.1", 0: "mixers.0"}[layer]
    assert field.reach is not None
    assert list(field.reach.rows) == wide()
    assert field.reach.rollout is not None
    truth = x.clone().requires_grad_()
    tokens = model.stem(truth).permute(0, 2, 3, 1).flatten(1, 2)
    for mixer, norm in zip(model.mixers, model.norms, strict=False):
        if layer is not None and mixer is model.mixers[1 if layer else 0]:
            tokens = mixer(norm(tokens))  # what its block returns: the sum is the net's own
            break
        tokens = tokens + mixer(norm(tokens))
    tokens = tokens if layer is not None else model.norms[-1](tokens)
    row, column = 9 // 4, 6 // 4
    (gradient,) = torch.autograd.grad(tokens[:, row * 5 + column].relu().sum(), truth)
    expected = gradient.clamp(min=0).double().sum(1).mean(0)
    np.testing.assert_allclose(field.gradient, expected.numpy(), rtol=1e-4, atol=1e-7)
