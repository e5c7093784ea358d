"""Creates models by name, with their weights and transforms."""

import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mamba_attn.core.transform import Transform
from mamba_attn.errors import WeightsError, nearest
from mamba_attn.models import checkpoints, official
from mamba_attn.models._options import check_option, sides
from mamba_attn.models.language import MambaLanguageModel, Vocabulary
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
    "vmamba_micro": (VSSM, {"depths": (2, 2, 4, 2), "dims": 48, **_MICRO}),
    "vit_micro": (  # of vim_micro's width, depth and, within 2 %, parameters
        vision_transformer,
        {"patch_size": 8, "embed_dim": 128, "depth": 12, "num_heads": 4, "mlp_ratio": 1.75, **_MICRO},
    ),
    "vim_digits": (VisionMamba, {"d_state": 8, **_DIGITS}),
    "vmamba_digits": (VSSM, {"depths": (1, 1), "dims": 48, "image_size": 64, "num_classes": 10}),
    "vit_digits": (vision_transformer, {"num_heads": 4, **_DIGITS}),
    "mamba_copy": (MambaLanguageModel, {"vocabulary": 18}),
    "mamba_recall": (MambaLanguageModel, {"vocabulary": 32, "embed_dim": 64, "d_state": 16}),
    "mamba_reviews": (MambaLanguageModel, {"vocabulary": 9000, "embed_dim": 64, "d_state": 16, "num_classes": 2}),
    "mamba_plays": (MambaLanguageModel, {"vocabulary": 256, "embed_dim": 128, "depth": 3, "d_state": 16}),
}
_SUFFIX = "bimambav2_final_pool_mean_abs_pos_embed_with_{}_div2"
_ALIASES = {
    f"vim_tiny_patch16_224_{_SUFFIX.format('midclstok')}": "vim_tiny",
    f"vim_small_patch16_224_{_SUFFIX.format('midclstok')}": "vim_small",
    f"vim_base_patch16_224_{_SUFFIX.format('middle_cls_token')}": "vim_base",
    f"vim_tiny_patch16_stride8_224_{_SUFFIX.format('midclstok')}": "vim_tiny_stride8",
    f"vim_small_patch16_stride8_224_{_SUFFIX.format('midclstok')}": "vim_small_stride8",
    "vmamba_tiny": "vmamba_tiny_s1l8",
    "vmamba_small": "vmamba_small_s1l20",
    "vmamba_base": "vmamba_base_s1l20",
    "vanilla_vmamba": "vanilla_vmamba_tiny",
}
_DEMOS = Path(__file__).parent / "weights"
_READS = ("images", "text")


def names(reads: str = "images") -> list[str]:
    """Return the names for ``create``; it also accepts those of ``aliases``.

    Args:
        reads: what the models read, "images" or "text".

    Raises:
        ValueError: another kind.

    Example:
        >>> "vim_tiny" in names(), "mamba_reviews" in names("text")
        (True, True)
    """
    if reads not in _READS:
        raise ValueError(f"names(reads={reads!r}): expected one of {_READS}.")
    return [name for name, (built, _) in _CONFIGS.items() if (built is MambaLanguageModel) == (reads == "text")]


def aliases() -> dict[str, str]:
    """Return other names for ``create``, Vim's official ones among them, and what they stand for."""
    return dict(_ALIASES)


def demos(reads: str = "images") -> list[str]:
    """Return the names with bundled weights, ``weights="demo"``.

    Args:
        reads: as in ``names``.
    """
    there = {card.stem for card in _DEMOS.glob("*.json") if card.with_suffix(".safetensors").is_file()}
    return sorted(there.intersection(names(reads)))


def demo_card(name: str) -> dict[str, Any]:
    """Return the card of demo weights: "options" for ``create``, "classes" with their names, and how they were trained.

    Args:
        name: one of ``demos()``.

    Raises:
        WeightsError: there are no demo weights of that name.
    """
    there = [*demos(), *demos("text")]
    if name not in there:
        raise WeightsError(
            f"create({name!r}, weights='demo'): no bundled weights for this model. Available: "
            f"{', '.join(there) or 'none'}."
        )
    card: dict[str, Any] = json.loads((_DEMOS / f"{name}.json").read_text())
    return card


