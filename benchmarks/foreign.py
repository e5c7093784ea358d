"""Which models of which repositories ``dropin`` runs.

Each function takes a checkout's folder, imports what it needs under ``cpu_stand_ins`` and yields cases. Ordinary
packages that this code imports (fvcore; for Swin-UMamba those of nnU-Net) have to be installed.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from benchmarks import (
    foreign_dense,
    foreign_routes,
    foreign_sequences,
    foreign_ss2d,
    foreign_ssd,
    foreign_unseen,
    foreign_vim,
)
from benchmarks.case import Case
from benchmarks.foreign_code import load, made


def mamba_vision(root: Path) -> Iterator[Case]:
    """MambaVision: mixers and attention blocks, one window and several, padded."""
    code = load(root, "mambavision.models.mamba_vision")
    small = {
        "dim": 16,
        "in_dim": 8,
        "depths": [1, 1, 4, 4],
        "mlp_ratio": 2,
        "num_heads": [1, 2, 4, 4],
        "num_classes": 5,
    }
    for variant, more, size in (
        ("one window", {"window_size": [8, 8, 14, 7]}, (224, 224)),
        ("windows of 4 and 3", {"window_size": [8, 8, 4, 3]}, (160, 240)),
        ("odd grids", {"window_size": [8, 8, 4, 2]}, (150, 230)),
        (
            "norms of queries and keys, layer scale",
            {"window_size": [8, 8, 4, 3], "qk_scale": True, "layer_scale": 0.5},
            (160, 240),
        ),
    ):
        yield Case("MambaVision", variant, made(code.MambaVision, **{**small, **more}), (2, 3, *size))
    for size in ((224, 224), (320, 256)):
        yield Case(
            "MambaVision", "mamba_vision_T", made(code.mamba_vision_T, drop_path_rate=0.0), (1, 3, *size), noise=0.1
        )


def timm_vit(root: Path) -> Iterator[Case]:
    """ViT and DeiT of timm, fused attention on and off; as it is installed."""
    import timm

    for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        for fused in (True, False):

            def make(name: str = name, fused: bool = fused) -> nn.Module:
                model: nn.Module = timm.create_model(name, num_classes=10)
                for module in model.modules():
                    if hasattr(module, "fused_attn"):
                        module.fused_attn = fused
                return model

            yield Case(name, f"fused_attn={fused}", make, (2, 3, 224, 224), noise=0.1)


def official_pairs(name: str, root: Path) -> Iterator[tuple[str, nn.Module]]:
    """Models of a repository that are ours under the same name, to compare with the same weights."""
    if name == "MzeroMiko/VMamba":
        yield "vmamba_tiny_s1l8", load(root, "vmamba").vmamba_tiny_s1l8()
    if name == "hustvl/Vim":
        load(root / "mamba-1p1p1", "mamba_ssm")
        code = load(root / "vim", "models_mamba")
        yield "vim_tiny", code.vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2()


REPOSITORIES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "MzeroMiko/VMamba": foreign_ss2d.vmamba,
    "JCruan519/VM-UNet": foreign_ss2d.vm_unet,
    "YubiaoYue/MedMamba": foreign_ss2d.med_mamba,
    "JiarunLiu/Swin-UMamba": foreign_ss2d.swin_umamba,
    "ChenHongruixuan/ChangeMamba": foreign_ss2d.change_mamba,
    "hustvl/Vim": foreign_vim.vim,
    "AmeenAli/HiddenMambaAttn": foreign_vim.hidden_mamba_attn,
    "Itamarzimm/UnifiedImplicitAttnRepr": foreign_vim.unified_implicit,
    "wangf3014/Mamba-Reg": foreign_vim.mamba_reg,
    "state-spaces/mamba": foreign_vim.mamba,
    "NVlabs/MambaVision": mamba_vision,
    "TerryPei/EfficientVMamba": foreign_routes.efficient_vmamba,
    "hunto/LocalMamba": foreign_routes.local_mamba,
    "YuHengsss/MSVMamba": foreign_routes.msv_mamba,
    "Amshaker/GroupMamba": foreign_routes.group_mamba,
    "lewandofskee/MobileMamba": foreign_routes.mobile_mamba,
    "leiyeliu/DefMamba": foreign_routes.def_mamba,
    "xwmaxwma/TinyViM": foreign_routes.tiny_vim,
    "ChenhongyiYang/PlainMamba": foreign_routes.plain_mamba,
    "csguoh/MambaIR": foreign_routes.mamba_ir,
    "bowang-lab/U-Mamba": foreign_dense.u_mamba,
    "MrBlankness/LightM-UNet": foreign_dense.lightm_unet,
    "wurenkai/UltraLight-VM-UNet": foreign_dense.ultralight,
    "ge-xing/SegMamba": foreign_dense.seg_mamba,
    "ziyangwang007/Mamba-UNet": foreign_dense.mamba_unet,
    "zifuwan/Sigma": foreign_dense.sigma,
    "HZAI-ZJNU/Mamba-YOLO": foreign_dense.mamba_yolo,
    "OpenGVLab/VideoMamba": foreign_sequences.video_mamba,
    "OliverRensu/ARM": foreign_sequences.arm,
    "kaistmm/Audio-Mamba-AuM": foreign_sequences.audio_mamba,
    "RoyChao19477/SEMamba": foreign_sequences.se_mamba,
    "johnma2006/mamba-minimal": foreign_sequences.mamba_minimal,
    "alxndrTL/mamba.py": foreign_sequences.mamba_py,
    "YuHengsss/VSSD": foreign_ssd.vssd,
    "mlvlab/EfficientViM": foreign_ssd.efficient_vim,
    "goombalab/hydra": foreign_ssd.hydra,
    "EdwardChasel/Spatial-Mamba": foreign_dense.spatial_mamba,
    "AtlasAnalyticsLab/2DMamba": foreign_dense.mamba_2d,
    "timm": timm_vit,
    "ziyangwang007/VMambaMorph": foreign_unseen.vmamba_morph,
    "scott-yjyang/Vivim": foreign_unseen.vivim,
    "lewandofskee/MambaAD": foreign_unseen.mamba_ad,
    "CompVis/zigma": foreign_unseen.zigma,
    "walking-shadow/Official_Remote_Sensing_Mamba": foreign_unseen.remote_sensing_mamba,
}
UNSEEN = list(REPOSITORIES)[-5:]  # of which nobody here knew the code; as they came out
