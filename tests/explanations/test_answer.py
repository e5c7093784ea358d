"""The arrays of an image are those of the methods."""

import numpy as np
import pytest
import torch
from PIL import Image

from mamba_attn import images, trace
from mamba_attn.attribution import (
    AttentionRollout,
    AttnLRP,
    MambaAttribution,
    MambaLRP,
    RawAttention,
    TransformerAttribution,
)
from mamba_attn.attribution.queries import Query
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.datasets import loading
from mamba_attn.datasets.made_of import is_transformer, traced_layers
from mamba_attn.errors import TraceError
from mamba_attn.explanations import choices, explain
from mamba_attn.explanations.answer import answer, at_depths
from mamba_attn.models.vim import VisionMamba
from tests.explanations.cases import CLASSES, VIM, VIT, VMAMBA, photo, save

CASES = {"vim_micro": VIM, "vmamba_micro": VMAMBA, "vit_micro": VIT}


@pytest.fixture(scope="module", params=CASES)
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return loading.load(request.param, save(folder, request.param, CASES[request.param])), photo(folder)


def ask(loaded, **more):
    methods = choices.parse_methods([], loaded[0], place="query" in more)
    return answer(choices.Question(loaded[0], methods, **more), loaded[1])


def inputs(loaded):
    return loaded[0].transform(loaded[1])[None]


def test_maps_are_those_of_the_methods(loaded):
    found, model = ask(loaded), loaded[0].model
    first, last = (MambaLRP, MambaAttribution)
    if is_transformer(loaded[0]):
        first, last = AttnLRP, TransformerAttribution
    for method, built in zip(found.methods, (first, RawAttention, AttentionRollout, last), strict=True):
        truth = built(model).attribute(inputs(loaded))[0, 0].numpy()
        np.testing.assert_allclose(found.maps[method.key], truth, rtol=1e-5, atol=4e-6 * np.abs(truth).max())
        assert found.maps[method.key].shape == found.image.shape[:2] == loaded[0].transform.size


def test_matrices_and_rows_are_those_of_the_trace(loaded):
    found = ask(loaded)
    with torch.no_grad(), trace(loaded[0].model) as record:
        logits = loaded[0].model(inputs(loaded))
    np.testing.assert_allclose(found.probabilities, logits.softmax(1)[0].numpy(), atol=1e-6)
    assert list(found.read) == list(record)
    for name, matrix in found.matrices.items():
        truth = record[name].attention()[0].numpy()
        np.testing.assert_allclose(matrix, truth, rtol=1e-4, atol=1e-6 * np.abs(truth).max())
    token = record.layers[0].layout.class_tokens
    for name, row in found.read.items():
        matrix = record[name].attention()[0].numpy()
        truth = matrix[token[0]] if token else matrix.mean(0)
        np.testing.assert_allclose(row, truth, rtol=1e-4, atol=1e-6 * np.abs(matrix).max())
    assert found.reader == ("the class token" if token else "the mean patch")


def test_target_layers_and_query_reach_the_methods(loaded):
    model, layers = loaded[0].model, traced_layers(loaded[0])[:1]  # of the last one only the class token's row counts
    found = ask(loaded, layers=layers, target=2, query=Query("pixel", ((3.0, 5.0),)))
    last = TransformerAttribution if is_transformer(loaded[0]) else MambaAttribution
    truth = last(model, layers=layers).attribute(inputs(loaded), 2, pixel=(3, 5))[0, 0].numpy()
    np.testing.assert_allclose(found.maps[found.methods[2].key], truth, rtol=1e-5, atol=4e-6 * np.abs(truth).max())
    other = ask(loaded, layers=layers, target=1, query=Query("pixel", ((3.0, 5.0),))).maps[found.methods[2].key]
    assert np.abs(truth - other).max() > 1e-3 * np.abs(truth).max() > 0
    assert list(found.matrices) == list(found.read) == layers
    assert (found.explained, found.reader) == (2, "the marked patch")


