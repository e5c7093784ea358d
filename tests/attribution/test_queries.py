import re

import numpy as np
import pytest
import torch

from mamba_attn.attribution import AttentionRollout, MambaLRP, RawAttention, catalogue
from mamba_attn.attribution.queries import Query, make_query, query_tokens
from mamba_attn.core.layout import TokenLayout
from tests.attribution.cases import images, matrices, vim, vmamba
from tests.attribution.vit.test_vit import build

MIDDLE = TokenLayout((3, 2), patch_size=8, class_tokens=(3,))  # tokens 0 1 / 2 [3] 4 / 5 6
DENSE = TokenLayout((5, 3), patch_size=8, stride=4)  # centres at 4, 8, 12, 16, 20


def keyword(numbers):
    """The argument that two or four numbers are."""
    return {} if numbers is None else {"pixel" if len(numbers) == 2 else "box": numbers}


def place(numbers):
    return None if numbers is None else Query(*keyword(numbers), (tuple(numbers),))


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
    assert query_tokens(layout, place(query)) == [tokens]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ((40, 0), r"pixel=\(40, 0\)\): the pixel \(row, column\) is outside the image of 40 x 24 pixels"),
        ((0, -1), "outside the image"),
        ((0, 0, 25, 10), r"0 <= x0 < x1 <= 24 and 0 <= y0 < y1 <= 40"),
        ((5, 5, 5, 10), "x0 < x1"),
        ((0, 0, 10, float("nan")), "y0 < y1"),
        (
            (1, 2, 3),
            r"box=\(1, 2, 3\)\): expected \(x0, y0, x1, y1\), 4 numbers in pixels, or a list of one per image",
        ),
    ],
)
@pytest.mark.parametrize("method", [RawAttention, AttentionRollout])
def test_queries_outside_the_image(method, query, message):
    with pytest.raises(ValueError, match=message):
        method(vim(depth=1)).attribute(images(), **keyword(query))


@pytest.mark.parametrize("query", [(12, 20), (0, 0, 16, 24), None])
def test_the_row_of_the_query_is_read(query):
    model, inputs = vim(depth=1), images()
    ((layout, matrix),) = matrices(model, inputs)
    (tokens,) = query_tokens(layout, place(query))
    expected = layout.to_grid(matrix[:, tokens].mean(1))
    signed = RawAttention(model, signed=True).attribute(inputs, **keyword(query), grid=True)[:, 0]
    torch.testing.assert_close(signed, expected, rtol=0, atol=1e-12)
    rows = RawAttention(model).rows(inputs, **keyword(query))["layers.0.mixer"]
    torch.testing.assert_close(rows, matrix[:, tokens].mean(1), rtol=0, atol=1e-12)


def test_a_pixel_is_another_query_than_the_class_token():
    model = vim()
    for method in (RawAttention(model), AttentionRollout(model)):
        assert (method.attribute(images(), pixel=(0, 0)) - method.attribute(images())).abs().max() > 1e-6


PIXELS = [(12, 20), (3, 0), (39, 23)]
BOXES = [(0, 0, 16, 24), (5, 5, 7, 7), (0, 16, 24, 40)]
READERS = sorted(
    name for name, entry in catalogue.METHODS.items() if entry.reads_rows and "variant" not in entry.options
)


@pytest.mark.parametrize("places", [{"pixel": PIXELS}, {"box": BOXES}], ids=["pixel", "box"])
@pytest.mark.parametrize("name", READERS)
def test_every_image_has_its_own_place(name, places):
    softmax = catalogue.METHODS[name].made_of == (catalogue.SOFTMAX,)
    method = catalogue.build(name, build("class token")[0] if softmax else vim(class_token="first"))
    method = catalogue.build(name, method.model, layers=-2) if name == "attention_grad_cam" else method
    ((kind, each),) = places.items()
    found = method.attribute(images(), 1, **places)
    alone = [method.attribute(image[None], 1, **{kind: numbers}) for image, numbers in zip(images(), each, strict=True)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-7, atol=1e-12)
    assert all(one.abs().max() > 0 for one in alone)
    assert (found - method.attribute(images(), 1, **{kind: each[0]}))[1:].abs().max() > 1e-9
    assert torch.equal(found, method.attribute(images(), 1, **{kind: torch.tensor(each)}))


