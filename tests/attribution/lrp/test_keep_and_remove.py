"""Keep-and-remove LRP against its formula, one image and one pass at a time."""

import pytest
import torch

from mamba_attn import models
from mamba_attn.attribution import KeepAndRemoveLRP, MambaLRP
from mamba_attn.core.ranks import ranks

SIZE = (24, 40)
VIM = {"image_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return models.vim.VisionMamba(**VIM).eval().double()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(4)
    return torch.randn(3, 3, *SIZE, dtype=torch.float64)


def by_the_formula(model, image, target, fills):
    """The map of one image on its 3 x 5 cells; ``fills``: one image per turn, taken in turn."""
    turns = iter(fills)

    def relevance(picture):
        return MambaLRP(model).attribute(picture[None], target=target, grid=True).flatten()

    def without(lost):
        covered = torch.zeros(3, 5, dtype=torch.bool).view(-1)
        covered[list(lost)] = True
        covered = covered.view(3, 5).repeat_interleave(8, 0).repeat_interleave(8, 1)
        found = relevance(torch.where(covered, next(turns), image))
        found[list(lost)] = 0
        return found

    def rank(values):
        return torch.from_numpy(ranks(values.numpy())) / 14

    first = relevance(image)
    kept = first.clone()
    for count in (12, 9, 6, 3):  # 80 .. 20 % of 15 cells
        highest = kept.argsort(descending=True, stable=True)[:count].tolist()
        kept = kept + without(set(range(15)) - set(highest))
    gone, left, place = [], first, rank(first)
    for step, count in enumerate((1, 2, 4, 5)):  # 8 .. 32 %
        order = [i for i in left.argsort(descending=True, stable=True).tolist() if i not in gone]
        more = order[: count - len(gone)]
        place[more] = 5 - step + rank(left)[more]
        gone += more
        left = without(gone)
    return (rank(kept) + rank(place)).view(3, 5)


def test_it_is_the_formula_of_its_docstring(model, images):
    method = KeepAndRemoveLRP(model, draws=1, fills=("mean", "dark"))
    maps = method.attribute(images, target=[1, 0, 4], grid=True)
    for found, image, target in zip(maps[:, 0], images, (1, 0, 4), strict=True):
        mean, dark = (x.view(3, 1, 1).expand(3, *SIZE) for x in (image.mean((1, 2)), image.amin((1, 2))))
        assert torch.allclose(found, by_the_formula(model, image, target, [mean, dark] * 4), atol=1e-12)


def test_all_fills_and_draws_are_repeatable_alone_and_in_a_batch(model, images):
    method = KeepAndRemoveLRP(model)
    together = method.attribute(images)
    assert together.shape == (3, 1, *SIZE)
    assert torch.equal(method.attribute(images), together)
    assert torch.allclose(method.attribute(images[1:2]), together[1:2], atol=1e-9)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    assert torch.equal(method.attribute(images, target=predicted), together)  # of the whole image, not of its parts
    other = method.attribute(images, target=(predicted + 1) % 5)
    assert not torch.allclose(other, together, atol=0.1)


def test_shuffled_cells_are_the_same_cells(images):
    from mamba_attn.attribution.cell_filling import _shuffled

    mixed = _shuffled(images[0], (3, 5), torch.Generator().manual_seed(0))
    before, after = (
        {tuple(tile.flatten().tolist()) for row in x.split(8, 1) for tile in row.split(8, 2)}
        for x in (images[0], mixed)
    )
    assert before == after
    assert not torch.equal(mixed, images[0])
    odd = torch.randn(3, 26, 43)
    assert torch.equal(_shuffled(odd, (3, 5), torch.Generator().manual_seed(0))[:, 24:], odd[:, 24:])


def test_what_it_refuses(model, images):
    with pytest.raises(ValueError, match=r"draws=0.*at least 1"):
        KeepAndRemoveLRP(model, draws=0)
    with pytest.raises(ValueError, match="fills='balck'"):
        KeepAndRemoveLRP(model, fills="balck")
    with pytest.raises(ValueError, match="reads no token's row"):
        KeepAndRemoveLRP(model).attribute(images, pixel=(1, 1))
    with pytest.raises(ValueError, match="expected images"):
        KeepAndRemoveLRP(model).attribute(torch.randn(1, 3, 4, *SIZE, dtype=torch.float64))
