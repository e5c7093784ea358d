import pytest
import torch

from mamba_attn.attribution import AttentionRollout, RawAttention
from mamba_attn.attribution.queries import query_tokens
from mamba_attn.core.layout import TokenLayout
from tests.attribution.cases import images, matrices, vim

MIDDLE = TokenLayout((3, 2), patch_size=8, class_tokens=(3,))  # tokens 0 1 / 2 [3] 4 / 5 6
DENSE = TokenLayout((5, 3), patch_size=8, stride=4)  # centres at 4, 8, 12, 16, 20


@pytest.mark.parametrize(
    ("layout", "query", "tokens"),
    [
        (MIDDLE, None, [3]),
        (TokenLayout((2, 2)), None, [0, 1, 2, 3]),
        (TokenLayout((2, 2), registers=(0,)), None, [1, 2, 3, 4]),
        (MIDDLE, (0, 0), [0]),
        (MIDDLE, (8, 15), [4]),
        (MIDDLE, (23.5, 15.9), [6]),
        (MIDDLE, (30, 17), [6]),  # an image whose border no patch covers
        (MIDDLE, (0, 0, 16, 8), [0, 1]),
        (MIDDLE, (0, 0, 8, 24), [0, 2, 5]),
        (MIDDLE, (0, 8, 16, 24), [2, 4, 5, 6]),
        (MIDDLE, (9, 9, 10, 10), [4]),  # no centre inside: the nearest
        (DENSE, (8, 8), [4]),
        (DENSE, (0, 0, 16, 9), [0, 1, 2, 3, 4, 5]),
        (DENSE, (4, 4, 12, 8), [0, 1]),  # the lower edge belongs to a box, the upper does not
    ],
)
def test_tokens_of_a_query(layout, query, tokens):
    assert query_tokens(layout, query) == tokens


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ((40, 0), r"query=\(40, 0\)\): the pixel \(row, column\) is outside the image of 40 x 24 pixels"),
        ((0, -1), "outside the image"),
        ((0, 0, 25, 10), r"0 <= x0 < x1 <= 24 and 0 <= y0 < y1 <= 40"),
        ((5, 5, 5, 10), "x0 < x1"),
        ((0, 0, 10, float("nan")), "y0 < y1"),
        ((1, 2, 3), r"expected \(row, column\) or \(x0, y0, x1, y1\)"),
    ],
)
@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
def test_queries_outside_the_image(method, query, message):
    with pytest.raises(ValueError, match=message):
        method(vim(depth=1)).attribute(images(), query=query)


@pytest.mark.parametrize("query", [(12, 20), (0, 0, 16, 24), None])
def test_the_row_of_the_query_is_read(query):
    model, inputs = vim(depth=1), images()
    ((layout, matrix),) = matrices(model, inputs)
    tokens = query_tokens(layout, query)
    expected = layout.to_grid(matrix[:, tokens].mean(1))
    signed = RawAttention(model, signed=True).attribute(inputs, query=query, grid=True)[:, 0]
    torch.testing.assert_close(signed, expected, rtol=0, atol=1e-12)
    rows = RawAttention(model).rows(inputs, query=query)["layers.0.mixer"]
    torch.testing.assert_close(rows, matrix[:, tokens].mean(1), rtol=0, atol=1e-12)


def test_a_pixel_is_another_query_than_the_class_token():
    model = vim()
    for method in (RawAttention(model), AttentionRollout(model)):
        assert (method.attribute(images(), query=(0, 0)) - method.attribute(images())).abs().max() > 1e-6
