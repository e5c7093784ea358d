"""load(): built-in names, a user's own code, timm; what was guessed is said; bad input ends in a sentence."""

import dataclasses
import json
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from torch import nn

import mamba_attn
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.class_names import names_for, read_names
from mamba_attn.datasets.loading import complete, load, load_companions
from mamba_attn.datasets.made_of import traced_layers
from mamba_attn.errors import ModelBuildError, UnsupportedModelError, WeightsError

NET = """
import torch
from torch import nn
from mamba_attn.core.transform import Transform
from mamba_attn.core.loaded_model import LoadedModel
from beside import WIDTH

def build(num_classes=4, depth=2):
    from mamba_attn.models import create
    print("building")
    model = create("vim_tiny", image_size=32, patch_size=8, embed_dim=WIDTH, depth=depth, num_classes=num_classes)
    return nn.Sequential(model)

def whole():
    return LoadedModel(build(2), Transform((32, 32), mean=.5, std=.5) if False else Transform((32, 32)), ["a", "b"])

def wants(depth, *, width):
    return nn.Linear(depth, width)

def dictionary():
    return {"model": build()}

def fails():
    raise RuntimeError("no such luck")

def leaves():
    raise SystemExit(3)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build(3)
    def forward(self, images):
        return {"features": images, "logits": self.net(images)}

def painted():
    return LoadedModel(build(), transform=lambda picture: torch.zeros(32, 32))

value = 3
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder with a user's code, which is the current one; its modules are forgotten afterwards."""
    (tmp_path / "own_net.py").write_text(NET)
    (tmp_path / "beside.py").write_text("WIDTH = 16\n")
    (tmp_path / "broken.py").write_text("import beside\nimport no_such_package\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner.py").write_text("from . import other\nfrom own_net import build\n")
    (tmp_path / "package" / "other.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


SHOWN = {"size": (32, 32), "mean": (0.5,), "std": (0.5,)}


@pytest.mark.parametrize("spec", ["own_net.py:build", "own_net:build", "package/inner.py:build", "package.inner:build"])
def test_a_users_own_code(code, spec, capsys):
    found = load(spec, **SHOWN, depth=1)
    assert (len(found.classes), found.head, len(found.model[0].layers)) == (4, "softmax", 1)
    assert (found.transform.size, found.transform.mean) == ((32, 32), (0.5,) * 3)
    assert found.options == {"depth": 1}
    assert "building" not in capsys.readouterr().out  # what it prints is no result
    assert not found.model.training
    assert traced_layers(found) == ["0.layers.0.mixer"]


def test_edited_code_is_another_model(code):
    before = load("own_net.py:Net", **SHOWN).code_fingerprint
    assert load("own_net.py:Net", **SHOWN).code_fingerprint == before
    (code / "own_net.py").write_text(NET.replace('"features": images', '"features": -images'))
    assert load("own_net.py:Net", **SHOWN).code_fingerprint != before


def test_it_may_return_all_of_it_and_be_a_class(code):
    found = load("own_net.py:whole")
    assert (found.classes, found.transform.size) == (["a", "b"], (32, 32))
    assert found.spec == f"{code / 'own_net.py'}:whole"
    assert len(load("own_net.py:Net", **SHOWN).classes) == 3  # of the logits in its dict


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        (
            "nothing.py:build",
            {},
            r"model='nothing\.py:build': there is no file 'nothing\.py'; expected FILE",
        ),
        ("own_net.py", {}, r"add the function that returns the model, own_net\.py:FUNCTION"),
        ("own_net.py:biuld", {}, r"own_net\.py has no 'biuld'\. Did you mean 'build'"),
        ("own_net.py:value", {}, r"'value' is a int, not a function that returns a model\. Known: .*'build'"),
        ("no_package.inner:build", {}, r"there is no module 'no_package' in "),
        ("own_net.py:wants", {}, r"wants\(\) needs depth, width; give each as an option, depth=VALUE"),
        ("own_net.py:wants", {"depth": 2}, r"wants\(\) needs width;"),
        ("own_net.py:build", {"dephts": 2}, r"build\(\) has no argument 'dephts'\. Did you mean 'depth'"),
        ("vim_micor", {}, r"load\('vim_micor'\): no such model\. Did you mean 'vim_micro'.* Or give FILE\.py:FUNCTION"),
        ("timm:vit_smal_patch16_224", {}, r"timm has no such model\. Did you mean 'vit_small_patch16_224'"),
        ("hf:nowhere", {}, r"there is no nowhere/config\.json; expected hf:FOLDER"),
    ],
)
def test_what_cannot_be_found(code, spec, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(spec, **options)


@pytest.mark.parametrize(
    ("spec", "sentence", "line"),
    [
        ("own_net.py:fails", r"fails\(\) failed\.", 'raise RuntimeError("no such luck")\nRuntimeError: no such luck'),
        ("own_net.py:leaves", r"leaves\(\) failed\.", "SystemExit: 3"),
        (
            "broken.py:build",
            r"the import of \S+broken\.py failed\.",
            "NotFoundError: No module named 'no_such_pack",
        ),
        ("own_net.py:dictionary", r"it returned dict; expected a torch\.nn\.Module or a mamba_attn\.Load", "dict"),
    ],
)
def test_what_fails_shows_its_own_traceback(code, spec, sentence, line):
    with pytest.raises(ModelBuildError, match=sentence) as caught:
        load(spec)
    text = str(caught.value).replace("    ", "")
    assert line in text
    assert "mamba_attn/datasets" not in text  # none of our own lines
    if spec.startswith("broken"):
        assert "broken" not in sys.modules


def test_weights_give_the_number_of_classes_and_their_names(code):
    model = load("own_net.py:build", **SHOWN, num_classes=7).model
    names = [f"name {index}" for index in range(7)]
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "classes": names}, "best.pth")
    found = load("own_net.py:build", "best.pth", **SHOWN)
    assert (found.classes, found.options, found.weights) == (names, {"num_classes": 7}, "best.pth")
    assert torch.equal(found.model[0].head.weight, model[0].head.weight)
    with pytest.raises(WeightsError, match="they have 7 classes: num_classes=7"):
        load("own_net.py:build", "best.pth", **SHOWN, num_classes=5)
    with pytest.raises(ValueError, match=r"classes: 2 names, 'a' the first, and own_net\.build has 7 outputs"):
        load("own_net.py:build", "best.pth", **SHOWN, classes=["a", "b"])


