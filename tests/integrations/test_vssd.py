"""VSSD's non-causal mixers: one sum over all tokens, as two scans that together are the dense matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_attn import trace
from mamba_attn.attribution import AttentionRollout, MambaAttribution, MambaLRP, RawAttention
from mamba_attn.testing import check_adapter


class Mixer(nn.Module):
    """The sum by its definition, every pair of tokens spelt out, with VSSD's names."""

    linear_attn_duality = True

    def __init__(self, features: int, ngroups: int, positive: bool):
        super().__init__()
        heads, width, states = 4, 3, 5
        inner, mixed = heads * width, heads * width + 2 * ngroups * states
        self.ngroups, self.ssd_positve_dA = ngroups, positive
        self.in_proj = nn.Linear(features, inner + mixed + heads)
        self.conv2d = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed)
        self.act = nn.SiLU()
        self.A_log, self.dt_bias, self.D = (nn.Parameter(0.5 * torch.randn(heads)) for _ in range(3))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, features)

    def forward(self, u, H, W):
        inner, heads = self.out_proj.in_features, len(self.D)
        z, xBC, dt = self.in_proj(u).split([inner, self.conv2d.in_channels, heads], -1)
        xBC = self.act(self.conv2d(xBC.mT.reshape(len(u), -1, H, W))).flatten(2).mT
        x, B, C = xBC.split([inner, *2 * [(xBC.shape[-1] - inner) // 2]], -1)
        factor = F.softplus(dt + self.dt_bias) * self.A_log.exp() * (1 if self.ssd_positve_dA else -1)
        x, B, C = x.unflatten(-1, (heads, -1)), *(t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))
        y = torch.stack(
            [
                torch.einsum("bin,bjn,bj,bjw->biw", C[:, :, h % self.ngroups], B[:, :, h % self.ngroups],
                             factor[..., h], x[:, :, h]) + self.D[h] * x[:, :, h]
                for h in range(heads)
            ],
            2,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(2)) * z)


class Model(nn.Module):
    """Patches, two blocks, a mean over tokens and classes."""

    def __init__(self, ngroups: int = 1, positive: bool = True):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.mixers = nn.ModuleList(Mixer(6, ngroups, positive) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        grid = self.patch_embed(images)
        x = grid.flatten(2).mT
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), *grid.shape[2:])
        return self.head(x.mean(1))


def made(**options):
    torch.manual_seed(0)
    return Model(**options).eval(), torch.randn(2, 3, 12, 20)


@pytest.mark.parametrize(("ngroups", "positive"), [(1, True), (1, False), (2, True)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_laws(ngroups, positive, dtype, allowed):
    model, images = made(ngroups=ngroups, positive=positive)
    report = check_adapter(model.to(dtype), images.to(dtype))
    assert report.output_error < allowed
    assert len(report.layers) == 2
    assert report.matrix_error < allowed


def test_every_token_reads_every_token_and_rows_and_columns_are_the_matrix():
    model, images = made()
    with torch.no_grad(), trace(model) as record:
        model(images)
    layer = record.layers[0]
    matrix = layer.attention("each")
    assert layer.scan.layout.grid == (3, 5)
    assert bool((matrix != 0).all())
    torch.testing.assert_close(layer.row(7, fold="each"), matrix[..., 7, :], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.column(7, fold="each"), matrix[..., 7], rtol=1e-4, atol=1e-6)
    vector = torch.randn(2, 15)
    product = torch.einsum("bi,bij->bj", vector, matrix.mean(1))
    torch.testing.assert_close(layer.left_product(vector, residual=False), product, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [RawAttention, AttentionRollout, MambaAttribution, MambaLRP])
def test_maps_of_an_image(method):
    model, images = made()
    found = method(model).attribute(images, target=1)
    assert found.shape == (2, 1, 12, 20)
    assert bool(found.isfinite().all())
    assert float(found.std()) > 0
