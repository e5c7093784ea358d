"""The models that train.py trains: those of mamba_attn.models, from its own checkpoints too."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn


def create(
    name: str,
    *,
    num_classes: int,
    image_size: int,
    drop_path: float = 0.0,
    weights: str | None = None,
    part: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a model, from weights of any resolution if given.

    Args:
        name: see ``mamba_attn.models.create``.
        num_classes: outputs.
        image_size: in pixels.
        drop_path: rate of stochastic depth.
        weights: a .safetensors file, or last.pt of a run (its averaged weights).
        part: the weights are of a deeper model, or of other classes: take what has a place, leave the rest random.
        options: further options of the model.
    """
    import mamba_attn.models

    with tempfile.TemporaryDirectory() as folder:
        options |= {"num_classes": num_classes, "image_size": image_size, "drop_path": drop_path}
        if weights is not None and (part or Path(weights).suffix == ".pt"):  # a checkpoint holds more than weights
            from safetensors.torch import save_file

            state = read(weights)
            if part:
                own = mamba_attn.models.create(name, **options).state_dict()
                state = {key: _placed(key, state.get(key), value) for key, value in own.items()}
            weights = f"{folder}/weights.safetensors"
            save_file({key: value.contiguous() for key, value in state.items()}, weights)
        model = mamba_attn.models.create(name, weights=weights, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the fused backward is no gain in half precision on a CPU
    return model


def _placed(key: str, given: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
    """The given weights where they have a place (position embeddings are interpolated later), else the model's own."""
    return own if given is None or (given.shape != own.shape and key != "pos_embed") else given


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """Weights of a safetensors file, or the averaged weights of a checkpoint, in float32."""
    if Path(path).suffix == ".pt":
        state = torch.load(path, weights_only=True)["ema"]
    else:
        from safetensors.torch import load_file

        state = load_file(path)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of timm: no decay on vectors, nor on what ``model.no_weight_decay()`` names."""
    from timm.optim import param_groups_weight_decay

    names = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)


def muon_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups for timm's Muon: matrices that decay are Muon's, all else (vectors, taps, A) is AdamW's."""
    found: list[dict[str, Any]] = []
    for group in groups:
        for matrices in (True, False):
            chosen = [p for p in group["params"] if (p.ndim == 2 and group["weight_decay"] > 0) is matrices]
            if chosen:
                found.append({**group, "params": chosen, "use_fallback": not matrices})
    return found
