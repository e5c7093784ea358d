"""The weights that come with the package: small, half precision, each with a card that is true of the file."""

import numpy as np
import pytest
import torch

import mamba_attn
from benchmarks.export import mflops, samples
from mamba_attn import images
from mamba_attn.models import registry
from mamba_attn.testing import check_adapter

DEMOS = registry.demos()
PHOTOS = [name for name in DEMOS if name.endswith("_micro")]
DIGITS = [name for name in DEMOS if name.endswith("_digits")]


def test_there_are_some() -> None:
    assert set(PHOTOS) == {"vim_micro", "vmamba_micro", "vit_micro"}
    assert set(DIGITS) == {"vim_digits", "vmamba_digits", "vit_digits"}
    assert set(DEMOS) == {*PHOTOS, *DIGITS}


@pytest.mark.parametrize("name", DEMOS)
def test_the_card_is_true_of_the_file(name: str) -> None:
    from safetensors import safe_open

    card = registry.demo_card(name)
    path = registry._DEMOS / f"{name}.safetensors"
    assert path.stat().st_size < 12e6  # all of a release stay below 25 MB
    with safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {value.get_dtype() for value in shapes.values()} == {"F16"}
    model = mamba_attn.models.create(name, weights="demo")
    assert sum(parameter.numel() for parameter in model.parameters()) == card["parameters"]
    assert set(shapes) == set(model.state_dict())
    assert set(card["per_class"]) == set(card["classes"])
    assert len(card["classes"]) == model.num_classes == card["options"]["num_classes"]
    data = {"localise:digits64"} if name in DIGITS else {"imagenette128", "clothing128"}
    assert set(card["data"]) == set(card["sets"]) == data
    assert any("non-commercial" in source["license"] for source in card["data"].values())
    words = "CC BY-SA" if name in DIGITS else "CC0"
    assert any(words in source["license"] for source in card["data"].values())
    assert card["top1"] >= {"vmamba_micro": 84}.get(name, 80 if name in DIGITS else 74)
    assert card["command"].startswith("python benchmarks/train.py " + name)
    assert {"seed", "epochs", "pixels", "recipe", "versions"} <= set(card)


@pytest.mark.parametrize("name", DEMOS)
def test_the_images_of_the_package_are_told_as_the_card_says(name: str) -> None:
    card = registry.demo_card(name)
    found = samples(mamba_attn.models.create(name, weights="demo"), name, card["pixels"], card["classes"])
    assert found == card["samples"]
    assert name in DIGITS or found["top1"] >= (60 if name == "vit_micro" else 80)  # of six, it misreads two


def test_vim_and_the_vit_cost_alike() -> None:
    vim, vit = (registry.demo_card(name) for name in ("vim_micro", "vit_micro"))
    assert vit["parameters"] == pytest.approx(vim["parameters"], rel=0.02)
    assert vit["mflops"] == pytest.approx(vim["mflops"], rel=0.1)
    for name, card in (("vim_micro", vim), ("vit_micro", vit)):
        assert mflops(mamba_attn.models.create(name), 128) == card["mflops"]


@pytest.mark.parametrize("name", DIGITS)
def test_trained_digits_tell_a_drawn_one_and_obey_the_laws(name: str) -> None:
    model = mamba_attn.models.create(name, weights="demo")
    batch = images.normalise(np.stack([bar()]))
    with torch.no_grad():
        assert model(batch).argmax(1).tolist() == [1]  # of ten
    report = check_adapter(model, batch)
    assert report.matrix_error <= 1e-5


def bar() -> np.ndarray:
    """A white, slightly slanted stroke on grey, (64, 64, 3), as one writes a 1."""
    rows, columns = np.mgrid[:64, :64]
    stroke = (np.abs(columns + 0.25 * rows - 40) < 2) & (np.abs(rows - 32) < 9)
    return np.repeat(np.where(stroke, 255, 90).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("name", PHOTOS)
def test_trained_weights_see_clothing_and_obey_the_laws(name: str) -> None:
    card = registry.demo_card(name)
    model = mamba_attn.models.create(name, weights="demo")
    transform = mamba_attn.models.transform(name)
    batch = torch.stack([transform(path) for path in images.samples()])
    with torch.no_grad():
        probabilities = model(batch).softmax(1)
    clothing = [index for index, label in enumerate(card["classes"]) if card["classes"].index("dress") <= index]
    assert probabilities[:, clothing].sum(1).min() > 0.4  # half of the classes are clothing; all six images are
    report = check_adapter(model, batch[:1])
    assert report.matrix_error <= 1e-5
