"""The repositories whose mixer is SS2D, which ``dropin`` runs: their own classes, built small."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from benchmarks.case import Case
from benchmarks.foreign_code import load, made, side_by_side

SUFFIXES = ("", "_noz", "_nozact", "_oact", "_no32", "_onnone", "_ondwconv3", "_oncnorm", "_onsoftmax", "_onsigmoid")


def vmamba(root: Path) -> Iterator[Case]:
    """VMamba: the one-file code and the classification folder, every type of forward, detection's backbone."""
    files = {"vmamba.py": load(root, "vmamba"), "classification": load(root / "classification", "models.vmamba")}
    for code in (files["vmamba.py"], importlib.import_module("models.csms6s")):
        for name in [name for name in vars(code) if name.startswith("WITH_SELECTIVESCAN")]:
            setattr(code, name, False)  # as without compiled scans: its own loops in PyTorch are the truth
    for file, code in files.items():
        yield from _ss2d(file, code)
        small = {"depths": (1, 1, 1, 1), "dims": 16, "num_classes": 5, "drop_path_rate": 0.0}
        for kind, norm in (
            ("v05_noz", "ln2d"),
            ("v05_noz", "ln"),
            ("v0", "ln"),
            ("v3", "ln2d"),
            ("v051d", "ln"),
        ):
            options = {"forward_type": kind, "norm_layer": norm, "ssm_d_state": 4 if kind == "v0" else 1}
            versions = {"patchembed_version": "v2", "downsample_version": "v3"}
            make = made(code.VSSM, **small, **options, **versions)
            yield Case("VSSM", f"{file} {kind} {norm}", make, (2, 3, 68, 96))
        backbone = made(
            code.Backbone_VSSM,
            **{**small, "num_classes": 0},
            forward_type="v05_noz",
            norm_layer="ln2d",
            patchembed_version="v2",
            downsample_version="v3",
        )
        yield Case("Backbone_VSSM", f"{file} v05_noz ln2d, detection", backbone, (2, 3, 100, 164), call=side_by_side)
    yield Case(
        "vmamba_tiny_s1l8", "vmamba.py, 30.2 M", files["vmamba.py"].vmamba_tiny_s1l8, (1, 3, 224, 224), noise=0.1
    )


