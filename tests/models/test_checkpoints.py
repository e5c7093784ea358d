import argparse
import codecs
import functools
import os
import pickle
import re
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

import mamba_attn.models
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import WeightsError
from mamba_attn.models import checkpoints
from mamba_attn.models.vim import VisionMamba, resize_positions
from mamba_attn.models.vmamba import VSSM
from tests.models import naive

VIM = {"image_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 16, "depth": 1, "d_state": 2}
VMAMBA = {"num_classes": 5, "dims": 8, "depths": (1, 1), "d_state": 2}
V0 = {**VMAMBA, "generation": "v0", "mlp_ratio": 0.0}


def vim(**options):
    return naive.randomise(VisionMamba(**{**VIM, **options}).eval())


def vmamba(**options):
    return naive.randomise(VSSM(**{**VMAMBA, **options}).eval())


def save(state, folder, name="weights.pth"):
    path = folder / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def loaded(path, model, **options):
    """The file gives a fresh model of the same configuration the same weights; returns what was warned about."""
    fresh = type(model)(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints.load(fresh, path)
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert all(str(each.message).startswith(str(path)) for each in caught)
    return " ".join(str(each.message).removeprefix(str(path)) for each in caught)


def assert_loads(path, model, **options):
    assert loaded(path, model, **options) == ""


def put(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def other(state):
    """The same names and shapes, other numbers: what must not be taken."""
    return {key: value + 1 for key, value in state.items()}


TRAINING_STATE = {
    "epoch": 3,
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "lr": [1e-3]},
    "args": argparse.Namespace(model="vim", lr=1e-3),
}
MMSEG = {"decode_head.conv.weight": torch.zeros(2), "auxiliary_head.bias": torch.zeros(3)}
AVERAGE = "only as a moving average, "
# how people's files hold the weights of a model, and what must be said of it
LAYOUTS = {
    "bare": (lambda s: s, ""),
    "model, args and an optimizer": (lambda s: {"model": s, **TRAINING_STATE}, ""),
    "module.": (lambda s: put("module.", s), ""),
    "model_ema(module.)": (lambda s: {"model_ema": put("module.", s)}, f"{AVERAGE}'model_ema.module'"),
    "state_dict and state_dict_ema": (
        lambda s: {"state_dict_ema": other(s), "state_dict": s},
        "took 'state_dict', not the moving average 'state_dict_ema'",
    ),
    "state_dict_ema alone": (lambda s: {"state_dict_ema": s, "arch": "vim"}, f"{AVERAGE}'state_dict_ema'"),
    "Lightning": (lambda s: {"state_dict": put("model.", s), "pytorch-lightning_version": "2.1", "loops": {}}, ""),
    "torch.compile": (lambda s: put("_orig_mod.", s), ""),
    "torch.compile in DistributedDataParallel": (lambda s: {"model": put("module._orig_mod.", s)}, ""),
    "encoder. and a projector": (
        lambda s: {**put("encoder.", s), "projector.0.weight": torch.zeros(3, 3)},
        "took 'encoder' and left out 1 tensor outside it (projector)",
    ),
    "model_state_dict and a loss": (lambda s: {"model_state_dict": s, "loss": torch.tensor(0.3), "epoch": 1}, ""),
    "net": (lambda s: {"net": s, "acc": 91.2}, ""),
    "params": (lambda s: {"params": s}, ""),
    "params_ema": (lambda s: {"params_ema": s, "iter": 3}, f"{AVERAGE}'params_ema'"),
    "mmseg": (
        lambda s: {"state_dict": {**put("backbone.", s), **MMSEG}, "meta": {"epoch": 1}},
        "left out 2 tensors outside it (auxiliary_head, decode_head)",
    ),
    "two levels down": (lambda s: {"checkpoint": {"model": {"weights": s}}, "step": torch.tensor(3)}, ""),
    "counters of thop": (lambda s: {**s, "total_ops": torch.zeros(1), "head.total_params": torch.zeros(1)}, ""),
    "momentum encoder": (
        lambda s: {**put("encoder_q.", s), **put("encoder_k.", other(s))}, "took 'encoder_q'; 'encoder_k' fits as well"
    ),
    "module.backbone.": (lambda s: put("module.backbone.", s), ""),
    "averaged model": (lambda s: {"n_averaged": torch.tensor(3), **put("module.", s)}, ""),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("make", "options"), [(vim, VIM), (vmamba, VMAMBA)])
def test_layouts_of_files(layout, make, options, tmp_path):
    model = make()
    pack, said = LAYOUTS[layout]
    warned = loaded(save(pack(model.state_dict()), tmp_path), model, **options)
    assert said in warned
    assert bool(said) == bool(warned)


def test_an_entry_can_be_chosen(tmp_path):
    model = vim()
    path = save({"model": other(model.state_dict()), "model_ema": model.state_dict()}, tmp_path)
    fresh = VisionMamba(**VIM)
    with pytest.warns(UserWarning, match="only as a moving average, 'model_ema'"):
        checkpoints.load(fresh, f"{path}:model_ema")
    assert torch.equal(fresh.head.weight, model.head.weight)
    with pytest.raises(WeightsError, match=r"no tensors in 'ema'. Its entries: model, model_ema"):
        checkpoints.load(fresh, f"{path}:ema")


def test_a_wrapper_takes_the_weights_of_what_it_wraps(tmp_path):
    model = vim()
    wrapper = torch.nn.Sequential(VisionMamba(**VIM))
    checkpoints.load(wrapper, save({"model": put("module.", model.state_dict())}, tmp_path))
    assert torch.equal(wrapper[0].head.weight, model.head.weight)


def test_safetensors(tmp_path):
    model = vim()
    assert_loads(save(model.state_dict(), tmp_path, "weights.safetensors"), model, **VIM)


def test_half_precision_files_load_into_float32(tmp_path):
    model = vim()
    state = {key: value.half() for key, value in model.state_dict().items()}
    loaded = VisionMamba(**VIM)
    with pytest.warns(UserWarning, match="its numbers are float16, and were cast to the model's float32"):
        checkpoints.load(loaded, save(state, tmp_path))
    assert loaded.head.weight.dtype == torch.float32
    assert torch.equal(loaded.head.weight, state["head.weight"].float())


def old_vmamba(key):
    key = re.sub(r"^patch_embed\.0\.", "patch_embed.proj.", key)
    key = re.sub(r"^patch_embed\.2\.", "patch_embed.norm.", key)
    key = re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", key)
    return (
        key.replace(".op.", ".self_attention.")
        .replace("classifier.norm.", "norm.")
        .replace("classifier.head.", "head.")
    )


def test_names_of_the_first_vmamba_release(tmp_path):
    model = vmamba(**V0)
    state = {old_vmamba(key): value for key, value in model.state_dict().items()}
    assert {"patch_embed.proj.weight", "layers.0.blocks.0.ln_1.bias", "head.bias", "norm.weight"} < set(state)
    assert_loads(save({"model": state}, tmp_path), model, **V0)


def one_file(state, trailing):
    """Routes side by side, as matrices or as 1x1 convolutions over sequences."""
    result = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.op\.)(x_proj|dt_projs)_weight", key)
        beside = value.flatten(0, 1) if match else value
        result[f"{match[1]}{match[2]}.weight" if match else key] = beside[..., None] if match and trailing else beside
    return result


@pytest.mark.parametrize("trailing", [False, True])
def test_names_of_the_one_file_vmamba(trailing, tmp_path):
    model = vmamba()
    state = one_file(model.state_dict(), trailing)
    assert state["layers.0.blocks.0.op.dt_projs.weight"].shape == ((32, 1, 1) if trailing else (32, 1))
    assert_loads(save({"model": state}, tmp_path), model, **VMAMBA)


def test_patch_merging_of_the_one_file_vmamba(tmp_path):
    model = vmamba(**V0)
    state = {
        key.replace("downsample.norm", "downsample.1").replace("downsample.reduction", "downsample.2"): value
        for key, value in one_file(model.state_dict(), False).items()
    }
    assert "layers.0.downsample.2.weight" in state
    assert_loads(save({"model": state}, tmp_path), model, **V0)


def test_one_by_one_convolutions(tmp_path):
    model = vmamba()
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    state = {k: v[:, :, None, None] if k.endswith(linear) else v for k, v in model.state_dict().items()}
    assert_loads(save({"model": state}, tmp_path), model, **VMAMBA)


@pytest.mark.parametrize("class_token", ["middle", "first", None])
def test_position_embeddings_of_another_size(class_token, tmp_path):
    model = vim(class_token=class_token)
    loaded = VisionMamba(**{**VIM, "image_size": (48, 64), "class_token": class_token}).eval()
    with pytest.warns(UserWarning, match=r"for 4x4 patches \(32 pixels at this model's stride\), .* resized to .* 6x8"):
        checkpoints.load(loaded, save(model.state_dict(), tmp_path))
    expected = resize_positions(model.pos_embed, model.layout(32, 32), loaded.layout(48, 64))
    assert torch.equal(loaded.pos_embed, expected)
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():  # the same as running the small model on the large image
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
    assert expected.shape[1] == TokenLayout((6, 8)).tokens + (class_token is not None)


def test_create_loads(tmp_path):
    model = vim()
    options = {key: value for key, value in VIM.items() if key != "patch_size"}
    loaded = mamba_attn.models.create("vim_micro", weights=save(model.state_dict(), tmp_path), **options)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_weights_that_do_not_fit(tmp_path):
    state = vim().state_dict()
    del state["norm_f.weight"], state["layers.0.mixer.D"]
    state["rope.freqs"] = torch.zeros(3)
    path = save({"model": state}, tmp_path)
    loaded = VisionMamba(**{**VIM, "num_classes": 7})
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        checkpoints.load(loaded, path)
    text = str(error.value)
    assert text.startswith(f"{path}: these weights do not fit this VisionMamba: 2 missing: ")
    assert "layers.0.mixer.D, norm_f.weight; 1 unexpected: rope.freqs; 2 of another shape: " in text
    assert "head.weight (5, 16) for (7, 16), head.bias (5,) for (7,)" in text
    assert "num_classes=5" in text
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


def test_long_lists_of_keys_are_cut(tmp_path):
    with pytest.raises(WeightsError, match=r"24 missing: (\S+, ){5}\.\.\.; 1 unexpected: a\."):
        checkpoints.load(vim(), save({"a": torch.zeros(1)}, tmp_path))


def test_position_embeddings_of_no_square_grid(tmp_path):
    state = vim().state_dict()
    state["pos_embed"] = torch.zeros(1, 12, 16)
    with pytest.raises(WeightsError, match=r"1 of another shape: pos_embed \(1, 12, 16\) for \(1, 17, 16\)"):
        checkpoints.load(vim(), save(state, tmp_path))


class Harmful:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Stranger:
    pass


@pytest.mark.parametrize("new_format", [True, False])
def test_pickles_that_would_run_code_are_refused(new_format, tmp_path):
    marker = tmp_path / "was_run"
    path = tmp_path / "harmful.pth"
    content = {"model": {"a": torch.zeros(1)}, "extra": Harmful(str(marker))}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(
        WeightsError, match=r"refused, because the file contains (posix|nt)\.mkdir, .* could run code. Save"
    ):
        checkpoints.read(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(content["extra"]))
    assert marker.exists()  # the control: unguarded, it does run


class Call:
    """Pickled as a call, which an unguarded reader makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Built:
    """Pickled as a state for something that takes none: bytes with attributes."""

    def __reduce__(self):
        return codecs.encode, ("a", "latin1"), {"x": 1}


def write(thing, path, kind):
    """A checkpoint with a thing in it: PyTorch's zip or its old format, or a bare pickle."""
    content = {"model": {"a": torch.zeros(1)}, "x": thing}
    form, protocol = kind.split()
    if form == "bare":
        path.write_bytes(pickle.dumps({"a": 1, "x": thing}, int(protocol)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip", pickle_protocol=int(protocol))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip 2", "old 2", "zip 4", "old 4", "bare 0", "bare 1", "bare 2", "bare 4", "bare 5"])
@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "system", "partial"])
def test_a_refusal_names_what_it_found_and_never_how_to_allow_it(name, kind, tmp_path):
    marker = tmp_path / "was_run"
    code = f"__import__('os').mkdir({str(marker)!r})"
    thing = {
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "getattr": Call(getattr, "text", "upper"),
        "system": Call(os.system, f"mkdir {marker}"),
        "partial": Call(functools.partial, print),
    }[name]
    path = tmp_path / "harmful.pth"
    write(thing, path, kind)
    with pytest.raises(
        WeightsError, match=rf"refused, because the file contains (\w+\.)?{name}, .*could run code"
    ) as error:
        checkpoints.read(path)
    assert not marker.exists()
    for advice in ("add_safe_globals", "safe_globals", "weights_only", "damaged", "trust"):
        assert advice not in str(error.value)


