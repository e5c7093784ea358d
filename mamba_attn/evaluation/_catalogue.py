"""The methods of mamba_attn.attribution by name, until that package has its own list of the same shape."""

from typing import Any

from captum.attr import Attribution
from torch import nn

from mamba_attn.adapters import AttentionAdapter, find_mixers
from mamba_attn.attribution import AttentionRollout, MambaAttribution, RawAttention, TransformerAttribution

METHODS: dict[str, Any] = {
    "raw_attention": RawAttention,
    "attention_rollout": AttentionRollout,
    "mamba_attribution": MambaAttribution,
    "transformer_attribution": TransformerAttribution,
}
_ONLY_FOR = {"mamba_attribution": "selective scans", "transformer_attribution": "softmax attention"}


def build(name: str, model: nn.Module) -> Attribution:
    """Return a method on a model."""
    return METHODS[name](model)


def refusal(name: str, model: nn.Module, called: str | None = None) -> str | None:
    """Return why a method does not fit a model, and which would; None where it fits."""
    softmax = all(isinstance(adapter, AttentionAdapter) for _, adapter in find_mixers(model).values())
    kind = "softmax attention" if softmax else "selective scans"
    if _ONLY_FOR.get(name, kind) == kind:
        return None
    other = next(method for method, its in _ONLY_FOR.items() if its == kind)
    return f"{called or type(model).__name__} is made of {kind}; use {other}."
