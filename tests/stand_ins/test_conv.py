"""The compiled convolution's stand-in against a loop in float64, in every signature it has had."""

import pytest
import torch

from mamba_attn.stand_ins import conv
from tests.stand_ins import naive

SHAPES = ((2, 5, 7), (5, 4), (5,), (2, 5, 3), (2, 5, 3), (2, 5, 7))
FIXED = torch.Generator().manual_seed(0)
X, WEIGHT, BIAS, BEFORE, AFTER, DOUT = (torch.randn(shape, generator=FIXED).double() for shape in SHAPES)
SEQUENCES = torch.tensor([[0, 0, 1, 1, 1, 2, -1], [3, 3, 3, 3, 4, 4, 4]], dtype=torch.int32)


def truth(silu, before=None, sequences=None, after=None):
    """Output, last steps and gradients of x, weight, bias and what came before."""
    given = [t.clone().requires_grad_() for t in (X, WEIGHT, BIAS, BEFORE)]
    x, weight, bias, first = given
    y = naive.conv(x, weight, bias, silu, None if before is None else first, sequences)
    last = torch.cat([first if before is not None else 0 * first, x], -1)[..., -3:]
    total = (y * DOUT).sum() + (0 if after is None else (last * after).sum())
    gradients = torch.autograd.grad(total, given, allow_unused=True)
    return y.detach(), last.detach(), gradients


@pytest.mark.parametrize("silu", [True, False])
def test_fwd_of_every_release(silu):
    plain, last, _ = truth(silu)
    naive.close(conv.causal_conv1d_fwd(X, WEIGHT, BIAS, silu), plain, 1e-12)
    naive.close(conv.causal_conv1d_fwd(X, WEIGHT, BIAS, None, silu), plain, 1e-12)
    naive.close(conv.causal_conv1d_fwd(X, WEIGHT, None, silu), naive.conv(X, WEIGHT, None, silu), 1e-12)
    own, _, _ = truth(silu, sequences=SEQUENCES)
    naive.close(conv.causal_conv1d_fwd(X, WEIGHT, BIAS, SEQUENCES, silu), own, 1e-12)
    following, last, _ = truth(silu, before=BEFORE)
    final, out = torch.full((2, 5, 3), torch.nan).double(), torch.full_like(X, torch.nan)
    naive.close(conv.causal_conv1d_fwd(X, WEIGHT, BIAS, None, BEFORE, final, silu), following, 1e-12)
    assert torch.equal(final, last)
    final.fill_(torch.nan)
    assert conv.causal_conv1d_fwd(X, WEIGHT, BIAS, None, BEFORE, out, final, silu) is None
    naive.close(out, following, 1e-12)
    assert torch.equal(final, last)


@pytest.mark.parametrize("silu", [True, False])
def test_bwd_of_every_release(silu):
    _, _, gradients = truth(silu)
    dxz = torch.full((2, 10, 7), torch.nan, dtype=torch.float64)
    for extra in ((dxz[:, :5], silu), (None, dxz[:, :5], silu)):
        dxz.fill_(torch.nan)
        found = conv.causal_conv1d_bwd(X, WEIGHT, BIAS, DOUT, *extra)
        assert len(found) == 3
        naive.close(dxz[:, :5], gradients[0], 1e-12)
        for one, other in zip(found, gradients, strict=False):
            naive.close(one, other, 1e-12)
    _, _, gradients = truth(silu, sequences=SEQUENCES)
    found = conv.causal_conv1d_bwd(X, WEIGHT, BIAS, DOUT, SEQUENCES, None, silu)
    for one, other in zip(found, gradients, strict=False):
        naive.close(one, other, 1e-12)
    _, _, gradients = truth(silu, before=BEFORE, after=AFTER)
    found = conv.causal_conv1d_bwd(X, WEIGHT, BIAS, DOUT, None, BEFORE, AFTER, None, True, silu)
    for one, other in zip(found, gradients, strict=True):
        naive.close(one, other, 1e-12)
    into = [torch.full_like(t, torch.nan) for t in (X, WEIGHT, BIAS, BEFORE)]
    assert conv.causal_conv1d_bwd(X, WEIGHT, BIAS, DOUT, None, BEFORE, AFTER, *into, silu) is None
    for one, other in zip(into, gradients, strict=True):
        naive.close(one, other, 1e-12)


