"""The attribution methods that are measured, their variants, and the models they explain."""

import fnmatch
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

MODELS = ("vim_micro", "vmamba_micro", "vit_micro")


@dataclass(frozen=True)
class Method:
    """A class of mamba_attn.attribution with options, for families of models."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = ("vim", "vmamba")

    def __str__(self) -> str:
        return self.kind + "".join(f", {key}={value}" for key, value in self.options.items())

    def build(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the function from images to maps (images, rows, columns)."""
        from mamba_attn import attribution

        method = getattr(attribution, self.kind)(model, **self.options)
        return lambda inputs: method.attribute(inputs)[:, 0]


DEFAULTS = (
    Method("RawAttention", families=("vim", "vmamba", "vit")),
    Method("AttentionRollout", families=("vim", "vmamba", "vit")),
    Method("MambaAttribution"),
    Method("TransformerAttribution", families=("vit",)),
)
VARIANTS = (
    *(Method(kind, {"signed": True}) for kind in ("RawAttention", "AttentionRollout", "MambaAttribution")),
    Method("MambaAttribution", {"rollout": False}),
    Method("MambaAttribution", {"rollout": False, "signed": True}),
    Method("MambaAttribution", {"rule": "paper"}),
    Method("MambaAttribution", {"rule": "published_code"}),
    *(
        Method(kind, {"convention": convention}, ("vim",))
        for convention in ("hidden_mamba", "implicit_unified")
        for kind in ("RawAttention", "AttentionRollout", "MambaAttribution")
    ),
    *(
        Method(kind, {"convention": convention}, ("vmamba",))
        for convention in ("vmamba_analysis", "vmamba_analysis_dt")
        for kind in ("RawAttention", "AttentionRollout")
    ),
)


@dataclass(frozen=True)
class Setting:
    """A model, its methods, and how its images are made."""

    name: str
    model: nn.Module
    size: tuple[int, int]
    card: dict[str, Any]
    methods: tuple[Method, ...]


def setting(name: str, weights: Path | None, patterns: Iterable[str] = ("*",)) -> Setting:
    """Build a model and choose its methods.

    Args:
        name: one of ``MODELS``.
        weights: folder of <name>.safetensors and <name>.json, as train.py writes them; None for the demo weights.
        patterns: of the methods' names, as in a shell.

    Raises:
        FileNotFoundError: no such weights.
    """
    from mamba_attn import models
    from mamba_attn.models import registry

    if weights is None:
        card, model = registry.demo_card(name), models.create(name, weights="demo")
    else:
        path = weights / f"{name}.safetensors"
        card = json.loads(path.with_suffix(".json").read_text())
        model = models.create(name, weights=path, **card["options"])
    family = name.split("_")[0]
    chosen = tuple(
        method
        for method in DEFAULTS + VARIANTS
        if family in method.families and any(fnmatch.fnmatchcase(str(method), pattern) for pattern in patterns)
    )
    height, width = model.image_size
    return Setting(name, model, (int(height), int(width)), card, chosen)
