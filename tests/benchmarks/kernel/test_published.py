import pytest
import torch

from benchmarks.cases import Shape, inputs
from benchmarks.kernel.published import triple_loop, vmamba_formula
from benchmarks.verify import norm_error
from mamba_attn import ops


@pytest.mark.parametrize("shape", [Shape(3, 4, 7), Shape(5, 1, 13), Shape(1, 2, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_the_published_loops_are_the_specification(shape, scale):
    values = [torch.cat(pair).double() for pair in zip(inputs(shape, scale), inputs(shape, scale, seed=1), strict=True)]
    values[1] = values[1][: shape.channels]  # A has no batch
    assert values[0].shape[0] == 2
    expected = ops.hidden_attention(*values, fold="each", backend="reference")
    alpha = triple_loop(*values)
    torch.testing.assert_close(alpha, expected, rtol=1e-12, atol=1e-14)
    assert not alpha.triu(1).any()


def test_vmambas_formula_is_right_while_its_exponents_fit():
    values = inputs(Shape(8, 1, 196))
    assert values[0].sum(-1).max() < 46
    assert norm_error(vmamba_formula(*values), *values) < 1e-5


@pytest.mark.parametrize(
    ("shape", "scale", "least"),
    [
        (Shape(8, 16, 49), 1.0, 0.02),
        (Shape(8, 16, 196), 1.0, 0.1),
        (Shape(8, 1, 784), 1.0, 0.05),
        (Shape(2, 16, 784), 1.0, 0.3),
        (Shape(8, 16, 196), 10.0, 0.6),
    ],
    ids=str,
)
def test_vmambas_formula_collapses_and_ours_does_not(shape, scale, least):
    values = inputs(shape, scale)
    assert norm_error(vmamba_formula(*values), *values) > least
    assert norm_error(ops.hidden_attention(*values), *values) < 1e-6
