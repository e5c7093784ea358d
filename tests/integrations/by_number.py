"""What a trace says of a mixer: that its adapter computes it, or by how much it does not."""

from typing import Any

import torch
from torch import nn

import mamba_attn
from mamba_attn.errors import UnsupportedModelError


def refusal(model: nn.Module, *args: Any) -> str | None:
    """The sentence with which a trace of a model refuses it, or None."""
    try:
        with torch.no_grad(), mamba_attn.trace(model):
            model(*args)
    except UnsupportedModelError as error:
        return str(error)
    return None


def differs(name: str, kind: str, family: str) -> str:
    """What a refusal by number says, as a pattern."""
    return (
        rf"^{name} \({kind}, family {family}\): what this adapter computes differs from what the module itself returns "
        r"by [\d.]+ \(relative; 1(\.\d)?e-05 is allowed\)\. None of its scans goes through a door"
    )
