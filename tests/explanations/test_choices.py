"""What users write, and what they are told."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.comparison_leads import FIGURES, difference
from mamba_attn import attribution
from mamba_attn.attribution import catalogue
from mamba_attn.attribution.queries import Query
from mamba_attn.datasets.class_names import parse_target
from mamba_attn.datasets.loading import load
from mamba_attn.datasets.made_of import traced_layers
from mamba_attn.explanations import choices
from tests.explanations.cases import CLASSES, VIM, VIT, VMAMBA, save


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    configurations = {"vim_micro": VIM, "vmamba_micro": VMAMBA, "vit_micro": VIT}
    return {
        name: load(name, save(tmp_path_factory.mktemp(name), name, options)) for name, options in configurations.items()
    }


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("vim_micro", "mamba_lrp", "mamba_attribution"),
        ("vit_micro", "attn_lrp", "transformer_attribution"),
    ],
)
def test_the_first_of_the_table_and_the_papers_three_by_default(subjects, name, first, last):
    found = choices.parse_methods([], subjects[name])
    assert [method.key for method in found] == [first, "raw_attention", "attention_rollout", last]
    assert [method.of_a_class for method in found] == [True, False, False, True]
    asked = choices.parse_methods([], subjects[name], place=True)
    assert [method.key for method in asked] == ["raw_attention", "attention_rollout", last]
    assert choices.parse_query("3,4", None, subjects[name], asked) is not None


MANY_PASSES = ("mask_refinement", "keep_and_remove_lrp")  # too dear to be a default


@pytest.mark.parametrize("model", ["vim_micro", "vmamba_micro", "vit_micro"])
def test_nothing_is_ahead_of_the_first_default_when_cells_are_removed(subjects, model):
    results = json.loads((Path(__file__).parents[2] / "benchmarks/results/compare.json").read_text())
    (table,) = (each for each in results["details"]["perturbation"]["tables"] if each["model"] == model)
    figures = table[FIGURES]["gap_top"]
    own = figures[catalogue.counterpart(choices.FIRST, subjects[model].model)]
    assert own[3] == table["images"]
    for method, other in figures.items():
        if method in MANY_PASSES:
            continue
        assert difference(other, own, 1)[1] <= 0, f"{method} is ahead"
    assert difference(own, figures["random"], 1)[1] > 0


def test_options_reach_the_method(subjects):
    texts = ["mamba_attribution:rule=paper", "attention_rollout:signed", "raw_attention:signed=false,convention=exact"]
    paper, rollout, raw = choices.parse_methods([*texts, "mamba_attribution:rule=paper"], subjects["vim_micro"])
    assert paper.build(subjects["vim_micro"].model, None).rule == "paper"
    assert rollout.build(subjects["vim_micro"].model, None).signed is True
    built = raw.build(subjects["vim_micro"].model, ["layers.1.mixer"])
    assert isinstance(built, attribution.RawAttention)
    assert built.signed is False
    assert built.layers == ["layers.1.mixer"]
    assert rollout.key == "attention_rollout:signed=true"
    assert rollout.title == "attention rollout (signed=True)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raw_atention", r"method='raw_atention': no such method. Did you mean 'raw_attention'"),
        ("raw_attention:sined", r"raw_attention has no option 'sined'. Did you mean 'signed'"),
        ("raw_attention:layers=a", "raw_attention has no option 'layers'"),
        ("attention_rollout:signed=maybe", "signed is true or false, not 'maybe'"),
        ("mamba_attribution:rule=papr", r"no such rule. Did you mean 'paper'"),
        ("mamba_lrp:gamma=much", "gamma is a number, not 'much'"),
        ("mamba_lrp:gamma=-1", r"MambaLRP\(gamma=-1\.0\): expected a number of at least 0"),
        ("mamba_lrp:gamma_layers=*.proj_in", "matches no linear layer"),
        ("mamba_attribution:rule=paper,signed", "signed=True"),
        ("integrated_gradients:n_steps=many", "n_steps is a whole number, not 'many'"),
        ("transformer_attribution", "vim_micro is made of selective scans; use mamba_attribution"),
    ],
)
def test_methods_that_are_none(subjects, text, message):
    with pytest.raises(ValueError, match=message):
        choices.parse_methods([text], subjects["vim_micro"])


def test_options_are_read_like_their_defaults(subjects):
    texts = [
        "integrated_gradients:n_steps=8,colours=absolute",
        "occlusion:sliding_window_shapes=4",
        "grad_cam:layer=norm_f",
    ]
    steps, window, cam = (method.options for method in choices.parse_methods(texts, subjects["vim_micro"]))
    assert steps == {"n_steps": 8, "colours": "absolute"}
    assert window == {"sliding_window_shapes": 4}
    assert cam == {"layer": "norm_f"}


def test_a_query_needs_methods_that_read_rows(subjects):
    methods = choices.parse_methods(["raw_attention", "saliency", "random:seed=3"], subjects["vim_micro"])
    subject = subjects["vim_micro"]
    assert choices.parse_query("1,2", None, subject, methods[:1]) == Query("pixel", ((1, 2),))
    assert choices.parse_query(None, None, subject, methods) is None
    for name, given in (("query", ("1,2", None)), ("box", (None, "0,0,2,2"))):
        with pytest.raises(ValueError, match=rf"{name}='.*': saliency, random:seed=3 read no .* leave out {name}, or"):
            choices.parse_query(*given, subject, methods)


def test_methods_beyond_the_default(subjects):
    texts = ["mamba_lrp:gamma_layers=*.in_proj,gamma=0.5", "implicit_attention:gradient=false,rollout=false,conv=no"]
    lrp, implicit, frozen = choices.parse_methods([*texts, "frozen_contribution"], subjects["vim_micro"])
    built = lrp.build(subjects["vim_micro"].model, None)
    assert (built.gamma_layers, built.gamma) == (("*.in_proj",), 0.5)
    assert implicit.build(subjects["vim_micro"].model, None).parts["conv"] is False
    assert [method.of_a_class for method in (lrp, implicit, frozen)] == [True, False, True]
    assert isinstance(frozen.build(subjects["vit_micro"].model, None), attribution.FrozenContribution)
    beside = choices.counterparts([lrp, implicit, frozen], subjects["vit_micro"])
    assert [method.name for method in beside] == ["attn_lrp", "transformer_attribution", "frozen_contribution"]
    for text, other in zip(texts, ("attn_lrp", "transformer_attribution"), strict=True):
        with pytest.raises(ValueError, match=f"vit_micro is made of softmax attention; use {other}"):
            choices.parse_methods([text], subjects["vit_micro"])


def test_scans_have_no_method_of_a_vit(subjects):
    with pytest.raises(ValueError, match="vit_micro is made of softmax attention; use transformer_attribution"):
        choices.parse_methods(["mamba_attribution"], subjects["vit_micro"])


def test_targets(subjects):
    vim = subjects["vim_micro"]
    assert parse_target(None, vim) is None
    assert [parse_target(text, vim) for text in ("HAT", "hat", "1", "0", CLASSES[2])] == [1, 1, 1, 0, 2]
    for text in ("3", "-1", "1.0", "²"):
        with pytest.raises(ValueError, match=rf"target='{text}': no such class; vim_micro knows 3 classes, 0..2"):
            parse_target(text, vim)
    with pytest.raises(ValueError, match="Did you mean 'dress'"):
        parse_target("Dres", vim)
    cranes = dataclasses.replace(vim, classes=["crane", "hat", "Crane"])
    with pytest.raises(ValueError, match="target='crane': the classes 0 and 2 have this name; give the index"):
        parse_target("crane", cranes)
    assert parse_target("2", cranes) == 2


def test_queries(subjects):
    vmamba = subjects["vmamba_micro"]
    assert choices.parse_query("3,4.5", None, vmamba, []) == Query("pixel", ((3, 4.5),))
    assert choices.parse_query(None, "1,2,30,4", vmamba, []) == Query("box", ((1, 2, 30, 4),))
    for text in ("3", "a,b", "1,2,3", "1,,2", ""):
        with pytest.raises(ValueError, match=r"expected ROW,COLUMN in pixels .* 64 rows x 32 columns"):
            choices.parse_query(text, None, vmamba, [])
    for text in ("3", "a,b", "1,2", "1,,2", ""):
        with pytest.raises(ValueError, match=rf"box='{text}': expected X0,Y0,X1,Y1 in pixels"):
            choices.parse_query(None, text, vmamba, [])
    with pytest.raises(ValueError, match="query='1,2', box='1,2,3,4': give only one of them"):
        choices.parse_query("1,2", "1,2,3,4", vmamba, [])
    with pytest.raises(ValueError, match="box='0,0,33,4': the box is empty or leaves the image"):
        choices.parse_query(None, "0,0,33,4", vmamba, [])


def test_four_numbers_are_a_box_and_no_pixel(subjects):
    with pytest.raises(ValueError, match=r"query='1,2,30,4': expected ROW,COLUMN .* Four numbers are a box\."):
        choices.parse_query("1,2,30,4", None, subjects["vmamba_micro"], [])


def test_layers(subjects):
    vmamba = subjects["vmamba_micro"]
    assert len(traced_layers(vmamba)) == 3
    assert choices.parse_layers([], vmamba) == []
    assert choices.parse_layers(["2", "layers.0.*", "2"], vmamba) == [
        traced_layers(vmamba)[0],
        traced_layers(vmamba)[2],
    ]
    assert choices.parse_layers(["-1", "-3"], vmamba) == [traced_layers(vmamba)[0], traced_layers(vmamba)[2]]
    for text in ("3", "-4", "layers.7.*"):
        with pytest.raises(ValueError, match=rf"layers='{text}': no such layer; vmamba_micro has 3 layers, 0..2."):
            choices.parse_layers([text], vmamba)
    with pytest.raises(ValueError, match=r"Did you mean 'layers\.1\.mixer'"):
        choices.parse_layers(["layer.1.mixer"], subjects["vim_micro"])


def test_the_model_beside_is_asked_the_same(subjects):
    vmamba, vit = subjects["vmamba_micro"], subjects["vit_micro"]
    methods = choices.parse_methods(["raw_attention:signed", "raw_attention", "mamba_attribution"], vmamba)
    cams = choices.parse_methods(["attention_grad_cam", "saliency:abs=false", "transformer_attribution_lrp"], vit)
    assert [each.key for each in choices.counterparts(cams, vmamba)] == ["grad_cam", "saliency", "mamba_attribution"]
    question = choices.Question(vmamba, methods, traced_layers(vmamba)[-1:], 1, Query("pixel", ((32.0, 8.0),)))
    beside = question.of_companion(vit)  # 64 x 32 pixels there, 32 x 32 here
    assert [method.key for method in beside.methods] == ["raw_attention", "transformer_attribution"]
    assert beside.layers == [traced_layers(vit)[-1]]
    assert beside.target == 1
    other = dataclasses.replace(vit, classes=["hat", "shoes", "dress"])
    assert question.of_companion(other).target == 0
    assert question._replace(target=2).of_companion(other).target is None  # it has no such class
    assert beside.query == Query("pixel", ((16.0, 8.0),))
    box = question._replace(query=Query("box", ((8.0, 32.0, 16.0, 64.0),)), layers=[], target=None).of_companion(vit)
    assert box.query == Query("box", ((8.0, 16.0, 16.0, 32.0),))
    assert (box.layers, box.target) == ([], None)


def test_layers_as_deep(subjects):
    vim, vit = subjects["vim_micro"], subjects["vit_micro"]  # 2 and 3 layers
    assert choices.same_depth(traced_layers(vim), vim, vit) == [traced_layers(vit)[0], traced_layers(vit)[2]]
    assert choices.same_depth(traced_layers(vit)[2:], vit, vim) == traced_layers(vim)[1:]
