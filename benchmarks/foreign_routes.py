"""The repositories whose mixers scan an image in orders of their own, which ``dropin`` runs: their classes, small."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case
from benchmarks.foreign_code import load, made, package, renamed

FOUR_STAGES = {"depths": [1, 1, 1, 1], "dims": [16, 32, 64, 128], "num_classes": 7, "drop_path_rate": 0.0}


def _model_library(root: Path) -> Path:
    """EfficientVMamba and LocalMamba are folders of a training library; its ``__init__`` files import all of it."""
    folder = root / "classification"
    package("lib", folder / "lib")
    package("lib.models", folder / "lib" / "models")
    return folder


def efficient_vmamba(root: Path) -> Iterator[Case]:
    """EfficientVMamba: four scans, each of a quarter of the tokens, every second row and column."""
    code = load(_model_library(root), "lib.models.mamba.efficient_mamba")
    for size in ((64, 96), (72, 80)):
        make = made(code.EfficientVSSM, patch_size=4, **FOUR_STAGES, d_state=4, ssm_ratio=2.0)
        yield Case("EfficientVSSM", "every second token", make, (2, 3, *size))


def local_mamba(root: Path) -> Iterator[Case]:
    """LocalMamba: LocalVim and LocalVMamba, scans within windows of 2 and 7, padded where they do not fit."""
    load(root / "mamba-1p1p1", "mamba_ssm")
    folder = _model_library(root)
    vim = load(folder, "lib.models.local_vim").VisionMamba
    base = {
        "patch_size": 16,
        "embed_dim": 48,
        "depth": 3,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "final_pool_type": "mean",
        "if_abs_pos_embed": True,
        "if_rope": False,
        "bimamba_type": "v2",
        "num_classes": 7,
        "drop_path_rate": 0.0,
    }
    windows = (["h", "v_flip", "w7", "w7_flip"], ["h", "v", "w2", "w2_flip"], ["h_flip", "v", "v_flip", "w2_flip"])
    for name, size, directions in (
        ("windows of 2 and 7", (112, 112), windows),
        ("windows of 2, padded", (80, 112), (windows[1],) * 3),
    ):
        yield Case("LocalVim", name, made(vim, **base, img_size=size, directions=directions), (2, 3, *size))
    vmamba = load(folder, "lib.models.local_vmamba").VSSM
    make = made(vmamba, patch_size=4, **FOUR_STAGES, d_state=4, directions=(*windows, ["h", "h_flip", "w2", "v"]))
    yield Case("LocalVMamba", "windows of 2 and 7, padded", make, (2, 3, 56, 84))


def msv_mamba(root: Path) -> Iterator[Case]:
    """MSVMamba: the block with four scans of one grid, and with three of a coarser one after another in one scan."""
    code = load(root / "classification", "models.vmamba")
    base = {**FOUR_STAGES, "ssm_d_state": 1, "mlp_ratio": 2.0, "ms_stage": [0, 1, 2, 3], "ms_split": [1, 3]}
    yield Case("VSSM", "one grid", made(code.VSSM, **base, sscore_type="None"), (2, 3, 64, 96))
    coarse = made(code.VSSM, **base, sscore_type="multiscale_4scan_12", add_se=True, convFFN=True)
    yield Case("VSSM", "two grids", coarse, (2, 3, 64, 96))


def group_mamba(root: Path) -> Iterator[Case]:
    """GroupMamba: four groups of channels, one scan each; the last stages are attention."""
    code = load(root / "classification", "models.groupmamba")
    make = made(
        code.GroupMamba,
        stem_hidden_dim=8,
        embed_dims=[16, 32, 64, 64],
        mlp_ratios=[2, 2, 2, 2],
        depths=[1, 1, 1, 1],
        num_classes=7,
        distillation=False,
    )
    yield Case("GroupMamba", "four groups", make, (2, 3, 64, 96))


def mobile_mamba(root: Path) -> Iterator[Case]:
    """MobileMamba: two scans, there and back, of the low band of a wavelet transform; its merge adds up a batch."""
    load(root, "model.lib_mamba.vmambanew", "model/lib_mamba")
    code = load(root, "model.mobilemamba.mobilemamba")
    make = made(
        code.MobileMamba,
        img_size=128,
        embed_dim=[32, 48, 64],
        depth=[1, 1, 1],
        num_classes=7,
        ssm_ratio=2,
        kernels=[7, 5, 3],
    )
    yield Case("MobileMamba", "wavelets", make, (1, 3, 128, 192))


def def_mamba(root: Path) -> Iterator[Case]:
    """DefMamba: a scan whose order of tokens each image decides, beside raster scans."""
    code = load(root / "classification", "models.vmamba")
    make = made(
        code.VSSM,
        depths=[1, 1, 1, 1],
        dims=[24, 48, 96, 192],
        num_classes=7,
        drop_path_rate=0.0,
        ssm_d_state=4,
        ssm_ratio=1.0,
        mlp_ratio=2.0,
        downsample_version="v3",
        patchembed_version="v2",
    )
    yield Case("VSSM", "an order per image", make, (2, 3, 224, 224))


def tiny_vim(root: Path) -> Iterator[Case]:
    """TinyViM: scans of the low frequencies only, 1, 2 or 4 of them."""
    renamed("timm.models.layers.helpers", "timm.layers.helpers")
    code = load(root, "model.tinyvim")
    for scans in (1, 4):
        make = made(
            code.TinyViM,
            [1, 1, 2, 1],
            embed_dims=[16, 32, 48, 64],
            downsamples=[True] * 4,
            num_classes=7,
            ssm_num=scans,
            distillation=False,
        )
        yield Case("TinyViM", f"ssm_num={scans}", make, (2, 3, 128, 192))


def plain_mamba(root: Path) -> Iterator[Case]:
    """PlainMamba: four snakes over the image, and a direction added to B at every step."""
    code = load(root, "mmcls.models")
    mixer = {"d_state": 4, "expand": 2, "conv_size": 3, "default_hw_shape": (5, 6)}
    make = made(
        code.PlainMamba,
        img_size=(40, 48),
        patch_size=8,
        embed_dims=24,
        num_layers=2,
        layer_cfgs={"use_rms_norm": False, "mamba_cfg": mixer},
        layers_with_dwconv=[0],
    )
    yield Case("PlainMamba", "snakes", make, (2, 3, 40, 48), call=lambda model, x: model(x)[-1])


def mamba_ir(root: Path) -> Iterator[Case]:
    """MambaIR, and MambaIRv2, which sorts the tokens of every image by a class it gives them."""
    for name in ("basicsr", "basicsr.archs"):
        package(name, root / name.replace(".", "/"))
    code = load(root, "basicsr.archs.mambair_arch")
    base = {"img_size": 16, "embed_dim": 36, "d_state": 4, "upscale": 2, "upsampler": "pixelshuffledirect"}
    yield Case("MambaIR", "twice as large", made(code.MambaIR, **base, depths=(2, 2), mlp_ratio=1.5), (2, 3, 12, 20))
    for name, file in (("MambaIRv2", "mambairv2_arch"), ("MambaIRv2Light", "mambairv2light_arch")):
        more = {
            "depths": (2, 2),
            "num_heads": (2, 2),
            "window_size": 8,
            "inner_rank": 8,
            "num_tokens": 16,
            "convffn_kernel_size": 5,
            "mlp_ratio": 1.0,
        }
        make = made(getattr(load(root, f"basicsr.archs.{file}"), name), **base, **more)
        yield Case(name, "an order per image", make, (2, 3, 16, 24), call=_seeded)


def _seeded(model: nn.Module, x: Tensor) -> Any:
    """A forward that draws the same random numbers every time."""
    random.seed(5)
    torch.manual_seed(3)
    return model(x)
