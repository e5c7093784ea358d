"""Maps of lines, images, volumes and spectrograms, from a mixer that sorts the tokens of every image by a score."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import trace
from mamba_attn.attribution import AttentionRollout, MambaAttribution, RawAttention
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.testing import check_adapter
from mamba_attn.tracing import adapters

CHANNELS, STATES = 6, 3


class Sorted(nn.Module):
    """h = exp(delta A) h + gain B u along the tokens in the order of their scores, and D(x) u."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.project = nn.Linear(CHANNELS, 1 + 3 * CHANNELS + 2 * STATES)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.A = nn.Parameter(-torch.rand(CHANNELS, STATES) - 0.1)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        score, delta, gain, D, B, C = self.project(x).split([1, *[CHANNELS] * 3, STATES, STATES], dim=-1)
        return score.squeeze(-1).argsort(1), F.softplus(delta), gain, D, B, C

    def forward(self, x: Tensor) -> Tensor:
        order, delta, gain, D, B, C = self.parts(x)
        y = torch.zeros_like(x)
        for image in range(len(x)):
            h = x.new_zeros(CHANNELS, STATES)
            for t in order[image].tolist():
                h = torch.exp(delta[image, t, :, None] * self.A) * h
                h = h + (gain[image, t] * x[image, t])[:, None] * B[image, t]
                y[image, t] = (h * C[image, t]).sum(-1)
        return self.out(y + D * x)


class Model(nn.Module):
    def __init__(self, grid: tuple[int, ...], colours: int | None = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.colours = colours
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid) - 1]
        self.stem = convolution(colours or 1, CHANNELS, 2, stride=2)
        self.mixers = nn.ModuleList(Sorted(grid) for _ in range(2))
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images if self.colours else images.unsqueeze(1)).flatten(2).mT
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.head(x.mean(1))


class SortedAdapter(adapters.Adapter):
    family = "Sorted"

    def recognises(self, module: nn.Module) -> bool:
        return isinstance(module, Sorted)

    def project(self, module, x, *, rules, seen):  # type: ignore[no-untyped-def]
        order, delta, gain, D, B, C = module.parts(x)
        u, delta, gain, B, C = (each.mT.unsqueeze(1) for each in (x, delta, gain, B, C))
        return ScanRecord.from_tokens(
            u, delta, module.A[None], B.unsqueeze(2), C.unsqueeze(2), D.mT, gain=gain, order=order.unsqueeze(1),
            layout=TokenLayout(grid=module.grid, patch_size=2),
        )  # fmt: skip

    def scan_output(self, module, record, y):  # type: ignore[no-untyped-def]
        return module.out, y.mT

    def finish(self, module, record, y, rules):  # type: ignore[no-untyped-def]
        return module.out(y.mT)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", [SortedAdapter()])


CASES = [((5,), 3), ((3, 5), 3), ((2, 3, 5), 3), ((3, 5), None)]
cases = pytest.mark.parametrize(("grid", "colours"), CASES, ids=["line", "image", "volume", "spectrogram"])


def batch(grid: tuple[int, ...], colours: int | None) -> Tensor:
    return torch.randn(2, *(() if colours is None else (colours,)), *(2 * n for n in grid))


@cases
def test_the_adapter_of_such_a_mixer_holds_the_laws(grid: tuple[int, ...], colours: int | None) -> None:
    report = check_adapter(Model(grid, colours).eval(), batch(grid, colours), adapters=[SortedAdapter()])
    assert max(report.output_error, report.matrix_error) < 1e-5


@cases
@pytest.mark.parametrize("method", [RawAttention, AttentionRollout, MambaAttribution])
def test_maps_have_the_inputs_sizes(method: type, grid: tuple[int, ...], colours: int | None) -> None:
    model, images = Model(grid, colours).eval(), batch(grid, colours)
    size = tuple(2 * n for n in grid)
    maps = method(model).attribute(images, target=1)
    assert maps.shape == (2, 1, *size)
    cells = method(model).attribute(images, target=1, grid=True)
    assert cells.shape == (2, 1, *grid)
    pixels = TokenLayout(grid=grid, patch_size=2).to_pixels(cells)
    torch.testing.assert_close(maps, pixels, rtol=1e-5, atol=1e-6)
    expanded = method(model).attribute(images, target=1, expand=True)
    assert expanded.shape == images.shape
    torch.testing.assert_close(expanded.sum(1, keepdim=True) if colours else expanded[:, None], maps)
    alone = method(model).attribute(images[1:], target=1)
    torch.testing.assert_close(alone[0], maps[1], rtol=1e-4, atol=1e-6)


def test_the_mean_of_all_rows_is_that_of_the_matrix() -> None:
    """The backward pass of the logit gives it, less the part of the D of tokens; every token is read."""
    model, images = Model((3, 5)).eval(), batch((3, 5), 3)
    explained = MambaAttribution(model, layers=[-1], rollout=False, signed=True).attribute(images, target=1, grid=True)
    with trace(model) as record:
        logits = model(images)
        last = record[-1]
        gradient = record.gradients(logits[:, 1].sum())[last.name]
    with torch.no_grad():
        rows = last.attention("sum", row_weight=gradient, col_weight=last.scan.u).sum(1)
    torch.testing.assert_close(explained.flatten(1), rows, rtol=1e-4, atol=1e-7)


def test_a_pixel_of_a_volume_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels and boxes lie in images of rows and columns; .* \(4, 6, 10\)"):
        RawAttention(Model((2, 3, 5))).attribute(batch((2, 3, 5), 3), pixel=(1, 1))
