"""Which models of which repositories ``dropin`` runs: their own classes, as they stand there, built small.

Each function takes a checkout's folder, imports what it needs under ``cpu_stand_ins`` and yields cases. Ordinary packages
that this code imports (fvcore, transformers, those of nnU-Net) have to be installed; a case whose own code cannot be
imported or fails by itself is left out with the reason.
"""

import contextlib
import importlib
import importlib.util
import io
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import mamba_attn
from benchmarks.dropin import Case
from mamba_attn import _torchvision

_torchvision.prepare()  # this code imports timm, and that torchvision

SUFFIXES = ("", "_noz", "_nozact", "_oact", "_no32", "_onnone", "_ondwconv3", "_oncnorm", "_onsoftmax", "_onsigmoid")


def _load(root: Path, module: str, *more: str) -> ModuleType:
    """Import a module of a checkout; ``more`` are folders that it imports from."""
    sys.path[:0] = [str(root / folder) for folder in ("", *more)]
    with mamba_attn.cpu_stand_ins(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _side_by_side(model: nn.Module, x: Tensor) -> Tensor:
    """All feature maps that a model returns, in one vector."""
    return torch.cat([output.flatten() for output in model(x)])


def _made(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: make(*args, **options)


def vmamba(root: Path) -> Iterator[Case]:
    """VMamba: the one-file code and the classification folder, every type of forward, detection's backbone."""
    files = {"vmamba.py": _load(root, "vmamba"), "classification": _load(root / "classification", "models.vmamba")}
    for code in (files["vmamba.py"], importlib.import_module("models.csms6s")):
        for name in [name for name in vars(code) if name.startswith("WITH_SELECTIVESCAN")]:
            setattr(code, name, False)  # as without compiled scans: its own loops in PyTorch are the truth
    for file, code in files.items():
        yield from _ss2d(file, code)
        small = {"depths": (1, 1, 1, 1), "dims": 16, "num_classes": 5, "drop_path_rate": 0.0}
        for forward_type, norm in (("v05_noz", "ln2d"), ("v05_noz", "ln"), ("v0", "ln"), ("v3", "ln2d"), ("v051d", "ln")):
            options = {"forward_type": forward_type, "norm_layer": norm, "ssm_d_state": 4 if forward_type == "v0" else 1}
            versions = {"patchembed_version": "v2", "downsample_version": "v3"}
            make = _made(code.VSSM, **small, **options, **versions)
            yield Case("VSSM", f"{file} {forward_type} {norm}", make, (2, 3, 68, 96))
        backbone = _made(
            code.Backbone_VSSM, **{**small, "num_classes": 0}, forward_type="v05_noz", norm_layer="ln2d",
            patchembed_version="v2", downsample_version="v3",
        )  # fmt: skip
        yield Case("Backbone_VSSM", f"{file} v05_noz ln2d, detection", backbone, (2, 3, 100, 164), call=_side_by_side)
    yield Case("vmamba_tiny_s1l8", "vmamba.py, 30.2 M", files["vmamba.py"].vmamba_tiny_s1l8, (1, 3, 224, 224))


def _ss2d(file: str, code: ModuleType) -> Iterator[Case]:
    """Every variant of the mixer, channels first and last."""
    shape = {True: (2, 24, 7, 5), False: (2, 7, 5, 24)}
    for name in ("v0", "v0seq"):
        yield Case("SS2D", f"{file} {name}", _made(code.SS2D, 24, d_state=4, forward_type=name), shape[False])
    types = [f"v05{suffix}" for suffix in SUFFIXES]
    types += ["v01", "v02", "v03", "v03_no32", "v04", "v3", "v3_noz", "v051d", "v052d", "v052d_noz", "v05_onnone_nozact", "v05_ondwconv3_noz_oact_no32"]
    for first in (True, False):
        frame = "channels first" if first else "channels last"
        for name in types:
            options = {"d_state": 3, "forward_type": name, "channel_first": first}
            yield Case("SS2D", f"{file} {name} {frame}", _made(code.SS2D, 24, **options), shape[first])
        for what, more in {
            "no conv": {"d_conv": 1}, "GELU, biases": {"act_layer": nn.GELU, "bias": True}, "ratio 1": {"ssm_ratio": 1.0},
            "rank 5, 16 states": {"dt_rank": 5, "d_state": 16}, "init v2": {"initialize": "v2"},
        }.items():  # fmt: skip
            options = {"d_state": 1, "forward_type": "v05", "channel_first": first, **more}
            yield Case("SS2D", f"{file} v05 {what} {frame}", _made(code.SS2D, 24, **options), shape[first])
    yield Case(
        "SS2D", f"{file} v052dc", _made(code.SS2D, 24, d_state=2, forward_type="v052dc", channel_first=True),
        shape[True], refused="cascade2d",
    )  # fmt: skip
    if file == "classification":
        m0 = _made(code.SS2D, 32, d_state=8, dt_rank=4, forward_type="m0_noz", initialize="v2")
        yield Case("SS2D", f"{file} m0_noz", m0, (2, 7, 5, 32), refused="m0")
        for name in ("xv1a", "xv2a", "xv3a"):
            make = _made(code.SS2D, 24, d_state=4, forward_type=name, channel_first=True)
            yield Case("SS2D", f"{file} {name}", make, shape[True], refused="xv")


def vm_unet(root: Path) -> Iterator[Case]:
    """VM-UNet: an encoder and a decoder of the first SS2D."""
    _load(root, "models.vmunet.vmamba")
    code = _load(root, "models.vmunet.vmunet")
    options = {"depths": [1, 1, 1, 1], "depths_decoder": [1, 1, 1, 1], "drop_path_rate": 0.0}
    make = _made(code.VMUNet, num_classes=1, input_channels=3, **options)
    for size in ((64, 96), (128, 64)):
        yield Case("VMUNet", "encoder-decoder", make, (2, 3, *size))


def med_mamba(root: Path) -> Iterator[Case]:
    """MedMamba: SS2D on half of the channels."""
    code = _load(root, "MedMamba")
    options = {"depths": [1, 1, 1, 1], "dims": [16, 32, 64, 128], "num_classes": 6, "drop_path_rate": 0.0}
    yield Case("VSSM", "half of the channels", _made(code.VSSM, **options), (2, 3, 64, 96))


def swin_umamba(root: Path) -> Iterator[Case]:
    """Swin-UMamba's encoders."""
    for name in ("SwinUMamba", "SwinUMambaD"):
        code = _load(root / "swin_umamba", f"nnunetv2.nets.{name}")
        options = {"depths": [1, 1, 1, 1], "dims": [16, 32, 64, 128], "in_chans": 3, "drop_path_rate": 0.0}
        yield Case("VSSMEncoder", name, _made(code.VSSMEncoder, **options), (2, 3, 64, 96), call=_side_by_side)


def change_mamba(root: Path) -> Iterator[Case]:
    """ChangeMamba: the SS2D of spring 2024."""
    code = _load(root, "changedetection.models.vmamba", "changedetection/models")
    yield Case("SS2D", "v01 (as v0)", _made(code.SS2D, 24, d_state=3, forward_type="v01"), (2, 7, 5, 24))
    for name in ("v1", "v2", "v2noz", "v3", "v3noz", "v3nozact", "v3sigmoid", "v31d", "v32d"):
        for first in (False, True):
            make = _made(code.SS2D, 24, d_state=3, forward_type=name, channel_first=first)
            frame = "channels first" if first else "channels last"
            yield Case("SS2D", f"{name} {frame}", make, (2, 24, 7, 5) if first else (2, 7, 5, 24), broken=(RuntimeError,))


MIXERS: tuple[Mapping[str, Any], ...] = (
    {}, {"d_state": 8, "d_conv": 3, "expand": 1.5}, {"conv_bias": False, "bias": True}, {"dt_rank": 5},
    {"use_fast_path": False}, {"use_fast_path": False, "bias": True, "conv_bias": False},
)  # fmt: skip


def _mixers(code: ModuleType, options: tuple[Mapping[str, Any], ...], length: int = 23) -> Iterator[Case]:
    for its in options:
        variant = ", ".join(f"{key}={value}" for key, value in its.items()) or "defaults"
        yield Case("Mamba", variant, _made(code.Mamba, 48, **its), (2, length, 48))
    yield Case("Mamba", "defaults, training", _made(code.Mamba, 48), (2, length, 48), training=True)


def _vision(code: ModuleType, cases: Mapping[str, Mapping[str, Any]], size: tuple[int, int]) -> Iterator[Case]:
    """VisionMamba with options; keys of the forward stand behind "forward"."""
    base = {
        "img_size": size, "patch_size": 16, "stride": 16, "depth": 3, "embed_dim": 48, "num_classes": 7,
        "rms_norm": True, "fused_add_norm": True, "residual_in_fp32": True, "drop_path_rate": 0.0,
        "if_abs_pos_embed": True, "bimamba_type": "v2", "if_cls_token": True, "use_middle_cls_token": True,
    }  # fmt: skip
    for name, its in cases.items():
        given = its.get("forward", {})
        options = {**base, **{key: value for key, value in its.items() if key not in ("forward", "refused")}}
        yield Case(
            "VisionMamba", name, _made(code.VisionMamba, **options), (2, 3, *size),
            call=_seeded(given), refused=its.get("refused"),
        )  # fmt: skip


def _seeded(given: Mapping[str, Any]) -> Callable[[nn.Module, Tensor], Any]:
    """A forward that draws the same random numbers every time, says nothing, and keeps gradients (the forks' hooks)."""

    def call(model: nn.Module, x: Tensor) -> Any:
        random.seed(5)
        torch.manual_seed(3)
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            return model(x, **given)

    return call


def _vim_cases(divide: str, forks_v1: bool) -> dict[str, dict[str, Any]]:
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
        "rope": {"if_rope": True, "img_size": 48, "refused": "rope"},
    }  # fmt: skip
    return {**cases, "v1": {"bimamba_type": "v1"}} if forks_v1 else cases


def vim(root: Path) -> Iterator[Case]:
    """Vim: its Mamba, bimamba v1, v2 and none, and VisionMamba."""
    _load(root / "mamba-1p1p1", "mamba_ssm")
    mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
    both = tuple(
        {"bimamba_type": kind, "if_divide_out": divide, **more}
        for kind in ("v1", "v2") for divide in (False, True)
        for more in ({}, {"use_fast_path": False}, {"init_layer_scale": 0.3, "bias": True})
    )  # fmt: skip
    yield from _mixers(mixer, MIXERS + both)
    code = _load(root / "vim", "models_mamba")
    yield from _vision(code, _vim_cases("if_divide_out", True), (48, 80))
    tiny = "vim_tiny_patch16_{}224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    for stride in ("", "stride8_"):
        yield Case("VisionMamba", tiny.format(stride), getattr(code, tiny.format(stride)), (1, 3, 224, 224))


def _fork(root: Path, size: tuple[int, int], length: int) -> Iterator[Case]:
    """A fork of Vim that spells if_devide_out; v1 fails in their own code and is left out."""
    _load(root / "mamba-1p1p1", "mamba_ssm")
    mixer = importlib.import_module("mamba_ssm.modules.mamba_simple")
    both = tuple({"bimamba_type": "v2", "if_devide_out": divide} for divide in (False, True))
    yield from _mixers(mixer, MIXERS + both, length)
    yield from _vision(_load(root / "vim", "models_mamba"), _vim_cases("if_devide_out", False), size)


def hidden_mamba_attn(root: Path) -> Iterator[Case]:
    """HiddenMambaAttn's Vim; its code wants a token 98."""
    return _fork(root, (160, 208), 131)


def unified_implicit(root: Path) -> Iterator[Case]:
    """UnifiedImplicitAttnRepr's Vim."""
    return _fork(root / "MambaVision", (48, 80), 23)


def mamba_reg(root: Path) -> Iterator[Case]:
    """Mamba-Reg: registers between the patches; it brings its own Mamba beside mamba_ssm's."""
    mixer = _load(root, "mamba_custom")
    yield from _mixers(mixer, ({"biscan": True}, {"biscan": True, "use_fast_path": False}, {"biscan": False}))
    code = _load(root, "models_mamba")
    base = {"patch_size": 16, "embed_dim": 48, "depth": 3, "num_classes": 7, "rms_norm": True, "fused_add_norm": True}
    for name, its in {
        "3 registers": {"num_cls_tokens": 3}, "4, reduced": {"num_cls_tokens": 4, "cls_reduce": 2},
        "none": {"num_cls_tokens": 0, "num_classes": 0},
    }.items():  # fmt: skip
        make = _made(code.VisionMamba, **{**base, "img_size": (48, 80), "residual_in_fp32": True, **its})
        yield Case("VisionMamba", name, make, (2, 3, 48, 80))


def mamba(root: Path) -> Iterator[Case]:
    """mamba_ssm's own Mamba."""
    yield from _mixers(_load(root, "mamba_ssm.modules.mamba_simple"), MIXERS)


def mamba_vision(root: Path) -> Iterator[Case]:
    """MambaVision: mixers and attention blocks, one window and several, padded."""
    code = _load(root, "mambavision.models.mamba_vision")
    small = {"dim": 16, "in_dim": 8, "depths": [1, 1, 4, 4], "mlp_ratio": 2, "num_heads": [1, 2, 4, 4], "num_classes": 5}
    for variant, more, size in (
        ("one window", {"window_size": [8, 8, 14, 7]}, (224, 224)),
        ("windows of 4 and 3", {"window_size": [8, 8, 4, 3]}, (160, 240)),
        ("odd grids", {"window_size": [8, 8, 4, 2]}, (150, 230)),
        ("norms of queries and keys, layer scale", {"window_size": [8, 8, 4, 3], "qk_scale": True, "layer_scale": 0.5},
         (160, 240)),
    ):  # fmt: skip
        yield Case("MambaVision", variant, _made(code.MambaVision, **{**small, **more}), (2, 3, *size))
    for size in ((224, 224), (320, 256)):
        yield Case("MambaVision", "mamba_vision_T", _made(code.mamba_vision_T, drop_path_rate=0.0), (1, 3, *size))


def timm_vit(root: Path) -> Iterator[Case]:
    """timm's ViT and DeiT, fused attention on and off; ``root`` is a clone of timm, which is installed."""
    import timm

    for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        for fused in (True, False):

            def make(name: str = name, fused: bool = fused) -> nn.Module:
                model: nn.Module = timm.create_model(name, num_classes=10)
                for module in model.modules():
                    if hasattr(module, "fused_attn"):
                        module.fused_attn = fused
                return model

            yield Case(name, f"fused_attn={fused}", make, (2, 3, 224, 224))


REPOSITORIES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "MzeroMiko/VMamba": vmamba,
    "JCruan519/VM-UNet": vm_unet,
    "YubiaoYue/MedMamba": med_mamba,
    "JiarunLiu/Swin-UMamba": swin_umamba,
    "ChenHongruixuan/ChangeMamba": change_mamba,
    "hustvl/Vim": vim,
    "AmeenAli/HiddenMambaAttn": hidden_mamba_attn,
    "Itamarzimm/UnifiedImplicitAttnRepr": unified_implicit,
    "wangf3014/Mamba-Reg": mamba_reg,
    "state-spaces/mamba": mamba,
    "NVlabs/MambaVision": mamba_vision,
    "huggingface/pytorch-image-models": timm_vit,
}


def official_pairs(name: str, root: Path) -> Iterator[tuple[str, nn.Module]]:
    """Models of a repository that are ours under the same name, to compare with the same weights."""
    if name == "MzeroMiko/VMamba":
        yield "vmamba_tiny_s1l8", _load(root, "vmamba").vmamba_tiny_s1l8()
    if name == "hustvl/Vim":
        code = _load(root / "vim", "models_mamba")
        yield "vim_tiny", code.vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2()
