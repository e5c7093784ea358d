"""Our combination: its ranks by their definition, its formula from the methods it is made of, what it refuses."""

import pytest
import scipy.stats
import torch

from mamba_attn.attribution import ImplicitAttention, MambaLRP, RawAttention, RelevanceAttentionRanks
from mamba_attn.core.ranks import shares
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import MODELS, images, vim, vmamba
from tests.attribution.vit.test_vit import build


def scipy_ranks(maps):
    """Mean ranks, 0 to 1, image by image."""
    rows = [scipy.stats.rankdata(each.flatten().numpy()) - 1 for each in maps]
    return torch.stack([torch.from_numpy(row / max(len(row) - 1, 1)) for row in rows]).double().view_as(maps)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 3), (3, 1, 5, 4)])
def test_ranks_are_mean_ranks(shape):
    generator = torch.Generator().manual_seed(0)
    for values in (torch.randn(shape, generator=generator), torch.randint(-2, 2, shape, generator=generator).double()):
        expected = scipy_ranks(values)
        torch.testing.assert_close(shares(values).double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(shares(values * 3 + 7), shares(values), rtol=0, atol=0)
    assert torch.equal(shares(torch.full(shape, 2.5)).unique(), torch.tensor([0.5 if values[0].numel() > 1 else 0.0]))


@pytest.mark.parametrize("kind", ["middle", "pooled", "overlapping"])
def test_it_is_the_formula_of_its_docstring(kind):
    model, x = MODELS[kind](), images(2)
    smooth = MambaLRP(model, gamma_layers="*", gamma=1.0)
    relevance = cells(MambaLRP(model), x)
    first = scipy_ranks(relevance)
    extent = [scipy_ranks(cells(method, x)) for method in (smooth, ImplicitAttention(model), RawAttention(model))]
    expected = handed_out(relevance, 2 * first**6 + scipy_ranks(sum(extent)))
    found = RelevanceAttentionRanks(model).attribute(x, 3, grid=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    two = RelevanceAttentionRanks(model, extent=("raw_attention", "smooth_relevance"), power=2, weight=0.5)
    expected = handed_out(relevance, 0.5 * first**2 + scipy_ranks(extent[0] + extent[2]))
    torch.testing.assert_close(two.attribute(x, 3, grid=True), expected, rtol=0, atol=1e-12)


def handed_out(values, order):
    """The positive parts, largest first, to the cells, first ones first."""
    found = torch.zeros_like(values)
    for each, its, own in zip(found, order, values, strict=True):
        places = sorted(range(its.numel()), key=lambda i: its.flatten()[i])
        for place, value in zip(places, sorted(max(v, 0) for v in own.flatten().tolist()), strict=True):
            each.view(-1)[place] = value
    return found


def cells(method, x):
    """A map in pixels, averaged over the pixels nearest to each token."""
    maps = method.attribute(x, 3)
    model = method.model
    step = model.patch_embed.proj.stride[0]
    size = model.patch_embed.proj.kernel_size[0]
    rows, columns = ((n - size) // step + 1 for n in x.shape[2:])
    owner = [
        ((torch.arange(n) + 0.5 - size / 2) / step + 0.5).floor().clamp(0, count - 1).long()
        for n, count in zip(x.shape[2:], (rows, columns), strict=True)
    ]
    inside = [torch.nn.functional.one_hot(each).T.double() for each in owner]
    inside = [each / each.sum(1, keepdim=True) for each in inside]
    return inside[0] @ maps @ inside[1].T


def test_stages_are_ranked_on_the_first_grid():
    model, x = vmamba(depths=(1, 1)), images(2, (48, 32))
    maps = RelevanceAttentionRanks(model).attribute(x, 1)
    assert maps.shape == (2, 1, 48, 32)
    assert maps.min() >= 0
    grid = RelevanceAttentionRanks(model).attribute(x, 1, grid=True)
    assert grid.shape == (2, 1, 12, 8)
    with torch.no_grad(), trace(model) as record:
        model(x)
    torch.testing.assert_close(record.layers[0].layout.to_pixels(grid, (48, 32)), maps)


def test_relevance_comes_first_and_the_class_matters():
    model, x = vim(), images(2)
    heavy = RelevanceAttentionRanks(model, weight=1e6, power=1)
    expected = cells(MambaLRP(model), x).clamp(min=0)
    torch.testing.assert_close(heavy.attribute(x, 3, grid=True), expected, rtol=0, atol=1e-12)
    plain = RelevanceAttentionRanks(model)
    assert not torch.equal(plain.attribute(x, 1), plain.attribute(x, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, r"RelevanceAttentionRanks\(power=-1\.0\): expected a number of at least 0"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"gamma": -0.5}, r"RelevanceAttentionRanks\(gamma=-0\.5\)"),
        ({"extent": "raw"}, "raw_attention"),
        ({"extent": ()}, "raw_attention"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RelevanceAttentionRanks(vim(), **options)


def test_softmax_attention_is_refused():
    model, _ = build("pooled")
    with pytest.raises(UnsupportedModelError, match=r"^RelevanceAttentionRanks is defined"):
        RelevanceAttentionRanks(model).attribute(images(1))