def test_bwd_without_bias_and_states():
    found = conv.causal_conv1d_bwd(X, WEIGHT, None, DOUT, None, None, None, None, True, False)
    assert found[2] is None
    assert found[3] is None


def test_bwd_runs_inside_an_operator():  # where autograd is off; current causal_conv1d calls it there
    @torch.library.custom_op("mamba_attn_tests::conv_bwd", mutates_args={"dx"})
    def op(x: torch.Tensor, weight: torch.Tensor, dout: torch.Tensor, dx: torch.Tensor) -> None:
        conv.causal_conv1d_bwd(x, weight, None, dout, dx, True)

    dx = torch.full_like(X, torch.nan)
    op(X, WEIGHT, DOUT, dx)
    naive.close(dx, conv.causal_conv1d_bwd(X, WEIGHT, None, DOUT, None, True)[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_taken_in_float32(dtype):
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    y = conv.causal_conv1d_fwd(x, weight, None, True)
    assert y.dtype == dtype
    naive.close(y, naive.conv(x.double(), weight.double(), silu=True), 2 * torch.finfo(dtype).eps)


def test_the_package_is_differentiable_and_takes_the_old_order():
    x = X.clone().requires_grad_()
    y = conv.causal_conv1d_fn(x, WEIGHT, BIAS, "silu")
    truth_y, _, gradients = truth(True)
    naive.close(y, truth_y, 1e-12)
    naive.close(torch.autograd.grad((y * DOUT).sum(), x)[0], gradients[0], 1e-12)
    y, last = conv.causal_conv1d_fn(X, WEIGHT, BIAS, None, BEFORE, True, None, "swish")
    following, expected, _ = truth(True, before=BEFORE)
    naive.close(y, following, 1e-12)
    assert torch.equal(last, expected)


@pytest.mark.parametrize("kept", [3, 4, 6])
@pytest.mark.parametrize("steps", [1, 3])
def test_update_continues_the_sequence(kept, steps):
    full = naive.conv(X, WEIGHT, BIAS, True)
    state = torch.cat([torch.zeros(2, 5, kept).double(), X[..., : 7 - steps]], -1)[..., -kept:].clone()
    new = X[..., -steps:] if steps > 1 else X[..., -1]
    y = conv.causal_conv1d_update(new, state, WEIGHT, BIAS, "silu")
    naive.close(y.reshape(2, 5, steps), full[..., -steps:], 1e-12)
    assert torch.equal(state, torch.cat([torch.zeros(2, 5, kept).double(), X], -1)[..., -kept:])


def test_update_of_every_release():
    for extra in ((True,), (True, None), (True, None, None)):
        y = conv.extension_update(X[..., 0], BEFORE.clone(), WEIGHT, BIAS, *extra)
        naive.close(y, naive.conv(X, WEIGHT, BIAS, True, BEFORE)[..., 0], 1e-12)
    out = torch.full_like(X[..., 0], torch.nan)
    conv.extension_update(X[..., 0], BEFORE.clone(), WEIGHT, BIAS, out, True, None, None)
    assert torch.equal(out, y)


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"causal_conv1d_fwd got 6 arguments; .* take 4, 5, 7, 8"):
        conv.causal_conv1d_fwd(X, WEIGHT, BIAS, None, None, True)
    with pytest.raises(NotImplementedError, match="cache_seqlens and conv_state_indices have no stand-in"):
        conv.extension_update(X, BEFORE.clone(), WEIGHT, BIAS, True, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="activation must be None, 'silu' or 'swish', got 'relu'"):
        conv.causal_conv1d_fn(X, WEIGHT, activation="relu")