def test_stand_ins_are_used_and_said(code):
    (code / "needs.py").write_text(
        "from torch import nn\nimport selective_scan_cuda\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 3))\n"
    )
    with pytest.warns(UserWarning, match=r"needs\.py:build: built with CPU stand-ins of selective_scan_cuda"):
        assert load("needs.py:build", **SHOWN).stand_ins
    del sys.modules["needs"]
    with pytest.raises(ModelBuildError, match="No module named 'selective_scan_cuda'"):
        load("needs.py:build", **SHOWN, stand_ins="off")
    with pytest.raises(ValueError, match="stand_ins='maybe': expected one of"):
        load("needs.py:build", stand_ins="maybe")


def test_timms_models_bring_their_transform():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    with pytest.warns(UserWarning, match="timm:vit_tiny_patch16_224: its weights are random"):
        found = load("timm:vit_tiny_patch16_224", **options)
    assert (found.transform.size, found.transform.mean, len(found.classes)) == ((32, 32), (0.5,) * 3, 3)
    assert (found.spec, found.name) == ("timm:vit_tiny_patch16_224", "vit_tiny_patch16_224")


def test_transformers_models_of_a_folder(tmp_path, monkeypatch):
    """The door itself, on a double; transformers is not among what the tests install."""
    processor = types.SimpleNamespace(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    config = types.SimpleNamespace(architectures=["ViTForImageClassification"], id2label={1: "b", 0: "a"})

    class Net(nn.Module):
        def forward(self, images):
            return {"logits": images.mean((2, 3))[:, :2], "hidden_states": (images,)}

    asked = []

    def auto(result):
        def from_pretrained(folder, **options):
            asked.append((folder, options["trust_remote_code"], options["local_files_only"]))
            if isinstance(result, Exception):
                raise result
            return result

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    double = types.ModuleType("transformers")
    double.__spec__ = types.SimpleNamespace(name="transformers")
    double.AutoConfig = auto(config)
    double.AutoModelForImageClassification, double.AutoImageProcessor = auto(Net()), auto(processor)
    monkeypatch.setitem(sys.modules, "transformers", double)
    found = load(f"hf:{tmp_path}")
    assert (found.classes, found.transform.fit, found.transform.size) == (["a", "b"], "squash", (16, 16))
    assert asked == [(tmp_path, False, True)] * 3
    double.AutoConfig = auto(ValueError("... set the option `trust_remote_code=True` to remove this error."))
    with pytest.raises(ValueError, match=r"code that lies in its folder; read it, .* give trust_remote_code=True"):
        load(f"hf:{tmp_path}")


def test_bundled_names_come_with_their_weights():
    found = load("vim_digits")
    assert (found.weights, found.spec, len(found.classes)) == ("demo", "vim_digits", 10)
    assert load("vmamba_digits", "random").weights == "random"
    with pytest.raises(WeightsError, match="no bundled weights for this model"):
        load("vmamba_tiny")
    with pytest.raises(ValueError, match=r"size=\(32, 32\): vit_digits takes only images of 64,64 pixels"):
        load("vit_digits", size=(32, 32))


class Plain(nn.Module):
    def __init__(self, channels=3, side=None):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 8, 8)
        if side is not None:
            self.img_size = side

    def forward(self, images):
        return self.stem(images).mean((2, 3))