def test_the_folder_of_a_picture_is_its_label(loaded, tmp_path):
    assert ask(loaded).label is None
    for name, label in (("hat", CLASSES.index("hat")), ("HAT", CLASSES.index("hat")), ("photos", None)):
        found = ask((loaded[0], photo(tmp_path / name)))
        assert found.label == label
        assert int(found.arrays()["label"]) == (-1 if label is None else label)


def test_arrays_have_names(loaded):
    found = ask(loaded)
    arrays = found.arrays()
    assert arrays["classes"].tolist() == CLASSES
    assert arrays["layers"].tolist() == traced_layers(loaded[0])
    assert int(arrays["explained"]) == found.probabilities.argmax()
    expected = {"image", "probabilities", "classes", "explained", "label", "layers", *found.maps}
    expected |= {f"attention.{name}" for name in found.matrices} | {f"row.{name}" for name in traced_layers(loaded[0])}
    assert set(arrays) == expected
    assert set(found.arrays("x.")) == {f"x.{name}" for name in expected}
    assert np.array_equal(arrays["image"], loaded[0].transform.pixels(loaded[1]))
    assert found.best(2)[0] == (CLASSES[int(found.probabilities.argmax())], found.probabilities.max())


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (5, [1, 2, 3]), (12, [3, 6, 8]), (24, [6, 12, 17])]
)
def test_a_quarter_half_and_three_quarters(count, expected):
    names = [str(index) for index in range(count)]
    assert [int(name) for name in at_depths(names)] == expected


def test_official_models_see_the_crop_that_they_were_measured_with(tmp_path):
    path = save(tmp_path / "tiny", "vim_tiny", {**VIM, "image_size": [32, 48]})
    found = ask((loading.load("vim_tiny", path), photo(tmp_path)))
    picture = images.read(photo(tmp_path))
    expected = images.crop(picture, (32, 48), cover=(36, 54), interpolation="bicubic")
    assert np.array_equal(found.image, expected)


def test_a_backbone_gives_maps_without_classes(tmp_path):
    model = LoadedModel(VisionMamba(**{**VIM, "num_classes": 0}).eval(), Transform((32, 32)), [])
    (found,) = explain(model, photo(tmp_path), tmp_path / "out")
    assert (found.explained, found.best(), list(found.maps)) == (None, [], ["raw_attention", "attention_rollout"])
    assert (tmp_path / "out" / "a.html").is_file()
    with pytest.raises(ValueError, match=r"mamba_attribution.*explains a class, and VisionMamba has none"):
        explain(model, photo(tmp_path), methods="mamba_attribution")


def test_tensors_and_pictures_are_explained_alike(tmp_path):
    model = LoadedModel(VisionMamba(**VIM).eval(), Transform((32, 32), mean=(0.5,) * 3, std=(0.5,) * 3), name="mine")
    path = photo(tmp_path)
    picture = Image.open(path).convert("RGB")
    by_file, by_picture, by_tensor = explain(model, [path, picture, model.transform(path)], target=1, layers=[0])
    for other in (by_picture, by_tensor):
        assert np.array_equal(other.image, by_file.image)
        for name, values in by_file.maps.items():
            np.testing.assert_allclose(other.maps[name], values, rtol=0, atol=1e-5)
    assert (by_file.name, by_file.explained, by_file.class_name(1)) == ("mine", 1, "class 1")


def test_a_default_that_the_model_refuses_is_left_out_and_one_that_was_named_is_not(loaded, monkeypatch):
    def refuse(*_):
        raise TraceError("its shares do not sum to the logit.")

    monkeypatch.setattr("mamba_attn.attribution.lrp.linear_backward.LinearisedAttribution._explain", refuse)
    first = choices.parse_methods([], loaded[0])[0].key
    with pytest.warns(UserWarning, match=f"{first} is left out: its shares do not sum to the logit"):
        found = ask(loaded, by_default=True)
    assert len(found.maps) == 3
    assert first not in found.maps
    with pytest.raises(TraceError, match="do not sum"):
        ask(loaded)
