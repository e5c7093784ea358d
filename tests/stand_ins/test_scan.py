"""The compiled scans' stand-ins against a loop in float64: outputs, states, gradients, types, layouts."""

import pytest
import torch

from mamba_attn.stand_ins import mamba_ssm, scan
from mamba_attn.stand_ins.scan import Inputs
from tests.stand_ins import naive

BATCH, CHANNELS, STATES, LENGTH = 2, 6, 3, 7
SHAPES = {
    "shared": (BATCH, STATES, LENGTH),
    "one group": (BATCH, 1, STATES, LENGTH),
    "groups": (BATCH, 3, STATES, LENGTH),
    "constant": (CHANNELS, STATES),
}
NAMES = Inputs._fields


def inputs(B="shared", C="shared", dtype=torch.float64, z=True, D=True, bias=True):
    long = (BATCH, CHANNELS, LENGTH)
    given = Inputs(
        torch.randn(long), torch.rand(long), -torch.rand(CHANNELS, STATES) - 0.1,
        torch.randn(SHAPES[B]), torch.randn(SHAPES[C]), torch.randn(CHANNELS) if D else None,
        torch.randn(long) if z else None, torch.randn(CHANNELS) if bias else None,
    )  # fmt: skip
    kinds = {name: dtype if name in ("u", "delta", "B", "C", "z") else _wide(dtype) for name in NAMES}
    return Inputs(*(None if t is None else t.to(kinds[n]) for n, t in zip(NAMES, given, strict=True)))


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def truth(given, softplus=True):
    """(y, last state, gradients of sum(weights * y) by name), float64."""
    leaves = Inputs(*(None if t is None else t.double().requires_grad_() for t in given))
    y, last = naive.scan(*leaves, softplus)
    present = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    found = torch.autograd.grad((y * weights()).sum(), list(present.values()))
    return y.detach(), last.detach(), dict(zip(present, found, strict=True))


def weights():
    return torch.linspace(-1, 1, BATCH * CHANNELS * LENGTH, dtype=torch.float64).view(BATCH, CHANNELS, LENGTH)


def call_bwd(given, softplus=True, dz=None, again=False):
    return scan.bwd(*given, weights().to(given.u.dtype), None, None, dz, softplus, again)


