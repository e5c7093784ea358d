"""Orders are measured in spite of what else mixes tokens, of gates that are nearly shut, and of single steps."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamba_attn
from mamba_attn import orders
from mamba_attn.tracing.undisturbed import settings
from tests.tracing.foreign import CHANNELS, Cross, Line, Net, Scan

TOKENS = 20
FORTH = torch.arange(TOKENS)[None]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Gated(nn.Module):
    """A mixer whose output is multiplied by what a mean over its tokens says, as LocalMamba's and squeeze-excite's."""

    def __init__(self, pool):
        super().__init__()
        self.mixer, self.gate, self.pool = Line(), nn.Linear(CHANNELS, CHANNELS), pool
        nn.init.normal_(self.gate.weight, std=5.0)

    def forward(self, x):
        y = 5 * self.mixer(x)
        return y * torch.sigmoid(self.gate(self.pool(y)))


class Coarse(nn.Module):
    """A mixer of tokens from last to first, in a U: what it gives also goes to a coarser grid and back."""

    def __init__(self):
        super().__init__()
        self.mixer = Line()
        self.down, self.up = nn.Conv2d(CHANNELS, CHANNELS, 2, 2), nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2)

    def forward(self, x):
        y = self.mixer(x.flip(1))
        coarse = self.up(self.down(y.mT.unflatten(2, (4, 5))[..., :4]))
        return (y + 50 * F.pad(coarse, (0, 1)).flatten(2).mT).flip(1)


class Merged(nn.Module):
    """Two scans whose outputs a mean merges: it is all the gradient there is."""

    def __init__(self):
        super().__init__()
        self.forth, self.back = Scan(gated=False), Scan(gated=False)

    def forward(self, x):
        return torch.stack([self.forth(x.mT), self.back(x.mT.flip(-1)).flip(-1)]).mean(0).mT


POOLS = {
    "mean": lambda y: y.mean(1, keepdim=True),
    "torch.mean": lambda y: torch.mean(y, 1, keepdim=True),
    "adaptive pool": lambda y: F.adaptive_avg_pool1d(y.mT, 1).mT,
}
MIXERS = {
    **{f"gate, {name}": (lambda pool=pool: Gated(pool), "mixers.0.mixer") for name, pool in POOLS.items()},
    "coarse grid": (Coarse, "mixers.0.mixer"),
    "merged by a mean": (Merged, "mixers.0"),
}


@pytest.mark.parametrize("case", MIXERS)
def test_a_step_stays_on_its_token_whatever_else_its_gradient_reaches(case):
    make, name = MIXERS[case]
    model = Net(make(), Line()).eval()
    x = torch.randn(2, 3, 16, 20)
    with torch.no_grad():
        plain = model(x)
        with mamba_attn.trace(model) as trace:
            assert torch.equal(model(x), plain)
    ways = [trace[f"{name}.{way}"].scan.write_order for way in ("forth", "back")]
    first, last = reversed(ways) if case == "coarse grid" else ways  # in the frame of the outermost tensor
    assert torch.equal(first, FORTH)
    assert torch.equal(last, FORTH.flip(1))
    assert trace[f"{name}.forth"].share > 0.9


class Shut(nn.Module):
    """A gate behind the scan, one for all channels, that leaves some tokens 1e-9 of what it leaves others."""

    def __init__(self):
        super().__init__()
        self.scan = Scan(gated=False)

    def forward(self, x):
        return self.scan(x.mT).mT * F.silu(8 * x[..., :1] - 8)


def test_what_a_gate_shuts_is_no_padding():
    model = Net(Shut()).eval()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(2, 3, 16, 20))
    scan = trace["mixers.0.scan"].scan
    assert scan.tokens == TOKENS
    assert torch.equal(scan.write_order, FORTH)


def test_a_scan_of_one_step_has_its_token():
    model = Net(Cross(partial(orders.cross, "raster")), grid=True).eval()
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(torch.randn(3, 3, 4, 4))
    (layer,) = trace.layers
    assert layer.scan.write_order.tolist() == [[0]] * 4
    assert layer.layout.grid == (1, 1)
    assert layer.attention().shape == (3, 1, 1)


def test_a_library_that_a_model_keeps_is_no_setting():
    model = Line()
    before = settings(model)
    model.library = torch
    assert settings(model) != before  # by its name; torch.classes answers every attribute by an error