class _Compiled(nn.Module):
    """A mixer that runs through the extensions, as on a GPU: no adapter knows this one, and a loop has no door."""

    def __init__(self, code: ModuleType, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.code = code

    def forward(self, x: Tensor) -> Any:
        names = ("WITH_SELECTIVESCAN_OFLEX", "WITH_SELECTIVESCAN_MAMBA")
        flags: Any = {name: True for name in names if hasattr(self.code, name)}
        with patch.multiple(self.code, **flags):
            return self.mixer(x)


def _ss2d(file: str, code: ModuleType) -> Iterator[Case]:
    """Every variant of the mixer, channels first and last."""
    shape = {True: (2, 24, 7, 5), False: (2, 7, 5, 24)}
    for name in ("v0", "v0seq"):
        yield Case(
            "SS2D", f"{file} {name}", made(code.SS2D, 24, d_state=4, forward_type=name), shape[False], maps=False
        )
    types = [f"v05{suffix}" for suffix in SUFFIXES]
    types += [
        "v01",
        "v02",
        "v03",
        "v03_no32",
        "v04",
        "v3",
        "v3_noz",
        "v051d",
        "v052d",
        "v052d_noz",
        "v05_onnone_nozact",
        "v05_ondwconv3_noz_oact_no32",
    ]
    for first in (True, False):
        frame = "channels first" if first else "channels last"
        for name in types:
            options = {"d_state": 3, "forward_type": name, "channel_first": first}
            yield Case("SS2D", f"{file} {name} {frame}", made(code.SS2D, 24, **options), shape[first], maps=False)
        for what, more in {
            "no conv": {"d_conv": 1},
            "GELU, biases": {"act_layer": nn.GELU, "bias": True},
            "ratio 1": {"ssm_ratio": 1.0},
            "rank 5, 16 states": {"dt_rank": 5, "d_state": 16},
            "init v2": {"initialize": "v2"},
        }.items():
            options = {"d_state": 1, "forward_type": "v05", "channel_first": first, **more}
            yield Case("SS2D", f"{file} v05 {what} {frame}", made(code.SS2D, 24, **options), shape[first], maps=False)
    if file == "classification":
        flags = importlib.import_module("models.csms6s")
        cascade = made(code.SS2D, 24, d_state=2, forward_type="v052dc", channel_first=True)
        make = lambda: _Compiled(flags, cascade())  # noqa: E731
        yield Case("SS2D", f"{file} v052dc", make, shape[True], maps=False)
        make = made(code.SS2D, 32, d_state=8, dt_rank=4, forward_type="m0_noz", initialize="v2")
        yield Case("SS2D", f"{file} m0_noz", make, (2, 7, 5, 32), maps=False)
        its = {"ssm_dt_rank": 4, "ssm_d_state": 8, "ssm_init": "v2"}
        small = {"depths": (1, 1, 1, 1), "dims": 16, "num_classes": 5, "drop_path_rate": 0.0, "norm_layer": "ln"}
        make = made(code.VSSM, **small, **its, forward_type="m0_noz", patchembed_version="v2", downsample_version="v3")
        yield Case("VSSM", f"{file} m0_noz", make, (2, 3, 68, 96))


def vm_unet(root: Path) -> Iterator[Case]:
    """VM-UNet: an encoder and a decoder of the first SS2D."""
    load(root, "models.vmunet.vmamba")
    code = load(root, "models.vmunet.vmunet")
    options = {"depths": [1, 1, 1, 1], "depths_decoder": [1, 1, 1, 1], "drop_path_rate": 0.0}
    make = made(code.VMUNet, num_classes=1, input_channels=3, **options)
    for size in ((64, 96), (128, 64)):
        yield Case("VMUNet", "encoder-decoder", make, (2, 3, *size))


def med_mamba(root: Path) -> Iterator[Case]:
    """MedMamba: SS2D on half of the channels."""
    code = load(root, "MedMamba")
    options = {"depths": [1, 1, 1, 1], "dims": [16, 32, 64, 128], "num_classes": 6, "drop_path_rate": 0.0}
    yield Case("VSSM", "half of the channels", made(code.VSSM, **options), (2, 3, 64, 96))


def swin_umamba(root: Path) -> Iterator[Case]:
    """Swin-UMamba's encoders."""
    for name in ("SwinUMamba", "SwinUMambaD"):
        code = load(root / "swin_umamba", f"nnunetv2.nets.{name}")
        options = {"depths": [1, 1, 1, 1], "dims": [16, 32, 64, 128], "in_chans": 3, "drop_path_rate": 0.0}
        yield Case("VSSMEncoder", name, made(code.VSSMEncoder, **options), (2, 3, 64, 96), call=side_by_side)


def change_mamba(root: Path) -> Iterator[Case]:
    """ChangeMamba: the SS2D of spring 2024."""
    code = load(root, "changedetection.models.vmamba", "changedetection/models")
    yield Case("SS2D", "v01 (as v0)", made(code.SS2D, 24, d_state=3, forward_type="v01"), (2, 7, 5, 24), maps=False)
    for name in ("v1", "v2", "v2noz", "v3", "v3noz", "v3nozact", "v3sigmoid", "v31d", "v32d"):
        for first in (False, True):
            make = made(code.SS2D, 24, d_state=3, forward_type=name, channel_first=first)
            frame = "channels first" if first else "channels last"
            yield Case("SS2D", f"{name} {frame}", make, (2, 24, 7, 5) if first else (2, 7, 5, 24), maps=False)
