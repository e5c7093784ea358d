"""The repositories of Mamba over video, sound and plain sequences, which ``dropin`` runs: their classes, small."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case
from benchmarks.foreign_code import load, made, package


def video_mamba(root: Path) -> Iterator[Case]:
    """VideoMamba: images and clips, both directions in one mixer."""
    load(root / "mamba", "mamba_ssm")
    base = {"img_size": 48, "depth": 3, "embed_dim": 48, "num_classes": 7}
    image = load(root / "videomamba" / "image_sm", "models.videomamba")
    yield Case("VisionMamba", "images", made(image.VisionMamba, **base), (2, 3, 48, 48))
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]
    video = load(root / "videomamba" / "video_sm", "models.videomamba")
    make = made(video.VisionMamba, **base, num_frames=4)
    yield Case("VisionMamba", "clips", make, (2, 3, 4, 48, 48))


def arm(root: Path) -> Iterator[Case]:
    """ARM: clusters of 4 x 4 tokens, along rows and along columns, there and back."""
    code = load(root / "Finetuning", "models_mamba")
    make = made(
        code.ARM,
        img_size=128,
        patch_size=16,
        embed_dim=48,
        depth=2,
        num_classes=7,
        rms_norm=True,
        fused_add_norm=True,
        residual_in_fp32=True,
        drop_path_rate=0.0,
        if_abs_pos_embed=True,
        bimamba_type="None",
        if_cls_token=True,
        use_middle_cls_token=True,
    )
    yield Case("ARM", "clusters", make, (2, 3, 128, 128))


def audio_mamba(root: Path) -> Iterator[Case]:
    """Audio Mamba: Vim over spectrograms."""
    load(root / "vim-mamba_ssm", "mamba_ssm")
    for name in ("src", "src.models", "src.utilities"):
        package(name, root / name.replace(".", "/"))
    code = load(root, "src.models.mamba_models")
    base = {"spectrogram_size": (64, 96), "depth": 2, "embed_dim": 48, "num_classes": 7}
    for name, more in {
        "v2": {},
        "none": {"bimamba_type": "none"},
        "v1": {"bimamba_type": "v1"},
        "flipped layers": {"if_bidirectional": True},
        "first token": {"use_middle_cls_token": False},
        "transposed": {"transpose_token_sequence": True},
    }.items():
        yield Case("AudioMamba", name, made(code.AudioMamba, **{**base, **more}), (2, 96, 64))


def se_mamba(root: Path) -> Iterator[Case]:
    """SEMamba: speech; over time and over frequency, there and back by flips outside the mixer."""
    load(root / "mamba-1_2_0_post1", "mamba_ssm")
    code = load(root, "models.generator")
    sizes = {
        "hid_feature": 16,
        "compress_factor": 0.3,
        "num_tfmamba": 2,
        "d_state": 4,
        "d_conv": 4,
        "expand": 2,
        "norm_epsilon": 1e-5,
        "beta": 2.0,
        "input_channel": 2,
        "output_channel": 1,
    }
    config = {"model_cfg": sizes, "stft_cfg": {"n_fft": 40, "hop_size": 10, "win_size": 40}}

    def call(model: nn.Module, pair: Tensor) -> Any:
        return torch.cat([part.flatten() for part in model(*pair.unbind(1))])

    yield Case("SEMamba", "time and frequency", made(code.SEMamba, config), (2, 2, 21, 17), call=call)


def mamba_minimal(root: Path) -> Iterator[Case]:
    """mamba-minimal: the mixer in one file, its scan a Python loop."""
    code = load(root, "model")

    class Blocks(nn.Module):
        """Its residual blocks on features; the whole model reads words."""

        def __init__(self) -> None:
            super().__init__()
            options = code.ModelArgs(d_model=24, n_layer=2, vocab_size=16, d_state=4)
            self.blocks = nn.Sequential(*(code.ResidualBlock(options) for _ in range(2)))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.blocks(x)
            return y

    yield Case("ResidualBlock", "two of them", Blocks, (2, 13, 24), maps=False)


def mamba_py(root: Path) -> Iterator[Case]:
    """mambapy: Mamba and its bidirectional Vim, by parallel scan, by a loop, by mamba_ssm's function."""
    code = load(root, "mambapy.mamba")
    for name, more in {"parallel": {}, "loop": {"pscan": False}, "use_cuda": {"use_cuda": True}}.items():
        config = code.MambaConfig(d_model=24, n_layers=2, d_state=4, **more)
        yield Case("Mamba", name, made(code.Mamba, config), (2, 13, 24), maps=False)
    vim = importlib.import_module("mambapy.vim")
    for name, more, refused in (
        ("bidirectional", {}, "None of its scans goes through a door"),
        ("bidirectional, use_cuda", {"use_cuda": True}, None),
    ):
        config = vim.MambaConfig(d_model=24, n_layers=2, d_state=4, **more)
        yield Case("VMamba", name, made(vim.VMamba, config), (2, 13, 24), maps=False, refused=refused)
