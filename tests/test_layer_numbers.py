"""Numbers stand for layers wherever names do: in trace(), in every method, in results by layer."""

import inspect
import re

import numpy as np
import pytest
import torch

from mamba_attn import attribution, trace
from mamba_attn.attribution import catalogue
from mamba_attn.erf.fields import Features
from mamba_attn.errors import UnknownLayerError
from mamba_attn.tracing.layer_names import ByLayer, layer_names, listed_layers
from tests.attribution.cases import images, vim, vmamba
from tests.attribution.vit.test_vit import build

NAMES = ["layers.0.mixer", "layers.1.mixer", "layers.2.mixer"]
METHODS = sorted(
    name
    for name, entry in catalogue.METHODS.items()
    if "layers" in inspect.signature(entry.method.__init__).parameters and "variant" not in entry.options
)


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (0, [0]), (-1, [2]), ([-1], [2]), ([2, 0], [0, 2]), ([0, -3, "*.0.*"], [0]), ([-1, "layers.[01].*"], [0, 1, 2]),
        ("layers.1.mixer", [1]), ("*", [0, 1, 2]), ((), []),
    ],
)  # fmt: skip
def test_numbers_names_and_patterns(asked, chosen):
    with torch.no_grad(), trace(vim(), layers=asked) as record:
        record_names = record.names
    assert record_names == [NAMES[index] for index in chosen]


def test_a_name_that_reads_like_a_pattern_is_a_name():
    assert layer_names("call", ["a[0]"], ["a[0]", "a0"]) == ["a0"]  # patterns first, as in fnmatch
    assert layer_names("call", ["a[0]"], ["a[0]", "b"]) == ["a[0]"]


@pytest.mark.parametrize("number", [3, -4, 10**30])
def test_a_number_out_of_range_says_how_many_layers_there_are(number):
    expected = rf"there is no layer {number} of 3 layers; expected -3\.\.2\."
    model = vim()
    with pytest.raises(UnknownLayerError, match=rf"^trace\(layers=\.\.\.\): {expected}"):
        with trace(model, layers=[0, number]):
            pass
    with torch.no_grad(), trace(model) as record:
        model(images())
    with pytest.raises(KeyError, match=rf"^trace\[{number}\]: {expected}"):
        _ = record[number]
    with pytest.raises(UnknownLayerError, match=expected):
        attribution.MambaLRP(model, layers=number).attribute(images())
    with pytest.raises(UnknownLayerError, match=rf"^LayerGradCam\(layer=\.\.\.\): {expected}"):
        attribution.LayerGradCam(model, layer=number).attribute(images())
    with pytest.raises(UnknownLayerError, match=expected):
        Features(model, number)
    assert number not in record


def test_none_stands_for_the_default_and_numpys_numbers_for_numbers():
    assert listed_layers("call", None) is None
    assert listed_layers("call", np.int64(2)) == [2]


@pytest.mark.parametrize("wrong", [True, [0, False], 1.5, [None], {0.0}])
def test_what_is_neither_a_name_nor_a_number(wrong):
    with pytest.raises(TypeError, match=r"^call: expected names, patterns or numbers of layers, .* got \S+\."):
        listed_layers("call", wrong)


def test_true_is_no_number_anywhere():
    model = vim()
    with torch.no_grad(), trace(model) as record:
        model(images())
    for call in (
        lambda: record[True], lambda: trace(model, layers=True).__enter__(), lambda: Features(model, True),
        lambda: attribution.LayerGradCam(model, layer=True), lambda: ByLayer(a=1)[True],
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"expected names, patterns or numbers of layers, .* got True"):
            call()
    for name in METHODS:
        with pytest.raises(TypeError, match=rf"^{catalogue.METHODS[name].method.__name__}\(layers=\.\.\.\): expected"):
            catalogue.build(name, model, layers=[True])


def test_a_trace_counts_the_layers_that_it_has():
    model = vim()
    with torch.no_grad(), trace(model, layers=[2, 0]) as record:
        with pytest.raises(RuntimeError, match="no layer has run yet: call the model inside the with-block"):
            _ = record[0]
        model(images())
    assert record[0] is record["layers.0.mixer"]
    assert record[-1] is record["layers.2.mixer"] is record.layers[1]
    assert [number for number in range(-4, 4) if number in record] == [-2, -1, 0, 1]
    assert True not in record
    assert record.get(5) is None
    with pytest.raises(UnknownLayerError, match=r"there is no layer 2 of 2 layers; expected -2\.\.1"):
        _ = record[2]


def test_results_by_layer_are_counted_too():
    model, inputs = vim(), images()
    with trace(model) as record:
        gradients = record.gradients(model(inputs)[:, 1].sum())
    assert gradients[-1] is gradients["layers.2.mixer"]
    assert gradients[0] is gradients["layers.0.mixer"]
    assert list(gradients) == NAMES
    assert attribution.RawAttention(model, layers=[1, 2]).rows(inputs)[0].shape == (3, 16)
    assert attribution.ImplicitAttention(model).rows(inputs)[-1].shape == (3, 16)
    assert list(attribution.MambaLRP(model, layers=[-1]).relevances(inputs)) == [NAMES[2]]
    with pytest.raises(KeyError, match=re.escape("[7]: there is no layer 7 of 3 layers; expected -3..2.")):
        gradients[7]
    with pytest.raises(KeyError, match=r"'layer.0.mixer' fits no layer\. Did you mean 'layers\.0\.mixer'"):
        gradients["layer.0.mixer"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_numbers(name):
    softmax = catalogue.METHODS[name].made_of == (catalogue.SOFTMAX,)
    model = build("class token")[0] if softmax else vim()
    with trace(model) as record:
        names = record.names
    for numbers, named in ((-1, names[-1:]), ([0, -1], [names[0], names[-1]]), ([0, "*.1.*"], names[:2])):
        found = catalogue.build(name, model, layers=numbers).attribute(images(), 1)
        expected = catalogue.build(name, model, layers=named).attribute(images(), 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
        assert found.abs().max() > 0


def test_grad_cam_of_a_numbered_layer():
    model = vmamba()
    found = attribution.LayerGradCam(model, layer=-2).attribute(images(), 1)
    expected = attribution.LayerGradCam(model, layer="layers.1.blocks.1.op").attribute(images(), 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert found.abs().max() > 0
