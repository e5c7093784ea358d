"""Options of models that cannot be: a sentence that names them, before anything is built."""

import inspect
import re

import pytest
import torch

from mamba_attn.models import create, transform
from mamba_attn.models.registry import builder

WHOLE = "expected a whole number of at least 1"
SIZE = r"expected a side or \(height, width\) in pixels, whole numbers of at least 1"
NAN = float("nan")
BUILDERS = {"vim_micro": "VisionMamba", "vmamba_micro": "VSSM", "vit_micro": "vision_transformer"}
EVERY = [
    ("image_size", NAN, TypeError, SIZE), ("image_size", "x", TypeError, SIZE), ("image_size", None, TypeError, SIZE),
    ("image_size", (1, 2, 3), ValueError, SIZE), ("image_size", (), ValueError, SIZE),
    ("image_size", (64, 32.5), TypeError, SIZE), ("image_size", True, TypeError, SIZE),
    ("image_size", 0, ValueError, SIZE), ("image_size", -5, ValueError, SIZE), ("image_size", (8, 0), ValueError, SIZE),
    ("num_classes", -1, ValueError, "expected a whole number of at least 0"),
    ("num_classes", 2.5, TypeError, "expected a whole number of at least 0, got float"),
    ("drop_path", 2.0, ValueError, "expected a number from 0 to below 1"),
    ("drop_path", 1, ValueError, "expected a number from 0 to below 1"),
    ("drop_path", NAN, ValueError, "expected a number from 0 to below 1"),
    ("drop_path", "a", TypeError, "expected a number from 0 to below 1, got str"),
]  # fmt: skip
OWN = {
    "vim_micro": [
        ("patch_size", 0, ValueError, WHOLE), ("stride", 0, ValueError, f"{WHOLE}, or None for patch_size"),
        ("stride", "a", TypeError, WHOLE), ("depth", -1, ValueError, WHOLE), ("depth", 0, ValueError, WHOLE),
        ("depth", 2.0, TypeError, f"{WHOLE}, got float"), ("embed_dim", 0, ValueError, WHOLE),
        ("d_state", 0, ValueError, WHOLE), ("d_conv", -2, ValueError, WHOLE), ("expand", 0, ValueError, WHOLE),
        ("expand", True, TypeError, WHOLE), ("class_token", 5, ValueError, "expected 'middle', 'first' or None"),
        ("order", "spirale", ValueError, r"no such order\. Did you mean 'spiral'\?"),
        ("order", 5, ValueError, r"no such order\. Known: 'raster'"),
        ("order", None, ValueError, "no such order"), ("order", [1], ValueError, "no such order"),
    ],
    "vmamba_micro": [
        ("depths", 3, TypeError, "expected the number of blocks of each stage"),
        ("depths", (), ValueError, "expected the number of blocks of each stage, whole numbers of at least 1"),
        ("depths", (1, 0, 1, 1), ValueError, "whole numbers of at least 1"),
        ("depths", (1, 1.0, 1, 1), TypeError, "whole numbers of at least 1, got tuple"),
        ("dims", 0, ValueError, f"{WHOLE}, or one per stage"), ("dims", "ab", TypeError, "or one per stage, got str"),
        ("dims", (8, 8, -8, 8), ValueError, "or one per stage"),
        ("dims", (8, 8), ValueError, "expected one entry of each per stage"),
        ("dims", 1, ValueError, "a layer would have no channels"),
        ("ssm_ratio", 0, ValueError, "expected a finite number above 0"),
        ("ssm_ratio", NAN, ValueError, "expected a finite number above 0"),
        ("ssm_ratio", 0.001, ValueError, "a layer would have no channels"),
        ("mlp_ratio", -1, ValueError, "expected a finite number of at least 0"),
        ("mlp_ratio", float("inf"), ValueError, "expected a finite number of at least 0"),
        ("d_state", 0, ValueError, WHOLE), ("generation", "v9", ValueError, "expected 'v0' or 'v05_noz'"),
        ("second", 3, ValueError, "expected 'transpose' or 'mirror'"),
    ],
    "vit_micro": [
        ("patch_size", 0, ValueError, WHOLE), ("depth", 0, ValueError, WHOLE), ("num_heads", 0, ValueError, WHOLE),
        ("num_heads", 5, ValueError, "expected heads that divide embed_dim"),
        ("reg_tokens", -1, ValueError, "at least 0"),
        ("image_size", 4, ValueError, "expected an image of at least one patch"),
        ("mlp_ratio", NAN, ValueError, "finite"),
    ],
}  # fmt: skip
CASES = [(name, *case) for name in BUILDERS for case in (*EVERY, *OWN[name])]


@pytest.mark.parametrize(("name", "option", "value", "error", "message"), CASES)
def test_what_an_option_cannot_be(name, option, value, error, message):
    said = rf"^{BUILDERS[name]}\(.*{option}={re.escape(repr(value))}.*\): .*{message}"
    with pytest.raises(error, match=said) as caught:
        create(name, **{option: value})
    assert caught.type is error


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("option", "hint"),
    [("zzz", "Known: "), ("imagesize", "Did you mean 'image_size'"), ("drop_pat", "Did you mean 'drop_path'")],
)
def test_options_that_are_none(name, option, hint):
    said = rf"^{BUILDERS[name]}\({option}=\.\.\.\): there is no such option\. .*{hint}"
    with pytest.raises(TypeError, match=said) as caught:
        create(name, **{option: 1})
    assert "'self'" not in str(caught.value)


def test_timms_own_spellings_are_no_options():
    for option in ("img_size", "drop_path_rate"):
        with pytest.raises(TypeError, match=rf"{option}=\.\.\.\): there is no such option"):
            create("vit_micro", **{option: 32})


@pytest.mark.parametrize("name", BUILDERS)
def test_what_an_option_can_be(name):
    with torch.device("cpu" if name == "vit_micro" else "meta"):  # old versions of timm ask a tensor for its number
        for size in (16, (16, 24), [16, 24]):
            model = create(name, image_size=size, num_classes=0, drop_path=0)
            assert model.image_size == (16, 24 if isinstance(size, tuple | list) else 16)
        assert create(name, drop_path=0.9, num_classes=3).num_classes == 3
    assert "image_size" in inspect.signature(builder(name)).parameters  # the check hides no parameter


def test_numbers_at_their_least():
    with torch.device("meta"):
        create("vim_micro", depth=1, embed_dim=1, d_state=1, d_conv=1, expand=1, stride=1, patch_size=1, image_size=1)
        create("vmamba_micro", depths=(1,), dims=2, d_state=1, ssm_ratio=0.5, mlp_ratio=0.0, image_size=1)
    create("vit_micro", depth=1, embed_dim=1, num_heads=1, patch_size=4, image_size=4, reg_tokens=0)
    create("vit_micro", class_token=False, global_pool="avg")  # timm's option of this name is another one


@pytest.mark.parametrize("size", [0, -5, (1, 2, 3)])
def test_the_size_of_a_transform(size):
    with pytest.raises(ValueError, match=rf"^transform\(image_size={re.escape(repr(size))}\): {SIZE}"):
        transform("vim_micro", size)
