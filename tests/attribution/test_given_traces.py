"""Maps of a pass that was traced before: the maps that methods make of their own pass, from one."""

from functools import partial

import pytest
import torch
from torch import nn

from mamba_attn import ops
from mamba_attn.attribution import (
    AttentionGradCAM,
    AttentionRollout,
    MambaAttribution,
    MambaLRP,
    RawAttention,
    Saliency,
    TransformerAttribution,
    attribute_together,
)
from mamba_attn.errors import TraceError, UnknownLayerError
from mamba_attn.tracing.tracer import trace
from tests.attribution.cases import images, vim, vmamba
from tests.attribution.test_several_inputs import Siamese
from tests.attribution.vit.test_vit import build

MODELS = {"vim": vim, "pooled": lambda: vim(class_token=None), "vmamba": vmamba, "vit": lambda: build("pooled")[0]}
SCANS = [
    (RawAttention, {}),
    (RawAttention, {"layers": [0, -1]}),
    (AttentionRollout, {}),
    (AttentionRollout, {"signed": True}),
    (MambaAttribution, {}),
    (MambaAttribution, {"layers": -1}),
    (MambaAttribution, {"rollout": False}),
]
SOFTMAX = [(RawAttention, {}), (AttentionRollout, {}), (AttentionGradCAM, {}), (TransformerAttribution, {})]


