"""Five repositories that nobody here had looked at before they ran: as they came out, nothing was changed for them."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import mamba_attn
from benchmarks.case import Case
from benchmarks.foreign_code import load, made, package, renamed


def vmamba_morph(root: Path) -> Iterator[Case]:
    """VMambaMorph: registration of volumes, SS2D over cubes; the file does not import its own VMambaLayer."""
    folder = root / "mambamorph" / "torch"
    for name in ("networks", "configs_TransMorph"):  # other models with their packages; a file that does not parse
        sys.modules[name] = _Anything(name)
    layers = load(folder, "mamba")
    code = load(folder, "TransMorph")
    code.__dict__["VMambaLayer"] = layers.VMambaLayer
    options: dict[str, Any] = {
        "if_convskip": True,
        "if_transskip": True,
        "embed_dim": 24,
        "patch_size": 4,
        "in_chans": 2,
        "depths": (1, 1, 1),
        "drop_rate": 0,
        "ape": False,
        "spe": True,
        "rpe": False,
        "patch_norm": True,
        "out_indices": (0, 1, 2),
        "d_state": 4,
        "d_conv": 4,
        "expand": 2,
        "reg_head_chan": 8,
        "img_size": (32, 32, 32),
    }

    def moved(model: nn.Module, pair: Tensor) -> Any:
        return model(*pair.chunk(2, 1))["moved_vol"]

    make = made(code.VMambaMorph, SimpleNamespace(**options))
    yield Case("VMambaMorph", "cubes", make, (2, 2, 32, 32, 32), call=moved, noise=0.3)


def vivim(root: Path) -> Iterator[Case]:
    """Vivim: video, SegFormer's blocks and Mambas over clips; its backbone is built, not downloaded."""
    load(root / "mamba", "mamba_ssm")
    code = load(root / "modeling", "vivim")
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=768
    )

    def backbone(*_: Any) -> nn.Module:
        return SegformerForSemanticSegmentation(config)

    code.__dict__["SegformerForSemanticSegmentation"] = SimpleNamespace(from_pretrained=backbone)
    make = made(code.Vivim, feat_size=[8, 16, 24, 32])
    yield Case("Vivim", "clips of 5 frames", make, (2, 5, 3, 64, 96))


def mamba_ad(root: Path) -> Iterator[Case]:
    """MambaAD: scans along a Hilbert curve and other paths, in eight directions; the repository lacks its registry."""
    package("model", root / "model")
    sys.modules["model"].__dict__.update(
        get_model=None, MODEL=SimpleNamespace(register_module=lambda thing=None, **_: thing or (lambda other: other))
    )
    with mamba_attn.cpu_stand_ins():
        renamed("timm.models.layers", "timm.layers")
    code = load(root, "model.mambaad")
    for path, ways in (("scan", 4), ("hilbert", 8), ("zorder", 8), ("zigzag", 4)):
        make = made(
            code.MambaUPNet,
            dims_decoder=[32, 16],
            depths_decoder=[2, 3],
            d_state=4,
            drop_path_rate=0.0,
            scan_type=path,
            num_direction=ways,
        )
        yield Case("MambaUPNet", f"{path}, {ways} ways", make, (2, 32, 8, 8), call=_first)


def zigma(root: Path) -> Iterator[Case]:
    """ZigMa: a diffusion model that takes another zigzag in every block; it brings its own mamba_ssm."""
    package("dis_mamba", root / "dis_mamba")
    package("dis_mamba.mamba_ssm", root / "dis_mamba" / "mamba_ssm")
    package("utils", root / "utils")
    code = load(root, "model_zigma")
    base = {"in_channels": 3, "embed_dim": 24, "depth": 3, "img_dim": 12, "patch_size": 2, "drop_path_rate": 0.0}
    more = {"device": "cpu", "use_jit": False, "ssm_cfg": {"d_state": 4}}

    def at_a_time(model: nn.Module, x: Tensor) -> Any:
        return model(x, torch.full((len(x),), 0.3))

    for name, its in {
        "zigzag": {"scan_type": "zigzagN8"},
        "zigzag, norms not fused": {"scan_type": "zigzagN8", "fused_add_norm": False, "rms_norm": False},
        "both ways": {"scan_type": "v2", "fused_add_norm": False, "rms_norm": False},
    }.items():
        make = made(code.ZigMa, **base, **more, **its)
        yield Case("ZigMa", name, make, (2, 3, 12, 12), call=at_a_time)


def remote_sensing_mamba(root: Path) -> Iterator[Case]:
    """RS-Mamba: rows, columns and both diagonals, there and back, in a U-Net."""
    load(root / "semantic_segmentation_mamba", "rs_mamba_ss")
    code = importlib.import_module("rs_mamba_ss")
    make = made(code.RSM_SS, depths=[1, 1, 1, 1], dims=[16, 32, 64, 128], ssm_d_state=4, drop_path_rate=0.0)
    yield Case("RSM_SS", "eight ways", make, (2, 3, 64, 96))


class _Anything(ModuleType):
    """A module with a function of every name, but for those that Python asks for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: None


def _first(model: nn.Module, x: Tensor) -> Any:
    return model(x)[0]
