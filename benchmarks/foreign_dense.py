"""The repositories that label, restore or detect in images and volumes, which ``dropin`` runs: their classes, small."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.case import Case
from benchmarks.foreign_code import load, made, package, side_by_side


def u_mamba(root: Path) -> Iterator[Case]:
    """U-Mamba: a Mamba in the bottleneck or in every stage of an encoder, of images and volumes."""
    for name in ("nnunetv2", "nnunetv2.utilities", "nnunetv2.utilities.plans_handling", "nnunetv2.nets"):
        package(name, root / "umamba" / name.replace(".", "/"))
    for dim, size in ((2, (16, 24)), (3, (4, 8, 12))):
        base: dict[str, Any] = {
            "input_channels": 2,
            "n_stages": 3,
            "features_per_stage": [8, 16, 24],
            "num_classes": 3,
            "conv_op": nn.Conv2d if dim == 2 else nn.Conv3d,
            "kernel_sizes": [[3] * dim] * 3,
            "strides": [[1] * dim, [2] * dim, [2] * dim],
            "conv_bias": True,
            "deep_supervision": False,
            "norm_op": nn.InstanceNorm2d if dim == 2 else nn.InstanceNorm3d,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"inplace": True},
        }
        for name in ("UMambaBot", "UMambaEnc"):
            code = load(root / "umamba", f"nnunetv2.nets.{name}_{dim}d")
            more = {"input_size": size} if name == "UMambaEnc" else {}

            def make(code: Any = code, name: str = name, more: Any = more, base: Any = base) -> nn.Module:
                counts = {"n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1]}  # it writes to them
                model: nn.Module = getattr(code, name)(**base, **counts, **more)
                return model

            yield Case(name, f"{dim}-D", make, (2, 2, *size))


def lightm_unet(root: Path) -> Iterator[Case]:
    """LightM-UNet: two Mambas in a residual block, of images and volumes."""
    for name in ("nnunetv2", "nnunetv2.nets"):
        package(name, root / "lightm-unet" / name.replace(".", "/"))
    code = load(root / "lightm-unet", "nnunetv2.nets.LightMUNet")
    for dim, size in ((2, (32, 48)), (3, (8, 16, 24))):
        make = made(
            code.LightMUNet,
            spatial_dims=dim,
            init_filters=8,
            in_channels=2,
            out_channels=3,
            blocks_down=(1, 1, 1),
            blocks_up=(1, 1),
        )
        yield Case("LightMUNet", f"{dim}-D", make, (2, 2, *size))


def ultralight(root: Path) -> Iterator[Case]:
    """UltraLight VM-UNet: one Mamba called on four groups of channels in turn."""
    code = load(root, "models.UltraLight_VM_UNet")
    make = made(code.UltraLight_VM_UNet, num_classes=1, input_channels=3)
    yield Case("UltraLight_VM_UNet", "one Mamba, four calls", make, (2, 3, 64, 96))


def seg_mamba(root: Path) -> Iterator[Case]:
    """SegMamba: volumes, scanned forward, backward and across slices."""
    load(root / "mamba", "mamba_ssm")
    code = load(root, "model_segmamba.segmamba")
    make = made(code.SegMamba, in_chans=2, out_chans=3, depths=[1, 1, 1, 1], feat_size=[48, 8, 8, 8], hidden_size=8)
    yield Case("MambaEncoder", "3-D, its encoder", lambda: make().vit, (2, 2, 16, 32, 64), call=side_by_side)


def mamba_unet(root: Path) -> Iterator[Case]:
    """Mamba-UNet: an encoder and a decoder of the first SS2D."""
    code = load(root / "code", "networks.mamba_sys")
    make = made(
        code.VSSM,
        patch_size=4,
        in_chans=1,
        num_classes=4,
        depths=[1, 1, 1, 1],
        dims=[16, 32, 64, 128],
        d_state=4,
        drop_path_rate=0.0,
    )
    yield Case("VSSM", "encoder-decoder", make, (2, 1, 64, 96))


def sigma(root: Path) -> Iterator[Case]:
    """Sigma: an encoder that runs twice in a forward, mixers that read one modality with another's C, a decoder."""
    package("engine", root / "engine")
    package("utils", root / "utils")
    encoder = load(root, "models.encoders.dual_vmamba", "models/encoders/selective_scan").RGBXTransformer
    decoder = load(root, "models.decoders.MambaDecoder").MambaDecoder

    class Sigma(nn.Module):
        """Encoder and decoder, as the repository's ``EncoderDecoder`` puts them together from a configuration."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = encoder(depths=[1, 1, 1, 1], dims=32, mlp_ratio=0.0, drop_path_rate=0.0, num_classes=7)
            self.decode_head = decoder(
                img_size=[64, 96], in_channels=[32, 64, 128, 256], num_classes=7, embed_dim=32, deep_supervision=False
            )

        def forward(self, pair: Tensor) -> Tensor:
            labels: Tensor = self.decode_head(self.backbone(*pair.chunk(2, dim=1)))
            return labels

    yield Case("Backbone_VSSM", "its encoder", lambda: Sigma().backbone.vssm, (2, 3, 64, 96), call=side_by_side)
    yield Case("Sigma", "two modalities", Sigma, (2, 6, 64, 96))


def mamba_yolo(root: Path) -> Iterator[Case]:
    """Mamba-YOLO: its blocks, as its configuration file puts the backbone together."""
    for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.modules"):
        package(name, root / name.replace(".", "/"))
    code = load(root, "ultralytics.nn.modules.mamba_yolo")

    class Backbone(nn.Module):
        """Stem, blocks and merges of Mamba-YOLO-T.yaml, narrower."""

        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(
                code.SimpleStem(3, 16, 3),
                code.VSSBlock(16, 16, ssm_d_state=4, mlp_ratio=2.0),
                code.VisionClueMerge(16, 32),
                code.VSSBlock(32, 32, ssm_d_state=4, mlp_ratio=2.0),
                code.XSSBlock(32, 24, n=2, ssm_d_state=4, mlp_ratio=2.0),
            )

        def forward(self, images: Tensor) -> Tensor:
            features: Tensor = self.stages(images)
            return features

    yield Case("Backbone", "VSSBlock and XSSBlock", Backbone, (2, 3, 64, 96))


def spatial_mamba(root: Path) -> Iterator[Case]:
    """Spatial-Mamba: states of neighbouring tokens are mixed before C reads them, which no matrix of ours holds."""
    code = load(root / "classification", "models.spatialmamba")
    make = made(code.SpatialMamba, depths=[1, 1, 1, 1], dims=[16, 32, 64, 128], num_classes=7, drop_path_rate=0.0)
    yield Case("SpatialMamba", "states mixed", make, (2, 3, 64, 64), training=True, refused="another recurrence")


def mamba_2d(root: Path) -> Iterator[Case]:
    """2DMamba: a recurrence over both axes."""
    code = load(root / "2DVMamba", "classification.models.vmamba", "classification")
    make = made(code.SS2D, 24, d_state=4, forward_type="v05", use_v2d=True)
    yield Case("SS2D", "both axes", make, (2, 8, 6, 24), refused="another recurrence")
