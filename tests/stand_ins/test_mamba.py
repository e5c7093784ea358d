"""The fused norms, the fused mixers, one step of the scan, and ``Mamba``, against loops in float64."""

import pytest
import torch
import torch.nn.functional as F

from mamba_attn.stand_ins import mamba_ssm, triton
from mamba_attn.stand_ins.mamba_ssm import Mamba
from tests.stand_ins import naive

FIXED = torch.Generator().manual_seed(0)
X, RESIDUAL, SECOND = (torch.randn(2, 3, 5, generator=FIXED).double() for _ in range(3))
W, W1, BIAS = (torch.randn(5, generator=FIXED).double() for _ in range(3))


def test_norms_are_those_of_the_sum():
    naive.close(triton.rms_norm_fn(X, W, None, eps=1e-3), naive.rms_norm(X, W, 1e-3), 1e-12)
    naive.close(triton.rms_norm_fn(X, W, BIAS, eps=1e-3), naive.rms_norm(X, W, 1e-3) + BIAS, 1e-12)
    y, total = triton.rms_norm_fn(X, W, None, RESIDUAL, prenorm=True)
    naive.close(total, X + RESIDUAL, 1e-12)
    naive.close(y, naive.rms_norm(X + RESIDUAL, W, 1e-6), 1e-12)
    rows = torch.rand(2, 3, dtype=torch.float64)
    naive.close(triton.rms_norm_fn(X, W, None, rowscale=rows), naive.rms_norm(X * rows[..., None], W, 1e-6), 1e-12)
    y, y1, total = triton.layer_norm_fn(X, W, BIAS, RESIDUAL, SECOND, W1, prenorm=True)
    naive.close(total, X + RESIDUAL + SECOND, 1e-12)
    centred = total - total.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    naive.close(y, scaled * W + BIAS, 1e-12)
    naive.close(y1, scaled * W1, 1e-12)


