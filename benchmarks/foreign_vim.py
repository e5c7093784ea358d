"""The repositories whose mixer is Mamba, in one direction or both, which ``dropin`` runs: their own classes, small."""

import contextlib
import importlib
import io
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case
from benchmarks.foreign_code import load, made

MIXERS: tuple[Mapping[str, Any], ...] = (
    {}, {"d_state": 8, "d_conv": 3, "expand": 1.5}, {"conv_bias": False, "bias": True}, {"dt_rank": 5},
    {"use_fast_path": False}, {"use_fast_path": False, "bias": True, "conv_bias": False},
)  # fmt: skip


def _mixers(code: ModuleType, options: tuple[Mapping[str, Any], ...], length: int = 23) -> Iterator[Case]:
    for its in options:
        variant = ", ".join(f"{key}={value}" for key, value in its.items()) or "defaults"
        yield Case("Mamba", variant, made(code.Mamba, 48, **its), (2, length, 48), maps=False)
    yield Case("Mamba", "defaults, training", made(code.Mamba, 48), (2, length, 48), training=True, maps=False)


def _vision(code: ModuleType, cases: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> Iterator[Case]:
    """VisionMamba with options; keys of the forward stand behind "forward"."""
    base = {
        "img_size": size,
        "patch_size": 16,
        "stride": 16,
        "depth": 3,
        "embed_dim": 48,
        "num_classes": 7,
        "rms_norm": True,
        "fused_add_norm": True,
        "residual_in_fp32": True,
        "drop_path_rate": 0.0,
        "if_abs_pos_embed": True,
        "bimamba_type": "v2",
        "if_cls_token": True,
        "use_middle_cls_token": True,
    }
    for name, its in cases.items():
        given = its.get("forward", {})
        options = {**base, **{key: value for key, value in its.items() if key not in ("forward", "refused")}}
        shape = options["img_size"] if isinstance(options["img_size"], tuple) else (options["img_size"],) * 2
        yield Case(
            "VisionMamba",
            name,
            made(code.VisionMamba, **options),
            (2, 3, *shape),
            call=_seeded(given),
            refused=its.get("refused"),
        )


def _seeded(given: Mapping[str, Any]) -> Callable[[nn.Module, Tensor], Any]:
    """A forward that draws the same random numbers every time, says nothing, and keeps gradients (the forks' hooks)."""

    def call(model: nn.Module, x: Tensor) -> Any:
        random.seed(5)
        torch.manual_seed(3)
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            return model(x, **given)

    return call


def _vim_cases(divide: str, whole: bool) -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {
        "v2, class token in the middle, divided": {divide: True},
        "v2, class token in the middle": {divide: False},
        "v2, class token first": {"use_middle_cls_token": False},
        "v2, class token anywhere": {
            "use_middle_cls_token": False, "forward": {"if_random_cls_token_position": True},
        },
        "v2, tokens shuffled": {"forward": {"if_random_token_rank": True}},
        "v2, two class tokens": {"use_double_cls_token": True, "use_middle_cls_token": False},
        "v2, mean pool": {"if_cls_token": False, "use_middle_cls_token": False, "final_pool_type": "mean"},
        "v2, stride 8": {"stride": 8},
        "v2, LayerNorm": {"rms_norm": False, "fused_add_norm": False},
        "v2, layer scale": {"init_layer_scale": 0.1},
        "v2, use_fast_path=False": {"ssm_cfg": {"use_fast_path": False}},
        "none": {"bimamba_type": "none"},
    }  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "v1": {"bimamba_type": "v1"},
        "rope": {
            "img_size": 64, "if_rope": True, "if_cls_token": False, "use_middle_cls_token": False,
            "final_pool_type": "mean",
        },
        "every second layer flipped": {"if_bidirectional": True, "bimamba_type": "none", "depth": 4},
    }  # fmt: skip
    return {**cases, **more} if whole else cases


def vim(root: Path) -> Iterator[Case]:
    """Vim: its Mamba, bimamba v1, v2 and none, and VisionMamba."""
    load(root / "mamba-1p1p1", "mamba_ssm")
    mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
    both = tuple(
        {"bimamba_type": kind, "if_divide_out": divide, **more}
        for kind in ("v1", "v2")
        for divide in (False, True)
        for more in ({}, {"use_fast_path": False}, {"init_layer_scale": 0.3, "bias": True})
    )
    yield from _mixers(mixer, MIXERS + both)
    code = load(root / "vim", "models_mamba")
    yield from _vision(code, _vim_cases("if_divide_out", True), (48, 80))
    tiny = "vim_tiny_patch16_{}224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    for stride in ("", "stride8_"):
        yield Case("VisionMamba", tiny.format(stride), getattr(code, tiny.format(stride)), (1, 3, 224, 224), noise=0.1)


def _fork(root: Path, size: tuple[int, int], length: int) -> Iterator[Case]:
    """A fork of Vim that spells if_devide_out; v1 fails in their own code and is left out."""
    load(root / "mamba-1p1p1", "mamba_ssm")
    mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
    both = tuple({"bimamba_type": "v2", "if_devide_out": divide} for divide in (False, True))
    yield from _mixers(mixer, MIXERS + both, length)
    yield from _vision(load(root / "vim", "models_mamba"), _vim_cases("if_devide_out", False), size)


def hidden_mamba_attn(root: Path) -> Iterator[Case]:
    """HiddenMambaAttn's Vim; its code wants a token 98."""
    return _fork(root, (160, 208), 131)


def unified_implicit(root: Path) -> Iterator[Case]:
    """UnifiedImplicitAttnRepr's Vim."""
    return _fork(root / "MambaVision", (48, 80), 23)


def mamba_reg(root: Path) -> Iterator[Case]:
    """Mamba-Reg: registers between the patches; it brings its own Mamba in addition to mamba_ssm's."""
    mixer = load(root, "mamba_custom")
    yield from _mixers(mixer, ({"biscan": True}, {"biscan": True, "use_fast_path": False}, {"biscan": False}))
    code = load(root, "models_mamba")
    base = {"patch_size": 16, "embed_dim": 48, "depth": 3, "num_classes": 7, "rms_norm": True, "fused_add_norm": True}
    for name, its in {
        "3 registers": {"num_cls_tokens": 3},
        "4, reduced": {"num_cls_tokens": 4, "cls_reduce": 2},
        "none": {"num_cls_tokens": 0, "num_classes": 0},
    }.items():
        make = made(code.VisionMamba, **{**base, "img_size": (48, 80), "residual_in_fp32": True, **its})
        yield Case("VisionMamba", name, make, (2, 3, 48, 80))


def mamba(root: Path) -> Iterator[Case]:
    """mamba_ssm's own Mamba."""
    yield from _mixers(load(root, "mamba_ssm.modules.mamba_simple"), MIXERS)
