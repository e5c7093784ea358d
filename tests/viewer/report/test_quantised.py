"""Numbers in a report: off by no more than is said."""

import base64

import numpy as np
import pytest

from mamba_attn.viewer.report.quantised import ERROR, packed, places
from tests.viewer.report.cases import unpacked


def rows(kind):
    generator = np.random.default_rng(0)
    plain = generator.standard_normal((7, 11))
    return {
        "plain": plain,
        "many sizes": plain * 10.0 ** np.arange(-12, 2, 2)[:, None] * np.exp(4 * generator.standard_normal((7, 11))),
        "a row of zeros": plain * (np.arange(7) != 3)[:, None],
        "float32": plain.astype(np.float32),
        "one number": plain[:1, :1],
        "denormal": plain * 1e-42,
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "many sizes", "a row of zeros", "float32", "one number"])
def test_no_number_is_off_by_more_than_a_part_of_its_row_s_largest(kind):
    matrix = rows(kind)
    back = unpacked(packed(matrix), *matrix.shape)
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    error = np.abs(back - matrix.astype(np.float64))
    assert (error <= ERROR * largest + 2**-22 * np.abs(matrix)).all()
    assert (error[largest[:, 0] == 0] == 0).all()
    assert (back[matrix == 0] == 0).all()
    if matrix.size > 1:
        assert error.max() > 0.2 * ERROR * largest.min()  # the bound is not idle


def test_what_float32_cannot_hold_becomes_nearly_zero():
    matrix = rows("denormal")
    assert np.abs(unpacked(packed(matrix), *matrix.shape) - matrix).max() < 1e-37


def test_points_keep_their_shape():
    xy = np.array([[3.0, -1], [7, 1], [5, 0]], dtype=np.float32)
    numbers = np.frombuffer(base64.b64decode(places(xy)), "<u2").reshape(2, 3).T
    np.testing.assert_allclose(numbers / 65535, (xy - [3, -1]) / 4, atol=1e-5)
    assert places(np.ones((2, 2))) == base64.b64encode(bytes(8)).decode()
