"""What still trains in a model is named once."""

import warnings

import pytest
import torch
from torch import nn

from mamba_attn.attribution import Saliency
from mamba_attn.core.training_mode import warn_of_training


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


MODELS = {
    "1": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)),
    "0": nn.Sequential(DropPath(0.1)),
    "0, 1, 2 and 1 more": nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(4))),
}


@pytest.mark.parametrize("names", MODELS)
def test_modules_that_change_the_answer_are_named_once(names):
    model = MODELS[names].train()
    with pytest.warns(UserWarning, match=rf"Sequential is in training mode, and {names} change its answer"):
        warn_of_training(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_training(model)
    assert model.training


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(2), DropPath(0.0)).train(), nn.Dropout().eval()]
)
def test_what_changes_nothing_is_not(model):
    warn_of_training(model)


def test_methods_say_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2), nn.Dropout(0.5)).train()
    with pytest.warns(UserWarning, match=r"and 2 change its answer"):
        Saliency(model).attribute(torch.randn(2, 3, 4, 4), target=0)
    assert model.training
