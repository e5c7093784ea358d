"""What is removed, in which order, and what the areas are."""

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from mamba_attn import evaluation, models
from mamba_attn.errors import NonFiniteError
from mamba_attn.evaluation import perturbation
from mamba_attn.evaluation.ranking import ranking, to_pixels, token_cell
from tests.explanations.cases import VIM


class Corner(torch.nn.Module):
    """Class 1 as long as the upper left cell of 4 pixels is bright, and a memory of what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        lit = images[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(lit), lit], 1)


def setting(size=(16, 20)):
    images = torch.full((2, 3, *size), 1.0)
    maps = torch.zeros(2, *size)
    maps[0, :4, :4] = 1  # the first map knows it, the second has it last
    maps[1] = 1
    maps[1, :4, :4] = 0
    return Corner(), images, maps


def test_the_cells_that_decide_go_first_or_last():
    model, images, maps = setting()
    clean = perturbation.clean_answers(model, images)
    assert clean.predicted.tolist() == [1, 1]
    found = perturbation.perturb(model, images, maps, clean.explained, cell=4)
    assert found.predicted[0].tolist() == [[0] * 9, [1] * 9]
    assert found.predicted[1].tolist() == [[1] * 9, [0] * 9]
    assert torch.allclose(found.probability[0, 1], clean.probability[0].expand(9))


def test_the_count_the_nesting_and_the_black():
    model, images, maps = setting()
    order = ranking(torch.rand(2, 16, 20), 4, [0, 1])
    gone = perturbation._removed(order[0])
    assert gone.sum(-1).tolist() == [[20 * t // 10 for t in range(1, 10)]] * 2
    assert bool((gone[:, 1:] >= gone[:, :-1]).all())
    assert torch.equal(
        gone[0], gone[1].flip(0).logical_not()
    )  # 20 cells split evenly: top 30 % and bottom 70 % are all
    perturbation.perturb(model, images, maps, torch.tensor([1, 1]), cell=4)
    changed = model.seen[0][0, :, 0, 0]
    assert changed.tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-6)
    model.seen.clear()
    perturbation.perturb(model, images, maps, torch.tensor([1, 1]), cell=4, fill="mean", batch=5)
    assert model.seen[0].shape[0] == 5
    assert model.seen[0][0, :, 0, 0].tolist() == [0, 0, 0]


def test_reversed_maps_swap_the_signs():
    torch.manual_seed(3)
    model, images = models.create("vim_micro", **VIM), torch.randn(3, 3, 32, 32)
    maps = torch.rand(3, 32, 32)
    clean = perturbation.clean_answers(model, images)
    found, turned = (
        perturbation.perturb(model, images, each, clean.explained, cell=token_cell(model, images))
        for each in (maps, -maps)
    )
    assert torch.allclose(found.probability, turned.probability.flip(1), atol=1e-5)


def test_the_area_is_the_trapezoid_and_at_most_eighty():
    values = np.random.default_rng(0).random((4, 9))
    tenths = np.arange(1, 10) / 10
    expected = [100 * trapezoid(each, tenths) for each in values]
    assert evaluation.auc(values) == pytest.approx(expected)
    assert evaluation.auc(np.full(9, 0.37)) == pytest.approx(0.8 * 37)
    assert evaluation.auc(values).mean() == pytest.approx(evaluation.auc(values.mean(0)))


def test_insertion_and_deletion_are_areas_of_the_same_answers():
    probability = np.random.default_rng(0).random((2, 9))
    clean, blank = np.array(0.9), np.array(0.1)
    points = np.arange(11) / 10
    assert evaluation.deletion(probability, clean, blank) == pytest.approx(
        trapezoid([0.9, *probability[0], 0.1], points)
    )
    kept = [0.1, *probability[1, ::-1], 0.9]  # 10 % kept is 90 % of the lowest removed
    assert evaluation.insertion(probability, clean, blank) == pytest.approx(trapezoid(kept, points))


def test_equal_cells_come_in_a_random_order_that_the_seed_fixes():
    flat = torch.ones(3, 8, 8)
    order = ranking(flat, 1, [5, 5, 6])
    assert torch.equal(order[0], order[1])
    assert not torch.equal(order[0], order[2])
    assert order[0].sort().values.tolist() == list(range(64))
    values = torch.zeros(1, 8, 8)
    values[0, 3, 2] = 1
    assert ranking(values, 1, [0])[0, 0] == 3 * 8 + 2


def test_cells_are_means_cut_off_at_the_edge():
    maps = torch.zeros(1, 6, 6)
    maps[0, :4, :4] = 1
    maps[0, 4:, 4:] = 1.5  # four pixels of a cell of sixteen: its mean counts those that are there
    assert ranking(maps, 4, [0])[0, :2].tolist() == [3, 0]
    chosen = torch.tensor([False, False, False, True])
    assert to_pixels(chosen, 4, (6, 6)).nonzero().tolist() == [[4, 4], [4, 5], [5, 4], [5, 5]]


@pytest.mark.parametrize(
    ("name", "size", "cell"), [("vim_micro", 128, 8), ("vmamba_micro", 128, 8), ("vim_tiny", 224, 16)]
)
def test_models_share_cells(name, size, cell):
    model = models.create(name, **({"depth": 1} if name.startswith("vim") else {"depths": (1, 1, 1), "dims": 8}))
    assert token_cell(model, torch.zeros(1, 3, size, size)) == cell


def test_a_model_that_cannot_be_traced_gets_fourteen_cells():
    assert token_cell(torch.nn.Flatten(), torch.zeros(1, 3, 56, 70)) == 4


def test_an_answer_of_nan_to_a_perturbed_image_is_named():
    def model(images):
        return torch.log(images.mean((1, 2, 3)) - 0.9)[:, None].expand(-1, 2)  # black is below

    _, images, maps = setting()
    with pytest.raises(NonFiniteError, match="answer to an image with cells removed contains NaN"):
        perturbation.perturb(model, images, maps, torch.tensor([1, 1]), cell=4)


def test_what_is_refused():
    model, images, maps = setting()
    maps[1, 0, 0] = torch.nan
    target = torch.tensor([1, 1])
    with pytest.raises(NonFiniteError, match=r"maps: those of the images \[1\] contain NaN or Inf"):
        perturbation.perturb(model, images, maps, target, cell=4)
    with pytest.raises(ValueError, match="expected a map per image in pixels"):
        perturbation.perturb(model, images, maps[:, :4], target, cell=4)
    with pytest.raises(ValueError, match="fill='white': expected one of black, mean, blur, road"):
        perturbation.perturb(model, images, maps.nan_to_num(), target, cell=4, fill="white")
    with pytest.raises(ValueError, match=r"explained=2: the model's classes are 0..1"):
        perturbation.clean_answers(model, images, explained=[None, 2])
    with pytest.raises(NonFiniteError, match="the model's answer contains NaN"):
        perturbation.clean_answers(model, images * torch.nan)
