import pytest
import torch

from mamba_attn.attribution import RawAttention
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import MODELS, images, in_pixels, matrices, vmamba


def rows(model, inputs):
    """(layout, row) per layer: of the class token, or the mean over patches."""
    for layout, matrix in matrices(model, inputs):
        tokens = list(layout.class_tokens) or list(range(layout.tokens))
        yield layout, matrix[:, tokens].mean(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("signed", [False, True])
def test_against_explicit_matrices(name, signed):
    model, inputs = MODELS[name](), images()
    expected = in_pixels([(layout, row if signed else row.clamp(min=0)) for layout, row in rows(model, inputs)])
    assert expected.abs().max() > 1e-3
    actual = RawAttention(model, signed=signed).attribute(inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_some_row_has_both_signs_so_that_the_positive_part_is_seen():
    signs = torch.cat([row for _, row in rows(MODELS["middle"](), images())], dim=1)
    assert signs.min() < -1e-3
    assert signs.max() > 1e-3


@pytest.mark.parametrize("name", ["middle", "vmamba"])
def test_rows_are_named_signed_and_in_execution_order(name):
    model, inputs = MODELS[name](), images()
    found = RawAttention(model).rows(inputs)
    with torch.no_grad(), trace(model) as record:
        model(inputs)
    assert list(found) == list(record)
    for actual, (_, expected) in zip(found.values(), rows(model, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_float32_is_as_good_as_it_can_be():
    model, inputs = vmamba(), images()
    expected = RawAttention(model).attribute(inputs)
    actual = RawAttention(model.float()).attribute(inputs.float())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * float(expected.max()))
