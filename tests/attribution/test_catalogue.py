"""The table of methods: every entry runs where it says it fits, and names one that does where it does not."""

import pytest
import torch
from torch import nn

from mamba_attn import attribution
from mamba_attn.attribution import MapAttribution, TransformerAttribution, catalogue
from mamba_attn.errors import UnsupportedModelError
from tests.attribution.cases import images, vim, vmamba
from tests.attribution.vit.test_vit import SIZE, build

FAST = {
    "occlusion": {"sliding_window_shapes": 20, "strides": 20},
    "integrated_gradients": {"n_steps": 2},
    "grad_cam": {},
    "igos_plus_plus": {"steps": 2, "path": 2, "cells": 6, "sparsity": 0.0, "smoothness": 0.0},
}


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


MODELS = {
    "vim": lambda: vim(depth=2),
    "vmamba": lambda: vmamba(),
    "vit": lambda: build("class token")[0],
    "convolutions": convolutions,
}


KINDS = {
    "vim": "is made of selective scans",
    "vmamba": "is made of selective scans",
    "vit": "is made of softmax attention",
    "convolutions": "has no layer that can be traced",
}


@pytest.mark.parametrize("model", MODELS)
def test_all_that_fit_give_maps(model):
    model, x = MODELS[model](), images(2)
    names = catalogue.fitting(model)
    assert names[-2:] == ["random", "centre"]
    for name in names:
        maps = catalogue.build(name, model, **FAST.get(name, {})).attribute(x, 1)
        assert maps.shape == (2, 1, *SIZE), name
        assert maps.std() > 0, name
        one, other = (catalogue.build(name, model, **FAST.get(name, {})).attribute(x[:1], target) for target in (0, 1))
        assert catalogue.get(name).of_a_class == (not torch.equal(one, other)), name


@pytest.mark.parametrize("model", MODELS)
def test_all_that_do_not_fit_say_which_would(model):
    name, model = model, MODELS[model]()
    fitting = catalogue.fitting(model)
    for entry in catalogue.METHODS.values():
        sentence = catalogue.refusal(entry.name, model, "the model")
        if entry.name in fitting:
            assert sentence is None
            assert catalogue.counterpart(entry.name, model) == entry.name
            continue
        other = catalogue.counterpart(entry.name, model)
        assert other in fitting
        assert sentence == f"the model {KINDS[name]}; use {other}."
        explainer = catalogue.build(entry.name, model)
        with pytest.raises(UnsupportedModelError):
            explainer.attribute(images(1))


def test_the_table_is_whole():
    classes = {getattr(attribution, name) for name in attribution.__all__}
    classes = {each for each in classes if isinstance(each, type)}
    methods = {each for each in classes if issubclass(each, MapAttribution) and not each.__abstractmethods__}
    assert {entry.method for entry in catalogue.METHODS.values()} == methods
    for name, entry in catalogue.METHODS.items():
        assert name == entry.name
        assert name.replace("_", "").isalpha()
        assert name.islower()
        others = {entry.instead} if isinstance(entry.instead, str) else {*entry.instead}
        assert others <= catalogue.METHODS.keys()
        assert entry.meaning.format(reader="the class token").endswith(".")


def test_options():
    model = build("class token")[0]
    built = catalogue.build("transformer_attribution_lrp", model, layers=["blocks.1.attn"])
    assert isinstance(built, TransformerAttribution)
    assert built.variant == "lrp"
    assert built.layers == ["blocks.1.attn"]
    assert "variant" not in catalogue.get("transformer_attribution_lrp").known_options
    assert catalogue.get("transformer_attribution").known_options["variant"] == "gradient_x_attention"
    assert catalogue.build("saliency", model, layers=["blocks.1.attn"], colours="absolute").colours == "absolute"
    with pytest.raises(ValueError, match=r"saliency has no option 'colour'\. Did you mean 'colours'"):
        catalogue.build("saliency", model, colour="sum")
    with pytest.raises(ValueError, match=r"raw_atention: no such method\. Did you mean 'raw_attention'"):
        catalogue.build("raw_atention", model)


def test_what_a_method_refuses_is_said_beforehand():
    model = build("class token")[0]
    model.blocks[0].mlp.act = nn.Softplus()
    sentence = catalogue.refusal("transformer_attribution_lrp", model)
    assert "no relevance rule is known for blocks.0.mlp.act (Softplus)" in sentence
    assert "transformer_attribution_lrp" not in catalogue.fitting(model)
    assert "transformer_attribution" in catalogue.fitting(model)