def vocabulary(name: str) -> Vocabulary:
    """Return the tokens of bundled weights that read text.

    Args:
        name: one of ``demos("text")``.

    Raises:
        WeightsError: there are no such weights.
    """
    card = demo_card(name)
    if "split" not in card:
        raise WeightsError(
            f"vocabulary({name!r}): these weights read images. Those of text: {', '.join(demos('text'))}."
        )
    return Vocabulary(card.get("tokens", "").split(), card["split"])


class Built(NamedTuple):
    """A model, and the options that build it again."""

    model: nn.Module
    options: dict[str, Any]
    classes: list[str]


def create(name: str, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Build a model, in eval mode.

    With a file, the number of classes, the image size and the stride are those of its weights, unless they are given;
    weights without a classifier make a model without one, ``num_classes=0``. Class tokens in the middle and in the
    first place have the same shapes: ``class_token=`` is not read from a file.

    Args:
        name: one of ``names()`` or ``names("text")``, or an alias, e.g. an official name of Vim.
        weights: None or "random" for random ones; the path of a checkpoint (see ``checkpoints.load``); "official" for
            the published ones, downloaded once; "demo" for the small ones that come with this package.
        options: arguments of ``VisionMamba``, ``VSSM``, timm's VisionTransformer or ``MambaLanguageModel``, e.g.
            ``image_size``, ``num_classes``, ``drop_path``, ``order``, ``class_token``, ``depth``.

    Raises:
        ValueError: an unknown name, an option out of range.
        TypeError: an unknown option, or a value of another type.
        WeightsError: weights that are absent, damaged, not safe to load, or do not fit; the message says which of
            ``names()`` they do fit.
        ImportError: a model of timm's without timm.

    Warns:
        UserWarning: what was taken from the file or adapted to it, see ``checkpoints.load``.

    Example:
        >>> create("vim_tiny", image_size=(64, 96), num_classes=10).layout(64, 96).grid
        (4, 6)
    """
    return build(name, weights, options).model


def build(name: str, weights: str | Path | None, options: Mapping[str, Any]) -> Built:
    """Build a model, and return the options that were found too; see ``create``.

    Args:
        name: as in ``create``.
        weights: as in ``create``.
        options: as in ``create``.
    """
    name = _known("create", name)
    builder, config = _CONFIGS[name]
    chosen = dict(options)
    if weights is None or weights == "random":
        return Built(builder(**{**config, **chosen}).eval(), chosen, [])
    ours = weights == "demo"  # half the size on disk; nobody asked for float16
    if ours:
        chosen = {**demo_card(name).get("options", {}), **chosen}
        weights = _DEMOS / f"{name}.safetensors"
    elif weights == "official":
        weights = official.fetch(name)
    elif not Path(weights).exists() and not Path(str(weights).rpartition(":")[0]).is_file():
        raise WeightsError(
            f"create({name!r}, weights={str(weights)!r}): no such file; expected the path of a checkpoint, "
            "'official', 'demo' or 'random'."
        )
    checkpoint = checkpoints.Checkpoint(weights)
    model = builder(**{**config, **chosen})  # not on the meta device, where torch imports its compiler
    found, notes = _of_the_file(name, model, checkpoint, chosen)
    model = builder(**{**config, **chosen, **found}) if found else model
    try:
        notes += checkpoints.fill(model, checkpoint, checkpoint.fit(model.state_dict()))
    except WeightsError as error:
        others = _fitting(checkpoint, chosen)
        if not others or name in others:
            raise
        raise WeightsError(
            f"{checkpoint.path}: these weights are not of {name} but of {' or '.join(others)}: give that name."
        ) from error
    for note in [] if ours else notes:
        warnings.warn(note, stacklevel=3)
    return Built(model.eval(), {**chosen, **found}, checkpoint.classes)


def _of_the_file(
    name: str, model: nn.Module, checkpoint: checkpoints.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the options that the weights were made with, where they differ from the model's; and what to say."""
    config, expected = _CONFIGS[name][1], model.state_dict()
    tensors = checkpoint.fit(expected).tensors
    found: dict[str, Any] = {}
    notes = []
    head = checkpoints.head_of(expected)
    if head is not None and "num_classes" not in given and _covered(tensors, expected, but=head):
        if head not in tensors:
            found["num_classes"] = 0
            notes.append(f"{checkpoint.path}: it holds no classifier, so the model has none (num_classes=0).")
        elif tensors[head].shape[0] != expected[head].shape[0]:
            found["num_classes"] = tensors[head].shape[0]
    positions = tensors.get("pos_embed")
    if positions is not None and positions.shape != expected["pos_embed"].shape and "image_size" not in given:
        size = _own_size(name, model, positions, given)
        if size:
            found |= size
            what = ", ".join(f"{option}={value}" for option, value in size.items())
            side = checkpoints.side_of(model, positions)
            notes.append(
                f"{checkpoint.path}: its position embeddings are for {side}x{side} patches, so the model was built "
                f"with {what}; image_size={config.get('image_size', 224)} would resize them."
            )
    return found, notes


def _own_size(name: str, model: nn.Module, positions: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stride or image size that position embeddings were made for, as far as they tell."""
    side = checkpoints.side_of(model, positions)
    if side is None or not isinstance(model, VisionMamba):
        return {} if side is None else {"image_size": side * int(cast(Any, model).patch_embed.patch_size[0])}
    config = _CONFIGS[name][1]
    for other, (builder, its) in _CONFIGS.items():
        alike = builder is VisionMamba and {**its, "stride": None} == {**config, "stride": None}
        if alike and other != name and "stride" not in given:
            patch, stride = model.patch_embed.patch_size, its.get("stride") or model.patch_embed.patch_size
            if side == (model.image_size[0] - patch) // stride + 1:
                return {"stride": stride}
    return {"image_size": (side - 1) * model.patch_embed.stride + model.patch_embed.patch_size}


def _covered(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], but: str) -> bool:
    """Whether a file holds everything except, perhaps, the classifier."""
    head = but.removesuffix("weight")
    return all(name in tensors or name.startswith(head) for name in expected)


def _fitting(checkpoint: checkpoints.Checkpoint, given: Mapping[str, Any]) -> list[str]:
    """Return the names of the models that a file fits, whatever its classes and image size."""
    found = []
    for name, (builder, config) in _CONFIGS.items():
        taken = inspect.signature(builder).parameters
        options = {**config, **{option: value for option, value in given.items() if option in taken}}
        try:
            expected = _on_meta(builder, options).state_dict()
        except (TypeError, ValueError, ImportError):  # options of another model
            continue
        fit = checkpoint.fit(expected)
        head = (checkpoints.head_of(expected) or "").removesuffix("weight")
        free = ("pos_embed", f"{head}weight", f"{head}bias")
        same = (value.numel() == fit.tensors[key].numel() for key, value in expected.items() if key in fit.tensors)
        there = all(key in fit.tensors or key in free for key in expected)
        strays = [key for key in fit.tensors if key not in expected]
        wrong = [
            key for key in fit.tensors.keys() & expected.keys()
            if key not in free and fit.tensors[key].numel() != expected[key].numel()
        ]  # fmt: skip
        if there and not strays and not wrong and any(same):
            found.append(name)
    return found


def _on_meta(builder: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """Build a model for its names and shapes, without numbers where the builder needs none."""
    with torch.device("cpu" if builder is vision_transformer else "meta"):
        return builder(**options)


def builder(name: str) -> Callable[..., nn.Module]:
    """Return what builds a model; its parameters are the options of ``create``.

    Args:
        name: as in ``create``.

    Raises:
        ValueError: an unknown name.
    """
    return _CONFIGS[_known("builder", name)][0]


def on_meta(name: str) -> nn.Module:
    """Build a model for its names and shapes, without numbers where its builder needs none.

    Args:
        name: as in ``create``.

    Raises:
        ValueError: an unknown name.
    """
    return _on_meta(*_CONFIGS[_known("on_meta", name)])


def transform(name: str, image_size: int | Sequence[int] | None = None) -> Transform:
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
    if name in names("text"):
        raise ValueError(f"transform({name!r}): this model reads text; registry.vocabulary({name!r}) has its tokens.")
    if image_size is not None:
        check_option("transform", "image_size", image_size)
    height, width = sides(_CONFIGS[name][1].get("image_size", 224) if image_size is None else image_size)
    if name.endswith(("_micro", "_digits")):
        return Transform((height, width), (height, width), "bilinear")
    return Transform((height, width), (int(height / 0.875), int(width / 0.875)))


def _known(call: str, name: str) -> str:
    """Resolve aliases to a name in the table of configurations."""
    name = _ALIASES.get(name, name)
    if name not in _CONFIGS:
        raise ValueError(f"{call}({name!r}): no such model. {nearest(name, [*_CONFIGS, *_ALIASES])}")
    return name
