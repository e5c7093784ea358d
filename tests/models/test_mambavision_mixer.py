"""MambaVision's mixer: our equations against loops over taps and tokens."""

import pytest
import torch
import torch.nn.functional as F

from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models import mambavision_mixer
from mamba_attn.models.mambavision_mixer import MambaVisionMixer
from mamba_attn.ops import selective_scan
from tests.integrations.small_mambavision import Mixer, same_convolution

VARIANTS = {
    "as released": {},
    "even taps": {"d_conv": 4},
    "two taps": {"d_conv": 2},
    "wide": {"expand": 2, "d_state": 5},
    "biases": {"conv_bias": True, "bias": True},
    "one tap": {"d_conv": 1},
}


def close(actual, expected, tolerance=1e-12):
    scale = expected.detach().abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_output_and_every_gradient_equal_the_loops(name, length):
    truth = Mixer(12, **VARIANTS[name]).double()
    x = torch.randn(3, length, 12, dtype=torch.float64, requires_grad=True)
    expected = truth(x)
    record = mambavision_mixer.project(truth, x)
    actual = mambavision_mixer.finish(truth, record, selective_scan(record))
    close(actual, expected)
    weight = torch.randn_like(expected)
    variables = [x, *truth.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((actual * weight).sum(), variables),
        torch.autograd.grad((expected * weight).sum(), variables),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_our_module_has_the_names_and_the_equations():
    truth = Mixer(16).double()
    ours = MambaVisionMixer(16, d_state=3).double()
    ours.load_state_dict(truth.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    close(ours(x), truth(x))
    assert (ours.A_log._no_weight_decay, ours.D._no_weight_decay) == (True, True)


def test_the_step_has_its_bias_twice():
    mixer = Mixer(8).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    twice = mambavision_mixer.project(mixer, x).delta
    with torch.no_grad():
        mixer.dt_proj.weight.zero_()
    bias = F.softplus(2 * mixer.dt_proj.bias)
    close(mambavision_mixer.project(mixer, x).delta, bias[None, None, :, None].expand_as(twice))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 6])
def test_the_convolution_is_torchs_same(taps):
    conv = torch.nn.Conv1d(4, 4, taps, groups=4, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = F.conv1d(x.mT, conv.weight, conv.bias, padding="same", groups=4).mT
    close(mambavision_mixer._convolved(conv, x), expected)
    close(same_convolution(x, conv), expected)


@pytest.mark.parametrize("grid", [(5, 7), (4, 8), (3, 3)])
def test_windows_are_routes_of_one_image(grid):
    layout = TokenLayout(grid, window=4)
    mixer = MambaVisionMixer(8, d_state=3).double()
    windows = len(layout.windows())
    x = torch.randn(2 * windows, 16, 8, dtype=torch.float64)
    close(mixer(x, layout), mixer(x))
    record, alone = mambavision_mixer.project(mixer, x, layout=layout), mambavision_mixer.project(mixer, x)
    assert (record.batch, record.routes, record.length, record.tokens) == (2, windows, 16, 16 * windows)
    assert (alone.batch, alone.routes, alone.tokens, alone.layout) == (2 * windows, 1, 16, None)
    for image in range(2):
        for window, tokens in enumerate(layout.windows()):
            one = 2 * [image * windows + window]
            assert torch.equal(record.u[image, window], alone.u[one[0], 0])
            assert torch.equal(record.delta[image, window], alone.delta[one[0], 0])
            assert torch.equal(record.bypass[image][:, tokens], alone.bypass[one[0]])
    assert torch.equal(record.read_order, layout.windows())
    assert record.u.stride(2) == record.delta.stride(2) == 1


def test_what_went_around_a_scan_must_be_there():
    record = ScanRecord.from_scan(
        torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 3), -torch.ones(1, 2, 1), *torch.randn(2, 1, 1, 1, 1, 3)
    )
    with pytest.raises(ValueError, match=r"side_by_side\(record\): the record has no bypass"):
        mambavision_mixer.side_by_side(record, torch.randn(1, 2, 3))


def test_half_precision_scans_in_float32():
    mixer = MambaVisionMixer(16)
    x = torch.randn(2, 9, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        record = mambavision_mixer.project(mixer, x)
        output = mixer(x)
    assert record.u.dtype == record.bypass.dtype == output.dtype == torch.bfloat16
    assert record.delta.dtype == record.A.dtype == torch.float32
    expected = mixer(x)
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.detach().abs().max().item())