@pytest.mark.parametrize("options", [{"rollout": False}, {"signed": True}, {"rule": "paper"}])
def test_own_places_in_vmamba(options):
    method = catalogue.build("mamba_attribution", vmamba(), **options)
    found = method.attribute(images(), 1, pixel=PIXELS)
    alone = [method.attribute(image[None], 1, pixel=at) for image, at in zip(images(), PIXELS, strict=True)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "given",
    [[(1, 2), (3, 4)], ((1, 2), (3, 4)), torch.tensor([[1, 2], [3, 4]]), np.array([[1.0, 2.0], [3.0, 4.0]]),
     [torch.tensor([1, 2]), torch.tensor([3, 4])], [(torch.tensor(1), 2), [3, np.float32(4)]]],
)  # fmt: skip
def test_places_in_every_wrapping(given):
    assert make_query("call", (40, 24), 2, given, None) == Query("pixel", ((1, 2), (3, 4)))


def test_one_image_may_have_its_place_in_a_list():
    assert make_query("call", (40, 24), 1, None, [(0, 0, 9, 9)]) == make_query("call", (40, 24), 1, None, (0, 0, 9, 9))


@pytest.mark.parametrize(
    ("pixel", "box", "message"),
    [
        ((1, 2), (0, 0, 3, 3), "call(pixel=(1, 2), box=(0, 0, 3, 3)): both choose the rows to read; leave one out."),
        ((1, 2, 3), None, "call(pixel=(1, 2, 3)): expected (row, column), 2 numbers in pixels, or a list of one per"),
        ((1, 2, 3, 4), None, "call(pixel=(1, 2, 3, 4)): expected (row, column), 2 numbers"),
        (None, (1, 2), "call(box=(1, 2)): expected (x0, y0, x1, y1), 4 numbers"),
        ([(1, 2)], None, "call(pixel=[(1, 2)]): a list of 1; expected one (row, column) for all images, or a list"),
        ([(1, 2)] * 4, None, "a list of 4;"),
        ([(1, 2), (3, 4, 5), (1, 2)], None, "expected (row, column), 2 numbers"),
        ([(1, 2), (1, 2), (1, 24)], None, "the pixel (row, column) of image 2, (1, 24), is outside the image of"),
        (None, [(0, 0, 1, 1), (2, 2, 2, 3), (0, 0, 1, 1)], "the box of image 1, (2, 2, 2, 3), is empty or leaves the"),
        ((float("nan"), 2), None, "is outside the image"),
        ((float("inf"), 2), None, "is outside the image"),
        (5, None, "call(pixel=5): expected (row, column)"),
        ("ab", None, "expected (row, column)"),
        ((None, 3), None, "expected (row, column)"),
        ((True, 3), None, "expected (row, column)"),
        ([], None, "expected (row, column)"),
        ([(1, 2), 3, (4, 5)], None, "expected (row, column)"),
        (["ab", "cd", "ef"], None, "expected (row, column)"),
        (torch.zeros(3, 1, 2), None, "expected (row, column)"),
    ],
)  # fmt: skip
def test_places_that_are_refused(pixel, box, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_query("call", (40, 24), 3, pixel, box)


def test_one_place_for_all_where_images_are_averaged():
    with pytest.raises(ValueError, match=r"a list of 2; expected one \(row, column\) for all images\.$"):
        make_query("call", (40, 24), None, [(1, 2), (3, 4)], None)


@pytest.mark.parametrize("numbers", [(12, 20), (0, 0, 16, 24)])
def test_a_query_is_still_understood(numbers):
    method = RawAttention(vim())
    expected, rows = method.attribute(images(), **keyword(numbers)), method.rows(images(), **keyword(numbers))
    with pytest.warns(
        DeprecationWarning, match=rf"query is deprecated; write {next(iter(keyword(numbers)))}=\("
    ) as caught:
        found = method.attribute(images(), None, numbers)
    with pytest.warns(DeprecationWarning, match=r"RawAttention\.rows\(query="):
        assert torch.equal(method.rows(images(), numbers)[0], rows[0])
    assert torch.equal(found, expected)
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"query is deprecated; expected pixel=\(row, column\) or box=.*, alone"):
        method.attribute(images(), query=numbers, pixel=(1, 2))
    with pytest.raises(ValueError, match=r"query=\(1, 2, 3\)\): expected pixel=\(row, column\) or box="):
        method.attribute(images(), query=(1, 2, 3))
    with pytest.raises(ValueError, match=r"box=\(0, 0, 9, 9\)\): this method reads no token's row; leave box out"):
        MambaLRP(vim()).attribute(images(), box=(0, 0, 9, 9))
