"""The methods of mamba_attn.attribution by name, until that package has its own list of the same shape."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from captum.attr import Attribution
from torch import nn

from mamba_attn.adapters import AttentionAdapter, find_mixers
from mamba_attn.attribution import AttentionRollout, MambaAttribution, RawAttention, TransformerAttribution


@dataclass(frozen=True)
class Entry:
    """A method.

    Args:
        make: builds it on a model.
        softmax: whether it is for softmax attention, for selective scans, or for both (None).
        instead: the method for the other kind.
    """

    make: Callable[[nn.Module], Any]
    softmax: bool | None = None
    instead: str = ""

    def build(self, model: nn.Module) -> Attribution:
        """Return the method on a model."""
        return self.make(model)

    def misfit(self, model: nn.Module) -> str | None:
        """Return why it does not fit the model, and which would; None if it does."""
        softmax = all(isinstance(adapter, AttentionAdapter) for _, adapter in find_mixers(model).values())
        if self.softmax in (None, softmax):
            return None
        kinds = ("selective scans", "softmax attention")
        return f"it is for {kinds[not softmax]}, and this model is made of {kinds[softmax]}; use {self.instead}."


ENTRIES: dict[str, Entry] = {
    "RawAttention": Entry(RawAttention),
    "AttentionRollout": Entry(AttentionRollout),
    "MambaAttribution": Entry(MambaAttribution, False, "TransformerAttribution"),
    "TransformerAttribution": Entry(TransformerAttribution, True, "MambaAttribution"),
}
