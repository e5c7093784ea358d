"""Creates models by name, with their weights and transforms."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mamba_attn.errors import WeightsError, nearest
from mamba_attn.models import checkpoints, official
from mamba_attn.models._options import check_option, sides
from mamba_attn.models.transforms import EvaluationTransform
from mamba_attn.models.vim import VisionMamba
from mamba_attn.models.vit import vision_transformer
from mamba_attn.models.vmamba import VSSM

_MICRO: dict[str, Any] = {"image_size": 128, "num_classes": 20}
_DIGITS: dict[str, Any] = {"image_size": 64, "num_classes": 10, "patch_size": 8, "embed_dim": 128, "depth": 6}
_VANILLA: dict[str, Any] = {"generation": "v0", "d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0}
_CONFIGS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "vim_tiny": (VisionMamba, {"embed_dim": 192}),
    "vim_small": (VisionMamba, {"embed_dim": 384}),
    "vim_base": (VisionMamba, {"embed_dim": 768}),
    "vim_tiny_stride8": (VisionMamba, {"embed_dim": 192, "stride": 8}),
    "vim_small_stride8": (VisionMamba, {"embed_dim": 384, "stride": 8}),
    "vim_micro": (VisionMamba, {"patch_size": 8, "embed_dim": 128, "depth": 12, "d_state": 8, **_MICRO}),
    "vanilla_vmamba_tiny": (VSSM, {"depths": (2, 2, 9, 2), **_VANILLA}),
    "vanilla_vmamba_small": (VSSM, {"depths": (2, 2, 27, 2), **_VANILLA}),
    "vanilla_vmamba_base": (VSSM, {"depths": (2, 2, 27, 2), "dims": 128, **_VANILLA}),
    "vmamba_tiny_s2l5": (VSSM, {"depths": (2, 2, 5, 2), "ssm_ratio": 2.0}),
    "vmamba_small_s2l15": (VSSM, {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0}),
    "vmamba_base_s2l15": (VSSM, {"depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0}),
    "vmamba_tiny_s1l8": (VSSM, {"depths": (2, 2, 8, 2)}),
    "vmamba_small_s1l20": (VSSM, {"depths": (2, 2, 20, 2)}),
    "vmamba_base_s1l20": (VSSM, {"depths": (2, 2, 20, 2), "dims": 128}),
    "vmamba_micro": (VSSM, {"depths": (1, 1, 2, 1), "dims": 48, **_MICRO}),
    "vit_micro": (vision_transformer, {"patch_size": 8, "embed_dim": 128, "depth": 12, "num_heads": 4, **_MICRO}),
    "vim_digits": (VisionMamba, {"d_state": 8, **_DIGITS}),
    "vmamba_digits": (VSSM, {"depths": (1, 1), "dims": 48, "image_size": 64, "num_classes": 10}),
    "vit_digits": (vision_transformer, {"num_heads": 4, **_DIGITS}),
}
_SUFFIX = "bimambav2_final_pool_mean_abs_pos_embed_with_{}_div2"
_ALIASES = {
    f"vim_tiny_patch16_224_{_SUFFIX.format('midclstok')}": "vim_tiny",
    f"vim_small_patch16_224_{_SUFFIX.format('midclstok')}": "vim_small",
    f"vim_base_patch16_224_{_SUFFIX.format('middle_cls_token')}": "vim_base",
    f"vim_tiny_patch16_stride8_224_{_SUFFIX.format('midclstok')}": "vim_tiny_stride8",
    f"vim_small_patch16_stride8_224_{_SUFFIX.format('midclstok')}": "vim_small_stride8",
}
_DEMOS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """Return the names for ``create``; it also accepts Vim's official names."""
    return list(_CONFIGS)


def demos() -> list[str]:
    """Return the names with bundled weights, ``weights="demo"``."""
    return sorted(card.stem for card in _DEMOS.glob("*.json") if card.with_suffix(".safetensors").is_file())


def demo_card(name: str) -> dict[str, Any]:
    """Return the card of demo weights: "options" for ``create``, "classes" with their names, and how they were trained.

    Args:
        name: one of ``demos()``.

    Raises:
        WeightsError: there are no demo weights of that name.
    """
    if name not in demos():
        raise WeightsError(
            f"create({name!r}, weights='demo'): no bundled weights for this model. Available: "
            f"{', '.join(demos()) or 'none'}."
        )
    card: dict[str, Any] = json.loads((_DEMOS / f"{name}.json").read_text())
    return card


def create(name: str, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Build a model, in eval mode.

    Args:
        name: one of ``names()``, or an official name of Vim.
        weights: None for random ones; the path of a checkpoint (see ``checkpoints.load``); "official" for the
            published ones, downloaded once; "demo" for the small ones that come with this package.
        options: arguments of ``VisionMamba``, ``VSSM`` or timm's VisionTransformer, e.g. ``image_size``,
            ``num_classes``, ``drop_path``, ``order``, ``class_token``, ``depth``.

    Raises:
        ValueError: an unknown name, an option out of range.
        TypeError: an unknown option, or a value of another type.
        WeightsError: weights that are absent, damaged, not safe to load, or do not fit.
        ImportError: a model of timm's without timm.

    Example:
        >>> create("vim_tiny", image_size=(64, 96), num_classes=10).layout(64, 96).grid
        (4, 6)
    """
    name = _known("create", name)
    builder, config = _CONFIGS[name]
    path: str | Path | None = weights
    if weights == "demo":
        options = {**demo_card(name).get("options", {}), **options}
        path = _DEMOS / f"{name}.safetensors"
    elif weights == "official":
        path = official.fetch(name)
    elif weights is not None and not Path(weights).is_file():
        raise WeightsError(
            f"create({name!r}, weights={str(weights)!r}): no such file; expected the path of a checkpoint, "
            "'official' or 'demo'."
        )
    model = builder(**{**config, **options})
    if path is not None:
        checkpoints.load(model, path)
    return model.eval()


def builder(name: str) -> Callable[..., nn.Module]:
    """Return what builds a model; its parameters are the options of ``create``.

    Args:
        name: as in ``create``.

    Raises:
        ValueError: an unknown name.
    """
    return _CONFIGS[_known("builder", name)][0]


def transform(name: str, image_size: int | Sequence[int] | None = None) -> EvaluationTransform:
    """Return the evaluation transform of a model: a function from a Pillow image or a path to (3, height, width).

    The published models see the centre of the image, its shorter side scaled to ``int(size / 0.875)`` bicubically; the
    micro models all of the shorter side, bilinearly, as they were trained. Mean and standard deviation are ImageNet's.

    Args:
        name: as in ``create``.
        image_size: side, or (height, width), in pixels, of a model created with that option. Default: the model's.

    Raises:
        ValueError: an unknown name, a size below one pixel.
        TypeError: a size that is no whole number or two.

    Example:
        >>> transform("vim_tiny").cover
        (256, 256)
    """
    name = _known("transform", name)
    if image_size is not None:
        check_option("transform", "image_size", image_size)
    height, width = sides(_CONFIGS[name][1].get("image_size", 224) if image_size is None else image_size)
    if name.endswith(("_micro", "_digits")):
        return EvaluationTransform((height, width), (height, width), "bilinear")
    return EvaluationTransform((height, width), (int(height / 0.875), int(width / 0.875)))


def _known(call: str, name: str) -> str:
    """Resolve aliases to a name in the table of configurations."""
    name = _ALIASES.get(name, name)
    if name not in _CONFIGS:
        raise ValueError(f"{call}({name!r}): no such model. {nearest(name, [*_CONFIGS, *_ALIASES])}")
    return name