def test_a_transform_that_is_guessed_is_said():
    with pytest.warns(UserWarning, match=r"Plain: its transform is not known, so pictures are cropped to 40 x 40 "):
        found = complete(Plain(side=40))
    assert (found.transform.size, found.classes) == ((40, 40), [f"class {index}" for index in range(4)])
    with pytest.warns(UserWarning, match="standard deviation of grey"):
        assert len(complete(Plain(channels=1)).transform.mean) == 1


class Twice(Plain):
    def forward(self, images):
        scores = super().forward(images)
        return scores, scores + 1


def test_several_outputs_that_could_be_the_scores_are_said():
    with pytest.warns(
        UserWarning, match=r"it returned tuple \(output\[0\] \(1, 4\), output\[1\] \(1, 4\)\), and any of"
    ):
        assert complete(LoadedModel(Twice(), Transform((16, 16)))).classes == []


def test_completing_disturbs_nothing():
    model = nn.Sequential(Plain(), nn.BatchNorm1d(4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="is in training mode, and 1 change"):
        complete(LoadedModel(model, Transform((16, 16))))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_transform_of_another_shape_is_a_sentence():
    with pytest.raises(UnsupportedModelError, match=r"it fails on an image of its transform, \(1, 3, 4, 4\): "):
        complete(LoadedModel(Plain(), Transform((4, 4))))


def test_a_traceback_shows_no_line_of_ours(code):
    with pytest.raises(ModelBuildError, match=r"painted\(\) failed") as caught:
        load("own_net.py:painted")
    text = str(caught.value)
    assert "transform=lambda picture" in text
    assert "mamba_attn/core" not in text
    assert text.splitlines()[-1].startswith("ValueError: transform=<lambda>: it returned (32, 32); expected (colours,")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\ndog\n\n", ["cat", "dog"]),
        ('["cat", "dog"]', ["cat", "dog"]),
        ('{"dog": 1, "cat": 0}', ["cat", "dog"]),
        ('{"1": "dog", "0": "cat"}', ["cat", "dog"]),
        ("{0: 'cat', 1: 'dog'}", ["cat", "dog"]),
        (json.dumps({"classes": ["cat", "dog"], "epochs": 3}), ["cat", "dog"]),
    ],
)
def test_files_of_names(text, names, tmp_path):
    (tmp_path / "classes.txt").write_text(text)
    assert read_names(tmp_path / "classes.txt") == names


@pytest.mark.parametrize("text", ["{", '{"a": 3}', '{"a": "b"}'])
def test_files_that_hold_no_names(text, tmp_path):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=r"classes='\S+classes\.json': "):
        read_names(tmp_path / "classes.json")
    with pytest.raises(ValueError, match="there is no such file; expected one name per line, or JSON"):
        read_names(tmp_path / "none.txt")


def test_names_fit_the_outputs():
    assert names_for(2, ["a"], ["b", "c"]) == ["b", "c"]
    assert names_for(2, ["a"]) == ["class 0", "class 1"]


def test_the_functions_stand_at_the_top():
    for name in ("LoadedModel", "Transform", "load", "explain", "collect", "compare", "explore"):
        assert name in mamba_attn.__all__
        assert callable(getattr(mamba_attn, name))


def test_help_runs_no_code_and_neither_does_listing(code):
    (code / "evil.py").write_text(textwrap.dedent("open('was_run', 'w')\n"))
    command = [sys.executable, "-m", "mamba_attn.commands.cli", "explain", "--model", "evil.py:build", "--help"]
    assert subprocess.run(command, capture_output=True, cwd=code).returncode == 0
    assert not (code / "was_run").exists()


def test_companions_read_the_files_as_the_model_does():
    subject = load("vim_micro")
    subject.transform = dataclasses.replace(subject.transform, range=(0.0, 1.0))
    found = load_companions(None, subject)
    assert [each.name for each in found] == ["vmamba_micro", "vit_micro"]
    assert {each.transform.range for each in found} == {(0.0, 1.0)}
    assert load_companions(["none"], subject) == []
    assert load_companions(None, load("vim_digits")) == []
    with pytest.raises(ValueError, match="'none' stands alone"):
        load_companions(["none", "vit_micro"], subject)
    with pytest.raises(ValueError, match=r"beside='vim_tiny': no model with weights in the package\."):
        load_companions(["vim_tiny"], subject)
