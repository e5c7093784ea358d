"""Which layers a trace of a model finds, and of what kind: by its adapters where they know them all, else by a pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mamba_attn.tracing.adapters import AttentionAdapter, find_mixers
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.tracing.reachable import reaches_a_door, reaches_attention
from mamba_attn.tracing.softmax_layers import AttentionLayer
from mamba_attn.tracing.tracer import trace

SCANS, SOFTMAX = ScanLayer.kind, AttentionLayer.kind


def layer_kinds(model: nn.Module, run: Callable[[], object], **given: Any) -> dict[str, str]:
    """Return the kind of every layer, "selective scans" or "softmax attention", by the layers' names, first to last.

    Args:
        model: any.
        run: calls the model once; needed where scans or attention are seen only while it runs.
        given: further arguments of ``trace``.

    Raises:
        UnsupportedModelError: there is no layer, or one that is refused.
    """
    mixers = find_mixers(model)
    adapted = [module for module, _ in mixers.values()]
    if mixers and not reaches_a_door(model) and not reaches_attention(model, adapted):
        return {name: SOFTMAX if isinstance(its, AttentionAdapter) else SCANS for name, (_, its) in mixers.items()}
    with torch.no_grad(), trace(model, **given) as record:
        run()
    return {layer.name: layer.kind for layer in record.layers}