def test_a_state_for_what_takes_none_is_refused_without_advice(tmp_path):
    path = tmp_path / "harmful.pth"
    write(Built(), path, "zip 2")
    with pytest.raises(WeightsError, match="refused, because the file contains bytes, ") as error:
        checkpoints.read(path)
    assert "safe_globals" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_in_a_pickle_that_torch_cannot_read_are_not_called_dangerous(tmp_path):
    write(1, tmp_path / "new.pth", "zip 4")
    with pytest.raises(WeightsError, match=r"not a checkpoint, or it is damaged or incomplete.*Unsupported operand"):
        checkpoints.read(tmp_path / "new.pth")


@pytest.mark.parametrize("thing", [Stranger(), torch.nn.Linear(2, 2)])
def test_pickled_objects_are_refused(thing, tmp_path):
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    sys.modules.setdefault(type(thing).__module__, sys.modules[__name__])
    with pytest.raises(WeightsError, match=f"refused, because the file contains {re.escape(name)}"):
        checkpoints.read(save({"model": {"a": torch.zeros(1)}, "thing": thing}, tmp_path))


def damaged(folder, kind):
    whole = save(vim().state_dict(), folder, "whole.safetensors" if "safetensors" in kind else "whole.pth").read_bytes()
    content = {"half": whole[: len(whole) // 2], "text": b"hello world", "empty": b"", "end cut": whole[:-20]}
    path = folder / ("damaged" + (".safetensors" if "safetensors" in kind else ".pth"))
    path.write_bytes(content[kind.split(",")[0]])
    return path


@pytest.mark.parametrize("kind", ["half", "text", "empty", "end cut"])
def test_damaged_files(kind, tmp_path):
    path = damaged(tmp_path, kind)
    with pytest.raises(
        WeightsError, match=r"damaged\.pth'\): this is not a checkpoint, or it is damaged or incomplete"
    ):
        checkpoints.read(path)


@pytest.mark.parametrize("kind", ["half,safetensors", "text,safetensors", "empty,safetensors"])
def test_damaged_safetensors(kind, tmp_path):
    with pytest.raises(
        WeightsError, match=r"damaged\.safetensors'\): this is not a safetensors file, or it is damaged"
    ):
        checkpoints.read(damaged(tmp_path, kind))


@pytest.mark.parametrize("content", [torch.zeros(2), {"epoch": 1}, [1, 2], {"model": {"epoch": 1}}])
def test_files_without_weights(content, tmp_path):
    with pytest.raises(WeightsError, match="this file contains no tensors; expected a state dict"):
        checkpoints.load(vim(), save(content, tmp_path))


def without_numbers(state):
    return {**state, "norm_f.weight": torch.zeros(16, device="meta")}


NO_WEIGHTS = {
    "int8": (lambda s: {**s, "head.weight": s["head.weight"].to(torch.int8)}, "head.weight is int8, so .* quantised"),
    "fp8": (
        lambda s: {**s, "head.weight": s["head.weight"].to(torch.float8_e4m3fn)},
        r"head.weight is float8_e4m3fn, so .* save them in float32",
    ),
    "sparse": (lambda s: {**s, "head.weight": s["head.weight"].to_sparse()}, r"head.weight is sparse; .*to_dense"),
    "meta": (without_numbers, "norm_f.weight is on the meta device, .* not its numbers"),
    "keys are numbers": (lambda s: dict(enumerate(s.values())), "contains tensors without names, keyed by numbers"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # of torch 2.15, which takes its time
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weights_is_refused_in_a_sentence(kind, tmp_path):
    pack, sentence = NO_WEIGHTS[kind]
    with pytest.raises(WeightsError, match=sentence):
        checkpoints.load(vim(), save(pack(vim().state_dict()), tmp_path))


CLASSES = ["ant", "bee", "cat", "dog", "elk"]
CLASS_LISTS = {
    "classes": {"classes": CLASSES},
    "meta": {"meta": {"CLASSES": tuple(CLASSES)}},
    "class_to_idx": {"class_to_idx": {name: CLASSES.index(name) for name in reversed(CLASSES)}},
    "id2label": {"config": {"id2label": dict(enumerate(CLASSES))}},
    "args": {"args": argparse.Namespace(class_names=CLASSES)},
}


@pytest.mark.parametrize("kind", CLASS_LISTS)
def test_the_classes_of_a_file(kind, tmp_path):
    path = save({"model": vim().state_dict(), **CLASS_LISTS[kind]}, tmp_path)
    assert checkpoints.Checkpoint(path).classes == CLASSES


def test_missing_files(tmp_path):
    with pytest.raises(WeightsError, match=r"nothing\.pth'\): there is no such file"):
        checkpoints.read(tmp_path / "nothing.pth")
