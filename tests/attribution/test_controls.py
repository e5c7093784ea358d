"""The maps that no model made."""

import pytest
import torch

from mamba_attn.attribution import CentreMap, RandomMap
from tests.attribution.cases import SIZE, images, vim


def test_random_maps_follow_their_image():
    model, x = vim(depth=1), images(3)
    maps = RandomMap(model).attribute(x)
    assert maps.shape == (3, 1, *SIZE)
    assert torch.equal(RandomMap(model).attribute(x.flip(0)), maps.flip(0))
    assert torch.equal(RandomMap(model).attribute(x[1:2]), maps[1:2])
    assert (maps[0] - maps[1]).abs().max() > 0.5
    assert (RandomMap(model, seed=1).attribute(x) - maps).abs().max() > 0.5
    assert abs(float(maps.mean()) - 0.5) < 0.03
    assert abs(float(maps.var()) - 1 / 12) < 0.01
    neighbours = torch.corrcoef(torch.stack([maps[..., 1:].flatten(), maps[..., :-1].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.06
    assert torch.equal(RandomMap(model).attribute(x.bfloat16()), RandomMap(model).attribute(x.bfloat16().float()))


def test_the_centre_is_a_gaussian():
    maps = CentreMap(vim(depth=1)).attribute(images(2))
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps, maps.flip(2)) or torch.allclose(maps, maps.flip((2, 3)))
    for row, column in ((0, 0), (19, 11), (30, 4)):
        distance = ((row + 0.5 - 20) / 10) ** 2 + ((column + 0.5 - 12) / 6) ** 2
        assert float(maps[0, 0, row, column]) == pytest.approx(2.718281828 ** (-distance / 2), rel=1e-5)


@pytest.mark.parametrize("method", [RandomMap, CentreMap])
def test_the_contract_holds(method):
    model, x = vim(depth=1), images(2)
    maps = method(model).attribute(x)
    expanded = method(model).attribute(x, expand=True)
    torch.testing.assert_close(expanded.sum(1, keepdim=True), maps)
    grid = method(model).attribute(x, grid=True)
    torch.testing.assert_close(grid, maps.unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)))
    with pytest.raises(ValueError, match=r"expected class indices in 0\.\.4"):
        method(model).attribute(x, 7)