CASES = [
    ("shared", "shared"), ("one group", "one group"), ("groups", "groups"),
    ("constant", "shared"), ("shared", "constant"), ("constant", "groups"), ("constant", "constant"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize(("B", "C"), CASES)
def test_fwd_and_bwd_are_the_loop(B, C, dtype, tolerance):
    given = inputs(B, C, dtype)
    y, last, gradients = truth(given)
    out, states, gated = scan.fwd(*given, True)
    plain, _, _ = truth(given._replace(z=None))
    naive.close(out, plain, tolerance)
    naive.close(gated, y, tolerance)
    naive.close(states[:, :, -1, 1::2], last, tolerance)
    *found, dz = call_bwd(given)
    order = [*NAMES[:6], "delta_bias"]
    for name, gradient in zip([*order, "z"], [*found, dz], strict=True):
        naive.close(gradient, gradients[name], 5 * tolerance)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("missing", ["z", "D", "bias", "all"])
def test_what_may_be_missing(missing, softplus):
    given = inputs("groups", "groups", **{name: missing not in (name, "all") for name in ("z", "D", "bias")})
    if not softplus and given.delta_bias is not None:
        given = given._replace(delta_bias=given.delta_bias.abs())
    y, _, gradients = truth(given, softplus)
    results = scan.fwd(*given, softplus)
    assert len(results) == (2 if given.z is None else 3)
    naive.close(results[-1] if given.z is not None else results[0], y, 1e-11)
    found = call_bwd(given, softplus)
    assert len(found) == (7 if given.z is None else 8)
    for name, gradient in zip([*NAMES[:6], "delta_bias", "z"], found, strict=False):
        assert (gradient is None) == (name not in gradients)
        if gradient is not None:
            naive.close(gradient, gradients[name], 1e-11)


def test_steps_of_extreme_size_stay_finite():
    given = inputs(dtype=torch.float32)
    given = given._replace(
        delta_bias=torch.zeros(CHANNELS), delta=torch.logspace(-6, 3, LENGTH).expand(BATCH, CHANNELS, -1).contiguous()
    )
    y, _, _ = truth(given, softplus=False)
    naive.close(scan.fwd(*given, False)[2], y, 1e-5)
    assert all(gradient.isfinite().all() for gradient in call_bwd(given, softplus=False))


@pytest.mark.parametrize("least", [0.0, 0.3])
def test_states_that_do_not_decay(least):
    given = inputs("groups", "groups")
    given = given._replace(A=(given.A + given.A.abs().max() + least))
    y, last, gradients = truth(given)
    out = scan.fwd(*given, True)
    naive.close(out[2], y, 1e-11)
    naive.close(out[1][:, :, -1, 1::2], last, 1e-11)
    naive.close(call_bwd(given)[2], gradients["A"], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    given = inputs("groups", "groups", dtype)
    y, _, gradients = truth(given)
    out, states, gated = scan.fwd(*given, True)
    assert (out.dtype, gated.dtype, states.dtype) == (dtype, dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    assert torch.all((gated.double() - y).abs() <= 0.51 * eps * y.abs() + 1e-6)  # rounded once, at the end
    found = dict(zip([*NAMES[:6], "delta_bias", "z"], call_bwd(given), strict=True))
    for name, gradient in found.items():
        assert gradient.dtype == getattr(given, name).dtype
        naive.close(gradient, gradients[name], 2 * eps)


def test_vmamba_s_extensions():
    given = inputs("groups", "groups", torch.float16, z=False)
    y, _, gradients = truth(given)
    arguments = (*given[:6], given.delta_bias, True)
    wide, _ = scan.oflex_fwd(*arguments, 1, True)
    half, _ = scan.oflex_fwd(*arguments, 1, False)
    core, _ = scan.core_fwd(*arguments, 1)
    assert (wide.dtype, half.dtype, core.dtype) == (torch.float32, torch.float16, torch.float16)
    naive.close(wide, y, 1e-5)
    assert torch.equal(half, core)
    assert torch.equal(half, wide.half())
    found = scan.core_bwd(*given[:6], given.delta_bias, weights().float(), None, True, 1)
    for name, gradient in zip([*NAMES[:6], "delta_bias"], found, strict=True):
        naive.close(gradient, gradients[name], 2e-3)


def test_dz_is_written_where_it_was_asked_for():
    given = inputs()
    _, _, gradients = truth(given)
    dxz = torch.full((BATCH, 2 * CHANNELS, LENGTH), torch.nan, dtype=torch.float64)
    dz = dxz[:, CHANNELS:]
    results = call_bwd(given, dz=dz, again=True)
    assert results[7] is dz
    naive.close(dxz[:, CHANNELS:], gradients["z"], 1e-11)
    assert torch.equal(results[8], scan.fwd(*given, True)[2])


def test_results_lie_in_memory_as_the_extensions_lay_them():
    given = inputs(dtype=torch.float32)
    across = given.delta.transpose(0, 1).contiguous().transpose(0, 1)
    for delta in (given.delta, across):
        out, _, _ = scan.fwd(*given._replace(delta=delta), True)
        assert out.stride() == delta.stride()
    out, _ = scan.oflex_fwd(*given[:6], given.delta_bias, True, 1, True)
    assert out.view(BATCH, 3, 2, LENGTH).shape == (BATCH, 3, 2, LENGTH)  # VMamba views it


def test_states_are_computed_when_read():
    given = inputs()
    states = scan.fwd(*given, True)[1]
    assert states.shape == (BATCH, CHANNELS, 1, 2 * STATES)
    assert states.dtype == torch.float64
    assert states._found is None
    delta = torch.nn.functional.softplus(given.delta + given.delta_bias[:, None])
    naive.close(states[:, :, -1, 0::2], torch.exp(given.A * delta.sum(-1)[..., None]), 1e-11)
    assert states._found is not None
    assert (states + 0).isfinite().all()


def test_states_survive_being_saved_for_backward():
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(scan.fwd(*inputs()._replace(u=u), True)[1])
            return u.clone()

        @staticmethod
        def backward(ctx, gradient):
            assert ctx.saved_tensors[0].shape == (BATCH, CHANNELS, 1, 2 * STATES)
            return gradient

    Keep.apply(inputs().u.requires_grad_()).sum().backward()


def _complex_truth(given, softplus=True):
    """mamba_ssm's reference in words of its own: every state complex, the output twice the real part."""
    delta = given.delta + given.delta_bias[:, None]
    delta = torch.nn.functional.softplus(delta) if softplus else delta
    B, C = (
        t if t.ndim == 2 else torch.complex(t[..., 0::2].contiguous(), t[..., 1::2].contiguous())
        for t in (given.B, given.C)
    )
    state, found = torch.zeros(BATCH, CHANNELS, STATES, dtype=given.A.dtype), []
    for t in range(LENGTH):
        b, c = (x if x.ndim == 2 else x[..., t].reshape(BATCH, -1, STATES).repeat_interleave(
            CHANNELS // x[..., t].reshape(BATCH, -1, STATES).shape[1], dim=1) for x in (B, C))  # fmt: skip
        step = delta[:, :, t, None]
        state = torch.exp(step * given.A) * state + step * given.u[:, :, t, None] * b
        found.append(2 * (state * c).sum(-1).real)
    y = torch.stack(found, -1) + given.D[:, None] * given.u
    return y * torch.nn.functional.silu(given.z), state


def complex_inputs(B="shared", C="shared"):
    """Inputs of complex states: constant B and C are complex, others have both parts in turns."""
    given = inputs(B, C)

    def wider(t, shape):
        if t.ndim == 2:
            return torch.complex(t, torch.randn_like(t))
        return torch.randn(*SHAPES[shape][:-1], 2 * LENGTH, dtype=torch.float64)

    A = torch.complex(given.A, torch.randn_like(given.A))
    return given._replace(A=A, B=wider(given.B, B), C=wider(given.C, C))


@pytest.mark.parametrize(("B", "C"), CASES)
def test_complex_states(B, C):
    given = complex_inputs(B, C)
    leaves = Inputs(*(t.clone().requires_grad_() for t in given))
    y, last = _complex_truth(leaves)
    expected = torch.autograd.grad((y * weights()).sum(), list(leaves))
    _, states, gated = scan.fwd(*given, True)
    naive.close(gated, y.detach(), 1e-11)
    torch.testing.assert_close(states[:, :, -1, 1::2], last.detach(), rtol=1e-9, atol=1e-11)
    du, ddelta, dA, dB, dC, dD, dbias, dz = call_bwd(given)
    for found, truth_, given_ in zip((du, ddelta, dA, dB, dC, dD, dz, dbias), expected, given, strict=True):
        assert found.shape == given_.shape
        torch.testing.assert_close(found, truth_, rtol=1e-9, atol=1e-11)


def test_states_of_every_step():
    """Spatial-Mamba's extension: what it returns, read by any C, is the scan's output; D is without effect."""
    given = inputs("groups", "groups", z=False, D=False)
    states, kept = scan.states_fwd(given.u, given.delta, given.A, given.B, None, given.delta_bias, True)
    assert states.shape == (BATCH, CHANNELS, STATES, LENGTH)
    y = (states * given.C.repeat_interleave(CHANNELS // 3, dim=1)).sum(2)
    naive.close(y, scan.core_fwd(*given[:5], None, given.delta_bias, True)[0], 1e-11)
    torch.testing.assert_close(kept[:, :, -1, 1::2], states[..., -1])
    dout = torch.randn_like(states)
    leaves = [t.clone().requires_grad_() for t in (given.u, given.delta, given.A, given.B, given.delta_bias)]
    u, delta, A, B, bias = leaves
    step = torch.nn.functional.softplus(delta + bias[:, None])
    state, found = torch.zeros(BATCH, CHANNELS, STATES, dtype=torch.float64), []
    for t in range(LENGTH):
        b = B[..., t].repeat_interleave(CHANNELS // 3, dim=1)
        state = torch.exp(step[:, :, t, None] * A) * state + (step * u)[:, :, t, None] * b
        found.append(state)
    expected = torch.autograd.grad((torch.stack(found, -1) * dout).sum(), leaves)
    D = torch.ones(CHANNELS, dtype=torch.float64)
    du, ddelta, dA, dB, dD, dbias = scan.states_bwd(
        given.u, given.delta, given.A, given.B, D, given.delta_bias, dout, kept, True
    )
    for gradient, truth_ in zip((du, ddelta, dA, dB, dbias), expected, strict=True):
        torch.testing.assert_close(gradient, truth_, rtol=1e-9, atol=1e-11)
    assert not dD.any()


def test_one_state_without_an_axis():
    """VMamba's selective_scan_cuda_ndstate."""
    given = inputs("groups", "groups", z=False)
    A, B, C = given.A[:, :1], given.B[:, :, :1], given.C[:, :, :1]
    short, long = (A[:, 0], B[:, :, 0], C[:, :, 0]), (A, B, C)
    ends = (given.D, given.delta_bias)
    y, _ = scan.ndstate_fwd(given.u, given.delta, *short, *ends, True)
    assert torch.equal(y, scan.core_fwd(given.u, given.delta, *long, *ends, True)[0])
    found = scan.ndstate_bwd(given.u, given.delta, *short, *ends, weights(), None, True)
    expected = scan.core_bwd(given.u, given.delta, *long, *ends, weights(), None, True)
    for gradient, truth_, of in zip(found[2:5], expected[2:5], short, strict=True):
        assert torch.equal(gradient, truth_.reshape(of.shape))


def test_a_scan_of_both_axes():
    """2DMamba's extension against its definition: a state goes along its row, then down the column."""
    rows, columns = 2, 3
    given = Inputs(*(t[..., : rows * columns] if t.ndim > 2 else t for t in inputs("groups", "groups")))
    leaves = [t.clone().requires_grad_() for t in given]
    u, delta, A, B, C, D, _, bias = leaves
    step = torch.nn.functional.softplus(delta + bias[:, None])
    B, C = (t.repeat_interleave(CHANNELS // 3, dim=1) for t in (B, C))
    y = []
    for i in range(rows):
        for j in range(columns):
            total = D * u[:, :, i * columns + j]
            for k in range(i + 1):
                for m in range(j + 1):
                    path = [k * columns + n for n in range(m + 1, j + 1)] + [
                        n * columns + j for n in range(k + 1, i + 1)
                    ]
                    decay = torch.exp(step[:, :, path].sum(-1)[..., None] * A)
                    at = k * columns + m
                    total = total + (C[..., i * columns + j] * decay * B[..., at]).sum(-1) * step[..., at] * u[..., at]
            y.append(total)
    y = torch.stack(y, -1)
    some = [given.u, given.delta, given.A, given.B, given.C, given.D, None, given.delta_bias]
    out, _ = scan.grid_fwd(*some, True, rows, columns)
    naive.close(out, y.detach(), 1e-11)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad((y * dout).sum(), [*leaves[:6], bias])
    found = scan.grid_bwd(*some, dout, None, None, None, True, False, rows, columns)
    for gradient, truth_ in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth_, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="6 steps has no grid of 2 x 2"):
        scan.grid_fwd(*some, True, 2, 2)


def test_groups_that_do_not_divide_the_channels():
    four = torch.randn(BATCH, 4, STATES, LENGTH)
    with pytest.raises(ValueError, match="6 channels cannot be shared by 4 groups"):
        scan.fwd(*inputs()._replace(B=four, C=four), True)


def test_no_last_state_may_be_asked_for_by_none():
    """As MambaVision's mixer does."""
    given = inputs()
    y = mamba_ssm.selective_scan_fn(*given, delta_softplus=True, return_last_state=None)
    assert torch.equal(y, mamba_ssm.selective_scan_fn(*given, delta_softplus=True))