class Counted(nn.Module):
    """A model that counts its passes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.model(x)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        *((name, *case) for name in ("vim", "pooled", "vmamba") for case in SCANS),
        ("vim", RawAttention, {"convention": "hidden_mamba"}),
        ("vim", MambaAttribution, {"convention": "hidden_mamba"}),
        ("vim", MambaAttribution, {"rule": "published_code"}),
        ("vmamba", AttentionRollout, {"convention": "vmamba_analysis"}),
        *(("vit", *case) for case in SOFTMAX),
    ],
)
def test_the_map_is_that_of_a_pass_of_its_own(name, method, options):
    model, x = MODELS[name](), images(2)
    explainer = method(model, **options)
    with trace(model) as record:
        model(x)
    found = explainer.attribute(x, [1, 3], trace=record)
    truth = explainer.attribute(x, [1, 3])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))
    again = explainer.attribute(x, [2, 0], trace=record)  # another class of the same pass
    truth = explainer.attribute(x, [2, 0])
    torch.testing.assert_close(again, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))


def test_three_maps_cost_one_pass():
    model, x = Counted(vim(depth=2)), images(2)
    with trace(model) as record:
        model(x)
    maps = [method(model).attribute(x, trace=record) for method in (RawAttention, AttentionRollout, MambaAttribution)]
    assert model.passes == 1
    for method, found in zip((RawAttention, AttentionRollout, MambaAttribution), maps, strict=True):
        torch.testing.assert_close(found, method(model).attribute(x))
    (one,) = RawAttention(model).attribute((x,), trace=record)
    assert torch.equal(one, maps[0])
    equal = RawAttention(model).attribute(x.clone(), trace=record)  # other tensors with the same numbers are the images
    assert torch.equal(equal, maps[0])


TOGETHER = {
    "vim": [RawAttention, AttentionRollout, MambaAttribution],
    "vmamba": [AttentionRollout, MambaLRP, MambaAttribution, Saliency],
    "vit": [RawAttention, TransformerAttribution, AttentionRollout, AttentionGradCAM],
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", TOGETHER)
def test_maps_of_several_methods_are_those_of_each(name, frozen):
    model, x = Counted(MODELS[name]()).requires_grad_(not frozen), images(2)
    methods = [method(model) for method in TOGETHER[name]]
    truth = [method.attribute(x, [1, 3]) for method in methods]
    model.passes = 0
    found = attribute_together(methods, (x,), [1, 3])
    for (maps,), expected in zip(found, truth, strict=True):
        torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    if all(method.takes_trace for method in methods):
        assert model.passes <= 2  # and the look for what mixes unseen


def test_the_mean_comes_with_the_weighted_matrix(monkeypatch):
    model, x = vim(depth=2, class_token=None), images(2)
    calls = {"hidden_attention": 0, "hidden_attentions": 0}

    def counted(name, own, *args, **options):
        calls[name] += 1
        return own(*args, **options)

    for name in calls:
        monkeypatch.setattr(ops, name, partial(counted, name, getattr(ops, name)))
    attribute_together([AttentionRollout(model), MambaAttribution(model)], x, 1)
    assert calls == {"hidden_attention": 0, "hidden_attentions": 2}  # a sweep per layer


def test_methods_together_are_on_one_model_and_leave_what_differs_apart():
    model, x = vim(depth=1), images(2)
    with pytest.raises(ValueError, match="expected methods on one model"):
        attribute_together([RawAttention(model), RawAttention(vim(depth=1))], x)
    assert attribute_together([], x) == []


@pytest.mark.parametrize("name", ["vim", "pooled", "vmamba"])
def test_a_matrix_that_the_pass_computed_is_read_and_not_computed_again(name, monkeypatch):
    model, x = MODELS[name](), images(2)
    truth = {signed: AttentionRollout(model, signed=signed).attribute(x) for signed in (False, True)}
    raw = RawAttention(model).attribute(x)
    with trace(model, attention="mean") as record:
        model(x)

    def computed(*_, **__):
        raise AssertionError

    for function in ("hidden_attention", "attention_row", "left_product"):
        monkeypatch.setattr(ops, function, computed)
    torch.testing.assert_close(RawAttention(model).attribute(x, trace=record), raw)
    for signed, expected in truth.items():
        torch.testing.assert_close(AttentionRollout(model, signed=signed).attribute(x, trace=record), expected)
    with pytest.raises(AssertionError):
        record[0].row(0, fold="sum")
    with pytest.raises(AssertionError):
        record[0].row(record[0].tokens)  # ops refuse it


def test_a_trace_of_some_layers_gives_their_maps():
    model, x = vim(), images(2)
    with trace(model, layers=[0, 2]) as record:
        model(x)
    found = RawAttention(model).attribute(x, trace=record)
    torch.testing.assert_close(found, RawAttention(model, layers=[0, 2]).attribute(x))
    with pytest.raises(UnknownLayerError, match=r"layers\.1\.mixer"):
        RawAttention(model, layers="layers.1.mixer").attribute(x, trace=record)


def test_keywords_and_several_inputs_are_found_in_the_trace():
    model, x = vim(depth=2), images(2)
    with trace(model) as record:
        model(images=x)
    torch.testing.assert_close(RawAttention(model).attribute(x, trace=record), RawAttention(model).attribute(x))
    pair, other = Siamese(vim(depth=2)), images(4)[2:]
    with trace(pair) as record:
        pair(x, second=other)
    maps = MambaAttribution(pair).attribute((x, other), 1, trace=record)
    for found, truth in zip(maps, MambaAttribution(pair).attribute((x, other), 1), strict=True):
        torch.testing.assert_close(found, truth)


def test_traces_that_cannot_be_read():
    model, x = vim(depth=1), images(2)
    with torch.no_grad(), trace(model) as blind:
        model(x)
    assert RawAttention(model).attribute(x, trace=blind).isfinite().all()
    with pytest.raises(TraceError, match=r"trace=\.\.\.\): the traced pass kept no graph for gradients; run the model"):
        MambaAttribution(model).attribute(x, trace=blind)
    with pytest.raises(ValueError, match=r"the traced pass was of other images; give those that the model was called"):
        RawAttention(model).attribute(x + 1, trace=blind)
    with pytest.raises(ValueError, match="this is a trace of another model, a VisionMamba"):
        RawAttention(vim(depth=1)).attribute(x, trace=blind)
    with pytest.raises(ValueError, match="the trace has its own; leave them out"):
        RawAttention(model).attribute(x, trace=blind, additional_forward_args=3)
    with pytest.raises(ValueError, match=r"MambaLRP\.attribute.*this method reads no trace, it runs the model itself"):
        MambaLRP(model).attribute(x, trace=blind)
    with pytest.raises(ValueError, match="this method reads no trace, it runs the model itself"):
        Saliency(model).attribute(x, trace=blind)
    with trace(model) as early:
        with pytest.raises(TraceError, match="the model has not run: call it inside the with-block first"):
            RawAttention(model).attribute(x, trace=early)
    with trace(model) as twice:
        model(x)
        model(x)
    with pytest.raises(TraceError, match="the model ran twice inside one trace"):
        _ = twice.output


def test_a_trace_keeps_what_went_in_and_came_out():
    model, x = vim(depth=1), images(2)
    with trace(model) as record:
        logits = model(x)
    assert record.output is logits
    (given,), keywords = record.arguments
    assert given is x
    assert keywords == {}
    assert list(record.part([])) == []
