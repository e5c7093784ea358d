"""VMamba's own analysis map and rollout, against loops over pairs written from the formula."""

import math

import pytest
import torch

from mamba_attn.attribution import AttentionRollout, RawAttention
from mamba_attn.attribution.published.vmamba_analysis import analysis_map, rollout_step
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.layers import ScanLayer
from tests.attribution.cases import SIZE, images, layers_of, matrices, vim, vmamba

FORMULAS = {"vmamba_analysis": "CwBw", "vmamba_analysis_dt": "CwBdtw"}
METHODS = [RawAttention, AttentionRollout]


def scaled(x):
    return (x - x.min()) / (x.max() - x.min())


def loop(layer, formula):
    """Pair by pair, route by route, in the token frame."""
    scan = layer.scan
    found = torch.zeros(scan.batch, scan.tokens, scan.tokens, dtype=torch.float64)
    for route in range(scan.routes):
        order = scan.read_order[route].tolist()
        w = torch.exp(torch.cumsum(scan.A[route][:, :, None] * scan.delta[:, route, :, None], -1))
        for i in range(scan.length):
            for j in range(i + 1):
                key = scan.B[:, route, :, :, j] / w[..., j].clamp(min=1e-20)
                if formula == "CwBdtw":
                    key = key * scan.delta[:, route, :, j, None]
                pair = scan.C[:, route, :, :, i] * w[..., i] * key
                found[:, order[i], order[j]] += pair.sum(2).mean(1)
    return found


def blocks(model, inputs, stage=2):
    return [layer for layer in layers_of(model, inputs) if layer.name.startswith(f"layers.{stage}.")]


def pixels(layout, rows):
    return layout.to_pixels(layout.to_grid(rows), SIZE).unsqueeze(1)


@pytest.mark.parametrize("formula", FORMULAS.values())
@pytest.mark.parametrize("order", ["raster", "zigzag"])
def test_map_against_the_loop(formula, order):
    (layer,) = blocks(vmamba(order=order), images())
    torch.testing.assert_close(
        analysis_map(layer, steps=formula == "CwBdtw"), loop(layer, formula), rtol=1e-11, atol=1e-12
    )


def test_with_steps_it_is_the_true_matrix_until_the_clamp_acts():
    model, inputs = vmamba(d_state=1), images()
    layer, (_, true) = layers_of(model, inputs)[1], matrices(model, inputs)[1]
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(analysis_map(layer, steps=True), true, **close)
    layer = ScanLayer(layer.name, layer.scan.replace(source_delta=layer.scan.source_delta * 1000))
    torch.testing.assert_close(analysis_map(layer, steps=True), loop(layer, "CwBdtw"), **close)
    assert analysis_map(layer, steps=True).abs().max() < layer.attention().abs().max()  # whole rows collapse


@pytest.mark.parametrize("convention", FORMULAS)
@pytest.mark.parametrize("query", [None, (30, 20)])
def test_raw_map_is_a_row_of_the_third_stages_second_block(convention, query):
    model, inputs = vmamba(depths=(1, 1, 3, 1)), images()
    layer = blocks(model, inputs)[1]
    full = torch.stack([scaled(image) for image in loop(layer, FORMULAS[convention])])
    row = full.mean(1) if query is None else full[:, layer.layout.token_at(*query)]
    actual = RawAttention(model, convention=convention).attribute(inputs, pixel=query)
    torch.testing.assert_close(actual, pixels(layer.layout, row), rtol=0, atol=1e-12)
    named = RawAttention(model, convention=convention, layers=["layers.2.blocks.[01].*"])
    other = torch.stack([scaled(image) for image in loop(blocks(model, inputs)[0], FORMULAS[convention])])
    other = other.mean(1) if query is None else other[:, layer.layout.token_at(*query)]
    actual = named.attribute(inputs, pixel=query)
    torch.testing.assert_close(actual, pixels(layer.layout, (row + other) / 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("convention", FORMULAS)
@pytest.mark.parametrize("query", [None, (30, 20)])
def test_rollout_over_a_stage_one_image_at_a_time(convention, query):
    model, inputs = vmamba(depths=(1, 1, 3, 1)), images()
    stage = blocks(model, inputs)
    layout, rows = stage[0].layout, []
    for image in range(3):
        product = torch.eye(layout.tokens, dtype=torch.float64)
        for layer in stage:
            step = 0.5 * (scaled(loop(layer, FORMULAS[convention])[image]) + torch.eye(layout.tokens))
            step = step / step.sum(-1)  # as published: column j by the sum of row j
            product = step @ product
        rows.append(product.mean(0) if query is None else product[layout.token_at(*query)])
    actual = AttentionRollout(model, convention=convention).attribute(inputs, pixel=query)
    torch.testing.assert_close(actual, pixels(layout, torch.stack(rows)), rtol=0, atol=1e-12)


def test_rollout_divides_columns_as_published():
    matrix = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]])
    expected = torch.tensor([[[1 / 2, 1 / 4], [0.0, 1.0]]])  # of (matrix + I) / 2, with row sums 1 and 2
    torch.testing.assert_close(rollout_step(matrix), expected)


def test_models_of_few_stages_and_blocks():
    model, inputs = vmamba(depths=(2, 1), dims=8), images(1)
    raw = RawAttention(model, convention="vmamba_analysis").attribute(inputs)
    named = RawAttention(model, convention="vmamba_analysis", layers=["layers.1.*"]).attribute(inputs)
    assert torch.equal(raw, named)
    assert raw.std() > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("convention", FORMULAS)
def test_permuting_the_batch_permutes_the_maps(method, convention):
    explain, order = method(vmamba(), convention=convention).attribute, torch.tensor([2, 0, 1])
    maps = explain(images())
    torch.testing.assert_close(explain(images()[order]), maps[order], rtol=0, atol=1e-14)
    assert (maps >= 0).all()
    assert math.isfinite(maps.sum())


class Spelt(torch.nn.Module):
    """Attention that goes through no door, next to the scans."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        tokens = x.flatten(1, 2)
        mixed = (tokens @ tokens.mT * 0.01).softmax(-1) @ tokens
        return x + self.weight * mixed.view(x.shape)


@pytest.mark.filterwarnings("ignore:trace. .* mix tokens next to the traced layers")
def test_one_layers_map_is_not_refused_for_what_a_product_of_layers_leaves_out():
    model = vmamba()
    model.layers[0].blocks.append(Spelt())
    with pytest.raises(UnsupportedModelError, match="mix tokens next to the traced layers"):
        AttentionRollout(model, convention="vmamba_analysis").attribute(images())
    assert RawAttention(model, convention="vmamba_analysis").attribute(images()).std() > 0


@pytest.mark.parametrize("method", METHODS)
def test_what_it_is_not_made_for(method):
    for model in (vim(depth=1), vim(depth=1, class_token=None)):
        with pytest.raises(
            ValueError, match=r"VMamba's own analysis map, and VisionMamba is of the family Vim; use conv"
        ):
            method(model, convention="vmamba_analysis").attribute(images())
    with pytest.raises(ValueError, match=r"signed=True\): .* no such option; leave signed=True out"):
        method(vmamba(), convention="vmamba_analysis", signed=True)


def test_a_rollout_stays_within_a_stage():
    method = AttentionRollout(vmamba(), convention="vmamba_analysis", layers=["layers.[01].*"])
    with pytest.raises(ValueError, match="this rollout stays within one stage; name the layers of one with layers="):
        method.attribute(images())