def test_norms_take_both_orders_of_arguments():
    new = triton.rms_norm_fn(X, W, BIAS, RESIDUAL, None, None, None, 1e-3, 0.0, None, True)
    old = triton.old_rms_norm_fn(X, W, BIAS, RESIDUAL, True, False, 1e-3)
    for one, other in zip(new, old, strict=True):
        assert torch.equal(one, other)
    old = triton.old_layer_norm_fn(X, W, BIAS, RESIDUAL, 1e-3, False, False, True)
    assert torch.equal(old, new[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_residual_keeps_its_type(dtype):
    x, residual, weight = X.to(dtype), RESIDUAL.float(), W.to(dtype)
    y, total = triton.rms_norm_fn(x, weight, None, residual, prenorm=True)
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    assert torch.equal(total, x.float() + residual)
    exact = naive.rms_norm(total.double(), weight.double(), 1e-6)
    assert torch.all((y.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6)
    first = {
        wide: triton.rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=wide)[1] for wide in (True, False)
    }
    assert first[True].dtype == torch.float32
    assert first[False].dtype == dtype
    assert triton.rms_norm_fn(X, W, None, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float64


def test_dropout_drops_what_its_masks_say():
    options = {"dropout_p": 0.5, "prenorm": True, "return_dropout_mask": True}
    _, total, mask, mask1 = triton.rms_norm_fn(X, W, None, x1=SECOND, **options)
    assert mask.dtype == torch.bool
    assert not torch.equal(mask, mask1)
    naive.close(total, X * mask * 2 + SECOND * mask1 * 2, 1e-12)


def test_norms_are_differentiable():
    leaves = [t.clone().requires_grad_() for t in (X, W, BIAS, RESIDUAL)]
    assert torch.autograd.gradcheck(lambda *t: triton.rms_norm_fn(*t, prenorm=True), leaves)
    assert torch.autograd.gradcheck(lambda *t: triton.layer_norm_fn(*t, prenorm=True), leaves)


def test_rms_norm_module():
    module = triton.RMSNorm(5, eps=1e-3, dropout_p=0.5, dtype=torch.float64)
    assert list(module.state_dict()) == ["weight"]
    module.weight.data.copy_(W)
    naive.close(module.eval()(X), naive.rms_norm(X, W, 1e-3), 1e-12)
    y, total = module(X, RESIDUAL, prenorm=True)
    naive.close(y, naive.rms_norm(total, W, 1e-3), 1e-12)
    assert not torch.equal(module.train()(X), module.eval()(X))


CHANNELS, STATES, RANK, LENGTH = 4, 3, 2, 7


def mixer_arguments():
    shapes = {
        "xz": (2, 2 * CHANNELS, LENGTH), "conv": (CHANNELS, 1, 4), "conv_bias": (CHANNELS,),
        "x_proj": (RANK + 2 * STATES, CHANNELS), "dt_proj": (CHANNELS, RANK), "D": (CHANNELS,), "dt_bias": (CHANNELS,),
        "B_bias": (STATES,), "C_bias": (STATES,), "out": (5, CHANNELS), "out_bias": (5,),
    }  # fmt: skip
    found = {name: torch.randn(shape, dtype=torch.float64) / 2 for name, shape in shapes.items()}
    for name in ("A", "A_b"):
        found[name] = -torch.rand(CHANNELS, STATES, dtype=torch.float64)
    return found


def naive_mixer(a, A, flipped=False, biases=True):
    x, z = a["xz"][:, :CHANNELS], a["xz"][:, CHANNELS:]
    u = naive.conv(x, a["conv"][:, 0], a["conv_bias"], silu=True)
    low = torch.einsum("rc,bcl->brl", a["x_proj"], u)
    delta = torch.einsum("cr,brl->bcl", a["dt_proj"], low[:, :RANK])
    B, C = low[:, RANK : RANK + STATES], low[:, RANK + STATES :]
    if biases:
        B, C = B + a["B_bias"][:, None], C + a["C_bias"][:, None]
    if flipped:
        u, delta, B, C, z = (t.flip(-1) for t in (u, delta, B, C, z))
    y = naive.scan(u, delta, A, B, C, a["D"], z, a["dt_bias"], softplus=True)[0]
    return y.flip(-1) if flipped else y


def test_fused_mixers_are_their_parts():
    a = {name: t.requires_grad_() for name, t in mixer_arguments().items()}
    head = (a["xz"], a["conv"], a["conv_bias"], a["x_proj"], a["dt_proj"])
    out = (a["out"], a["out_bias"])
    tail = (None, None, a["D"], a["dt_bias"], a["B_bias"], a["C_bias"], True)
    y = naive_mixer(a, a["A"])
    both = y + naive_mixer(a, a["A_b"], flipped=True)
    for found, expected in [
        (mamba_ssm.mamba_inner_fn_no_out_proj(*head, a["A"], *tail), y),
        (mamba_ssm.mamba_inner_fn(*head, *out, a["A"], *tail), y.mT @ a["out"].T + a["out_bias"]),
        (mamba_ssm.bimamba_inner_fn(*head, *out, a["A"], a["A_b"], *tail), both.mT @ a["out"].T + a["out_bias"]),
    ]:
        naive.close(found, expected, 1e-11)
        gradients = [
            torch.autograd.grad(t.sin().sum(), list(a.values()), allow_unused=True, retain_graph=True)
            for t in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                naive.close(one, other, 1e-10)


def test_scan_with_its_last_state():
    u, delta, B = torch.randn(2, 4, 7).double(), torch.rand(2, 4, 7).double(), torch.randn(2, 3, 7).double()
    A = -torch.rand(4, 3).double()
    y, last = mamba_ssm.selective_scan_fn(u.requires_grad_(), delta, A, B, B, return_last_state=True)
    truth, state = naive.scan(u, delta, A, B, B)
    naive.close(y, truth, 1e-11)
    naive.close(last, state, 1e-11)
    assert torch.equal(
        mamba_ssm.selective_scan_fn(u, delta, A, B, B, return_last_state=None), y
    )  # as MambaVision calls it
    assert y.requires_grad
    assert not last.requires_grad
    assert mamba_ssm.selective_scan_fn(u.half(), delta.half(), A.float(), B.half(), B.half()).dtype == torch.float16


@pytest.mark.parametrize("bias", [True, False])
def test_mamba_is_its_equations(bias):
    mixer = Mamba(6, d_state=STATES, d_conv=3, expand=2, dt_rank=RANK, bias=bias, conv_bias=bias, layer_idx=4).double()
    names = {"A_log", "D", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "in_proj.weight"}
    names |= {"out_proj.weight"} | ({"conv1d.bias", "in_proj.bias", "out_proj.bias"} if bias else set())
    assert set(mixer.state_dict()) == names
    x = torch.randn(2, LENGTH, 6, dtype=torch.float64)
    xz = mixer.in_proj(x).mT
    u = naive.conv(xz[:, :12], mixer.conv1d.weight[:, 0], mixer.conv1d.bias, silu=True)
    dt, B, C = mixer.x_proj(u.mT).mT.split([RANK, STATES, STATES], dim=1)
    delta = torch.einsum("cr,brl->bcl", mixer.dt_proj.weight, dt)
    A = -mixer.A_log.exp()
    y, _ = naive.scan(u, delta, A, B, C, mixer.D, xz[:, 12:], mixer.dt_proj.bias, softplus=True)
    naive.close(mixer(x), mixer.out_proj(y.mT), 1e-11)
    step = F.softplus(mixer.dt_proj.bias)
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 0.1 * 1.001
    assert torch.equal(mixer.A_log[0].exp().round(), torch.arange(1.0, STATES + 1).double())


def test_mamba_says_what_it_cannot():
    with pytest.raises(TypeError, match=r"bimamba_type: these belong to a fork .*mamba-1p1p1"):
        Mamba(6, bimamba_type="v2")
    with pytest.raises(NotImplementedError, match="whole sequences, not steps with a cache"):
        Mamba(6)(torch.randn(1, 3, 6), object())
    for refused in (mamba_ssm.GenerationMixin().generate, mamba_ssm.InferenceParams, mamba_ssm.load_config_hf):
        with pytest.raises(NotImplementedError, match="needs the package transformers"):
            refused("x")


@pytest.mark.parametrize(("heads", "groups"), [(None, None), (4, 2), (3, 1)])
def test_a_step_continues_the_scan(heads, groups):
    shape = (2, 5) if heads is None else (2, heads, 5)
    flat = 5 * (heads or 1)
    x, dt, z = (torch.randn(2, flat, LENGTH, dtype=torch.float64) for _ in range(3))
    A, D, bias = -torch.rand(flat, STATES).double(), torch.randn(flat).double(), torch.randn(flat).double()
    B, C = (torch.randn(2, groups or 1, STATES, LENGTH, dtype=torch.float64) for _ in range(2))
    y, last = naive.scan(x, dt, A, B, C, D, z, bias, softplus=True)
    own = (lambda t: t) if heads is None else lambda t: t.unflatten(0, (heads, 5))
    state, found = torch.zeros(*shape, STATES, dtype=torch.float64), []
    for t in range(LENGTH):
        at = [v[..., t].reshape(shape) for v in (x, dt)]
        bc = [v[..., t] if heads else v[:, 0, :, t] for v in (B, C)]
        found.append(
            triton.selective_state_update(state, *at, own(A), *bc, own(D), z[..., t].reshape(shape), own(bias), True)
        )
    naive.close(torch.stack([step.reshape(2, flat) for step in found], -1), y, 1e-11)
    naive.close(state.reshape(last.shape), last, 1e-11)
    with pytest.raises(NotImplementedError, match="state_batch_indices has no stand-in"):
        triton.selective_state_update(state, *at, own(A), *bc, state_batch_indices=torch.arange(2))
