"""Which numbers of an output are explained: of one tensor, of several, of none."""

import ast
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba_attn.attribution import (
    AttentionRollout,
    IntegratedGradients,
    MambaAttribution,
    RawAttention,
    Saliency,
    catalogue,
)
from mamba_attn.attribution.targets import scores_in, target_values
from mamba_attn.core.outputs import follow
from tests.attribution.cases import SIZE, images, vim, vmamba
from tests.attribution.test_contract import FAST, Chosen

Named = namedtuple("Named", ["features", "logits"])
Two = namedtuple("Two", ["aux", "grades"])
LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 0.5]])
MAPS = torch.arange(2 * 4 * 5 * 6.0).view(2, 4, 5, 6)


@dataclass
class Result:
    logits: Tensor
    hidden: Any = None
    loss: Tensor | None = None


class ModelOutput(OrderedDict):
    """As transformers': a mapping whose items are attributes too."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS,),
        [LOGITS, MAPS],
        (MAPS, LOGITS),
        {"logits": LOGITS, "maps": MAPS, "ids": torch.ones(2, 3, dtype=torch.long)},
        {"loss": torch.tensor(1.0), "deep": {"here": [LOGITS]}},
        Named(MAPS, LOGITS),
        Result(LOGITS, (MAPS, MAPS), torch.tensor(0.3)),
        ModelOutput(logits=LOGITS, hidden_states=(MAPS, MAPS)),
        ModelOutput(logits=LOGITS, again=LOGITS),
        (LOGITS, torch.randn(5, 3)),
        (LOGITS, "text", None, 3),
    ],
    ids=lambda output: type(output).__name__,
)
def test_the_only_tensor_of_images_and_classes_is_taken(output):
    assert target_values("call", output, None, 2).tolist() == [2, 3]
    assert target_values("call", output, [2, 1], 2).tolist() == [1, 1]
    assert follow(output, scores_in("call", output, 2)) is LOGITS


@pytest.mark.parametrize(
    "output",
    [
        {"features": 2 * LOGITS, "logits": LOGITS},
        Named(2 * LOGITS, LOGITS),
        Result(LOGITS, hidden=2 * LOGITS),
        {"aux": 2 * LOGITS, "deep": {"scores": LOGITS}},
        ModelOutput(cls_logits=2 * LOGITS, logits=LOGITS, output=3 * LOGITS),
    ],
    ids=lambda output: type(output).__name__,
)
def test_of_several_the_one_called_logits_is_taken(output):
    assert target_values("call", output, None, 2).tolist() == [2, 3]


@pytest.mark.parametrize(
    "output", [{"out": MAPS}, (MAPS,), Result(MAPS), [torch.tensor(1.0), MAPS], {"out": MAPS, "aux": MAPS + 1}]
)
def test_a_dense_tensor_alone_is_taken_too(output):
    assert target_values("call", output, (1, 2, 3), 2).tolist() == [MAPS[0, 1, 2, 3], MAPS[1, 1, 2, 3]]


@pytest.mark.parametrize("output", [torch.tensor([1.0, 2.0]), {"score": torch.tensor([1.0, 2.0])}])
@pytest.mark.parametrize("target", [None, ()])
def test_one_number_per_image_is_the_target(output, target):
    assert target_values("call", output, target, 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"target=3\): the model returned one number per image; leave target out"):
        target_values("call", output, 3, 2)


@pytest.mark.parametrize(
    ("output", "target", "example"),
    [
        ((LOGITS, 2 * LOGITS), None, "output[0][:, 2]"),
        ((LOGITS, 2 * LOGITS), 1, "output[0][:, 1]"),
        ({"aux": LOGITS, "grades": 2 * LOGITS}, 0, "output['aux'][:, 0]"),
        ({"features": LOGITS, "cls_logits": 2 * LOGITS}, 0, "output['cls_logits'][:, 0]"),
        (Two(LOGITS, 2 * LOGITS), None, "output.aux[:, 2]"),
        ({"one": Result(LOGITS), "two": Result(2 * LOGITS)}, [0, 1], "output['one'].logits[:, 2]"),
        ([MAPS, 2 * MAPS], 1, "output[1][:, 1, 2, 3]"),
        ({"main": MAPS, "aux": MAPS + 1}, None, "output['aux'][:, 3, 2, 3]"),
    ],
)
def test_the_example_fits_the_output_and_picks_one_number(output, target, example):
    with pytest.raises(ValueError, match="several of these have one result for each of the 2 images") as caught:
        target_values("call", output, target, 2)
    text = str(caught.value).partition("target=")[2].partition("e.g. target=")[2].removesuffix(".")
    assert text == f"lambda output: {example}"
    function = eval(compile(ast.parse(text, mode="eval"), "message", "eval"))
    assert target_values("call", output, function, 2).shape == (2,)


@pytest.mark.parametrize("output", [None, "text", object(), {}, (torch.tensor(1.0),), torch.zeros(2).long()])
def test_outputs_without_results(output):
    with pytest.raises(ValueError, match=r"it does not have one result for each of the 2 images\. Give a function"):
        target_values("call", output, None, 2)


def test_a_tensor_of_one_class_is_that_class_for_all():
    assert target_values("call", LOGITS, torch.tensor([1]), 2).tolist() == [2, 1]
    with pytest.raises(ValueError, match="one for each of the 2 images"):
        target_values("call", LOGITS, [1], 2)


WRAPPED = {
    "tuple": lambda y: (y[..., None, None], y),
    "dict": lambda y: {"logits": y, "loss": y.sum()},
    "dataclass": lambda y: Result(y, [y[:, None]]),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize(
    "name", [n for n, e in catalogue.METHODS.items() if catalogue.SCANS in e.made_of or e.made_of == catalogue.ANY]
)
def test_every_method_takes_wrapped_outputs(kind, name):
    model, x, options = vim(depth=1, class_token=None), images(2), FAST.get(name, {})
    found = catalogue.build(name, Chosen(model, WRAPPED[kind]), **options).attribute(x, [1, 3])
    truth = catalogue.build(name, model, **options).attribute(x, [1, 3])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))


@pytest.mark.parametrize("method", [MambaAttribution, IntegratedGradients, Saliency])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_models_with_one_number_per_image(method, shape):
    model, x = vim(depth=1), images(2)
    regressor = Chosen(model, lambda y: y[:, 3].reshape(shape))
    options = {"n_steps": 2} if method is IntegratedGradients else {}
    truth = method(model, **options).attribute(x, 3)
    torch.testing.assert_close(method(regressor, **options).attribute(x), truth)


@pytest.mark.parametrize("make", [lambda: vim(depth=1, num_classes=0), lambda: vmamba(num_classes=0)])
def test_backbones_have_maps_without_classes(make):
    model, x = make(), images(2)
    for method in (RawAttention, AttentionRollout):
        assert method(model).attribute(x).shape == (2, 1, *SIZE)
    for method in (MambaAttribution, Saliency):
        with pytest.raises(ValueError, match=r"target=None\): \w+ has no classes \(num_classes=0\), so there is no"):
            method(model).attribute(x)
        assert method(model).attribute(x, 7).isfinite().all()
        assert method(model).attribute(x, lambda output: output.norm(dim=1)).isfinite().all()


def test_a_head_put_on_a_backbone_has_classes():
    model = vim(depth=1, num_classes=0)
    model.head = nn.Linear(16, 5, dtype=torch.float64)
    assert MambaAttribution(model).attribute(images(2)).isfinite().all()


def test_a_backbone_that_returns_its_stages_names_the_last():
    model = Chosen(vim(depth=1), lambda y: [y[..., None, None], y.view(2, 5, 1, 1)])
    assert RawAttention(model).attribute(images(2)).isfinite().all()
    with pytest.raises(ValueError, match=r"e\.g\. target=lambda output: output\[1\]\[:, 4, 0, 0\]\."):
        MambaAttribution(model).attribute(images(2))
