"""Repositories of Mamba-2 products without a causal scan, and of scans that stand in their place, for ``dropin``."""

import importlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

import mamba_attn
from benchmarks.case import Case
from benchmarks.foreign_code import load, made, package, renamed


def vssd(root: Path) -> Iterator[Case]:
    """VSSD: every token reads one sum over all tokens, two strict scans to an adapter; or a causal scan."""
    with mamba_attn.cpu_stand_ins():
        renamed("timm.models.layers", "timm.layers")
    folder = root / "classification"
    package("models", folder / "models")
    code = load(folder, "models.mamba2")
    sizes = {"img_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 8], "d_state": 8}
    base = {**sizes, "num_classes": 7, "drop_path_rate": 0.0}
    sums = {"linear_attn_duality": True}
    for name, more in (
        ("non-causal", {"attn_types": ["mamba2"] * 4}),
        ("non-causal, 2 groups", {"attn_types": ["mamba2"] * 4, "ssd_ngroups": 2}),
        ("non-causal, attention in its last stage", {}),
    ):
        yield Case("VMAMBA2", name, made(code.VMAMBA2, **base, **more, **sums), (2, 3, 64, 64), orders=False)
    for name, more in (("causal", {}), ("both ways", {"bidirection": True, "ssd_ngroups": 2})):
        make = made(code.VMAMBA2, **base, **more, linear_attn_duality=False, attn_types=["mamba2"] * 4)
        yield Case("VMAMBA2", name, make, (2, 3, 64, 64))


def efficient_vim(root: Path) -> Iterator[Case]:
    """EfficientViM: its states are gated before tokens read them, so that its matrix is none of the tokens alone."""
    folder = root / "classification"
    package("models", folder / "models")
    code = load(folder, "models.EfficientViM")
    make = made(code.EfficientViM, num_classes=7, embed_dim=[16, 24, 32], depths=[1, 1, 1], state_dim=[9, 4, 4])
    yield Case("EfficientViM", "states gated", make, (2, 3, 64, 64), refused="HSMSSD")


def hydra(root: Path) -> Iterator[Case]:
    """Hydra: there and back, every step written to the token after its own; it needs a checkout of mamba_ssm beside."""
    load(root.parent / "mamba", "mamba_ssm.ops.triton.ssd_combined")
    for name in ("hydra", "hydra.modules"):
        package(name, root / name.replace(".", "/"))
    load(root, "hydra.modules.hydra")
    code = importlib.import_module("hydra.modules.hydra")

    class Blocks(nn.Module):
        """Norms, its mixers and what goes past them."""

        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
            self.mixers = nn.ModuleList(code.Hydra(32, d_state=8, headdim=16, d_conv=3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for norm, mixer in zip(self.norms, self.mixers, strict=True):
                x = x + mixer(norm(x))
            return x

    yield Case("Hydra", "two blocks", Blocks, (2, 13, 32), maps=False)
