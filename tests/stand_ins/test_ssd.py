"""The chunk scans' stand-ins against a loop in float64: outputs, states, gradients, the fused mixer, the gated norm."""

import pytest
import torch
import torch.nn.functional as F

import mamba_attn
from mamba_attn.stand_ins import ssd

BATCH, LENGTH, HEADS, WIDTH, GROUPS, STATES = 2, 7, 4, 3, 2, 5
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
LIMITS = (0.05, 0.9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def naive(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None):
    """(y * silu(z), state after the last step), step by step."""
    steps = F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*LIMITS)
    state = torch.zeros(BATCH, HEADS, WIDTH, STATES, dtype=x.dtype) if initial_states is None else initial_states
    rows = []
    for t in range(x.shape[1]):
        read = B[:, t].repeat_interleave(HEADS // GROUPS, 1)
        decay = torch.exp(steps[:, t] * A)[..., None, None]
        state = decay * state + (steps[:, t, :, None] * x[:, t])[..., None] * read[:, :, None]
        y = (state * C[:, t].repeat_interleave(HEADS // GROUPS, 1)[:, :, None]).sum(-1)
        if D is not None:
            y = y + (D[:, None] if D.ndim == 1 else D) * x[:, t]
        rows.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(rows, 1), state


def inputs(dtype=torch.float64, D="heads", z=True, states=True):
    long = (BATCH, LENGTH, HEADS, WIDTH)
    given = {
        "x": torch.randn(long), "dt": torch.randn(long[:3]), "A": -torch.rand(HEADS) - 0.1,
        "B": torch.randn(BATCH, LENGTH, GROUPS, STATES), "C": torch.randn(BATCH, LENGTH, GROUPS, STATES),
        "D": None if D is None else torch.randn((HEADS,) if D == "heads" else (HEADS, WIDTH)),
        "z": torch.randn(long) if z else None, "dt_bias": torch.randn(HEADS),
        "initial_states": torch.randn(BATCH, HEADS, WIDTH, STATES) if states else None,
    }  # fmt: skip
    return {name: None if t is None else t.to(dtype).requires_grad_() for name, t in given.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize(("D", "z", "states"), [("heads", True, True), ("width", False, False), (None, True, False)])
def test_output_states_and_gradients_are_the_loops(D, z, states, dtype, tolerance):
    given = inputs(dtype, D, z, states)
    truth = {name: None if t is None else t.detach().double().requires_grad_() for name, t in given.items()}
    y, last = ssd.mamba_chunk_scan_combined(
        **given, chunk_size=4, dt_softplus=True, dt_limit=LIMITS, return_final_states=True
    )
    expected, state = naive(**truth)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(last.double(), state, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    ends = [(out.double() * weights).sum() + end.double().sum() for out, end in ((y, last), (expected, state))]
    present = [name for name in NAMES if given[name] is not None]
    found, wanted = (
        torch.autograd.grad(end, [its[name] for name in present]) for end, its in zip(ends, (given, truth), strict=True)
    )
    for name, a, b in zip(present, found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=50 * tolerance, atol=50 * tolerance, msg=lambda m, n=name: n + m)


def test_bwd_writes_into_what_it_is_given_and_recomputes_the_output():
    given = {name: None if t is None else t.detach() for name, t in inputs().items()}
    out, kept, *_ = ssd._mamba_chunk_scan_combined_fwd(**given, chunk_size=4, dt_softplus=True)
    dout, dx = torch.randn_like(out), torch.empty_like(out)
    found = ssd._mamba_chunk_scan_combined_bwd(
        dout, out=kept, chunk_size=4, dt_softplus=True, dx=dx, recompute_output=True, **given
    )
    assert found[0] is dx
    assert len(found) == 10
    torch.testing.assert_close(found[9], out)


def test_several_sequences_in_one_row_are_refused():
    given = {name: t for name, t in inputs(states=False).items() if name != "initial_states"}
    with pytest.raises(NotImplementedError, match=r"supports whole sequences, not several in one row"):
        ssd.mamba_chunk_scan_combined(**given, chunk_size=4, seq_idx=torch.zeros(BATCH, LENGTH, dtype=torch.int32))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("past", [0, 2])
def test_the_fused_mixer_is_its_parts(normed, before, past):
    inner, wide = HEADS * WIDTH, HEADS * WIDTH + 2 * GROUPS * STATES
    row = torch.randn(BATCH, LENGTH, 2 * past + inner + wide + HEADS, dtype=torch.float64)
    weight, bias = torch.randn(wide, 4, dtype=torch.float64), torch.randn(wide, dtype=torch.float64)
    A, D = -torch.rand(HEADS, dtype=torch.float64), torch.randn(HEADS, dtype=torch.float64)
    dt_bias, norm = torch.randn(HEADS, dtype=torch.float64), torch.randn(inner, dtype=torch.float64)
    out = torch.randn(6, inner + past, dtype=torch.float64)
    found = ssd.mamba_split_conv1d_scan_combined(
        row, weight, bias, dt_bias, A, D, 4, dt_limit=LIMITS, rmsnorm_weight=norm if normed else None, rmsnorm_eps=1e-3,
        outproj_weight=out, headdim=WIDTH, ngroups=GROUPS, norm_before_gate=before,
    )  # fmt: skip
    side, z, xBC, dt = row.split([2 * past, inner, wide, HEADS], -1)
    padded = F.pad(xBC.mT, (3, 0))
    x, B, C = F.silu(F.conv1d(padded, weight[:, None], bias, groups=wide)).mT.split(
        [inner, GROUPS * STATES, GROUPS * STATES], -1
    )
    B, C = (t.unflatten(-1, (GROUPS, STATES)) for t in (B, C))
    y = naive(x.unflatten(-1, (HEADS, WIDTH)), dt, A, B, C, D, dt_bias=dt_bias)[0].flatten(2)
    gate = F.silu(z)
    if normed:
        y = y if before else y * gate
        groups = y.unflatten(-1, (GROUPS, -1))
        y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * norm
        y = y * gate if before else y
    else:
        y = y * gate
    first, second = side.chunk(2, -1)
    expected = torch.cat([F.silu(first) * second, y], -1) @ out.T
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_norm_of_groups(bias):
    x, weight = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    shift = torch.randn(12, dtype=torch.float64) if bias else None
    found = ssd.layernorm_fn(x, weight, shift, group_size=4, eps=1e-3)
    expected = F.layer_norm(x.unflatten(-1, (3, 4)), (4,), eps=1e-3).flatten(-2) * weight
    torch.testing.assert_close(found, expected if shift is None else expected + shift)


def test_where_mamba_ssm_is_missing_its_names_are_served():
    with mamba_attn.cpu_stand_ins():
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    assert mamba_chunk_scan_combined is ssd.mamba_chunk_scan_combined
    assert RMSNorm(6, group_size=3)(torch.randn(2, 6), torch.randn(2, 6)).shape == (2, 6)
