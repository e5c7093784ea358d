"""LoadedModel: its checks, and the scores in whatever a model returns."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform

LOGITS, FEATURES = torch.randn(2, 3), torch.randn(2, 5, 4, 4)


@dataclass
class Output:
    loss: Any
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]


class Named(NamedTuple):
    features: torch.Tensor
    classes: torch.Tensor


OUTPUTS = {
    "tensor": LOGITS,
    "tuple": (FEATURES, LOGITS),
    "named tuple": Named(FEATURES, LOGITS),
    "dict": {"features": FEATURES, "scores": LOGITS, "pooled": torch.randn(2, 8)},
    "dataclass": Output(None, LOGITS, (FEATURES,)),
    "nested": {"heads": (LOGITS,), "aux": None},
}


def scores(output, batch):
    return LoadedModel(nn.Identity()).scores(output, batch)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_scores_are_the_only_tensor_of_classes(kind):
    assert scores(OUTPUTS[kind], 2) is LOGITS


@pytest.mark.parametrize("output", [FEATURES, (FEATURES, None), {"a": LOGITS, "b": LOGITS + 1}, "text", None])
def test_outputs_without_scores_or_with_several(output):
    assert scores(output, 2) is None


def test_one_number_per_image_is_one_output():
    assert scores(torch.randn(2), 2).shape == (2, 1)


def test_heads():
    logits = torch.tensor([[0.0, 2.0]])
    model = nn.Identity()
    assert LoadedModel(model, classes=["a", "b"]).probabilities(logits).sum() == pytest.approx(1)
    assert torch.equal(LoadedModel(model, classes=["a", "b"], head="sigmoid").probabilities(logits), logits.sigmoid())
    assert torch.equal(LoadedModel(model, classes=["a", "b"], head="none").probabilities(logits), logits)
    one = LoadedModel(model, classes=["grade"])
    assert torch.equal(one.probabilities(logits[:, 1:]), logits[:, 1:])  # never 100 % of one class
    assert not one.gives_probabilities
    assert LoadedModel(model, classes=["grade"], head="sigmoid").gives_probabilities


def test_fields_are_public_and_checked():
    model = LoadedModel(nn.Linear(2, 2), Transform((8, 8)), ("a", 1), name="mine")
    assert (model.name, model.classes, model.head, model.layout) == ("mine", ["a", "1"], "softmax", None)
    assert LoadedModel(nn.Linear(2, 2)).name == "Linear"
    with pytest.raises(ValueError, match=r"head='logits'\): expected one of"):
        LoadedModel(nn.Linear(2, 2), head="logits")
    with pytest.raises(TypeError, match="expected a list of names, one per class"):
        LoadedModel(nn.Linear(2, 2), classes="ab")


def test_features_are_no_classes():
    assert LoadedModel(nn.Identity(), classes=[]).logits(LOGITS) is None
    assert LoadedModel(nn.Identity()).logits(LOGITS) is LOGITS


def test_the_code_is_also_that_of_the_function_for_images():
    prepared = Transform.of(lambda picture: torch.from_numpy(np.array(picture)).movedim(2, 0)[:, :8, :8] / 255)
    codes = [
        LoadedModel(nn.Identity(), transform=each).code_fingerprint for each in (None, Transform((8, 8)), prepared)
    ]
    assert codes[0] == codes[1] != codes[2]
