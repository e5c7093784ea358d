"""Matrices of TransformerLens and ours, of the same Mamba and Mamba-2 with random weights: difference, time and memory.

    pip install transformer-lens; python benchmarks/run.py lens

Its ``compute_effective_attention`` makes one matrix per channel (Mamba) or head (Mamba-2) from a cache of activations,
and so does our fold "each"; both are timed with the pass that they read, its own with ``eager_scan``. "each"
computes a head's matrix once, and then copies it to every channel of the head.
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language_models import VOCABULARY, build, quiet
from benchmarks.measure import Spread, interleave, paired, peak_memory
from benchmarks.report import Figure, figure
from mamba_attn import trace

SIZES = {
    "Mamba": {"hidden_size": 64, "state_size": 16, "time_step_rank": 4},
    "Mamba2": {"hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 64},
}
TOKENS = 128


def bridged(model: nn.Module, name: str) -> Any:
    """TransformerLens around a copy of a model, which it changes."""
    builder = importlib.import_module("transformer_lens.model_bridge.sources._bridge_builder")
    own: Any = copy.deepcopy(model)
    found = builder.build_bridge_from_module(own, f"{name}ForCausalLM", hf_config=own.config, device="cpu")
    for block in found.blocks:
        block.mixer.eager_scan = True  # else transformers 5 calls no module that it hooks
    return found


def matrices(name: str, whose: str, tokens: int, **options: Any) -> Callable[[], list[Tensor]]:
    """A pass and all of its matrices, (batch, channels or heads, tokens, tokens) each."""
    quiet()
    model = build(name, **(options or SIZES[name]))
    ids = torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = bridged(model, name) if whose == "theirs" else None

    def theirs() -> list[Tensor]:
        scaled = {"include_dt_scaling": True}
        with torch.no_grad():
            cache = lens.run_with_cache(ids)[1]
            return [b.mixer.compute_effective_attention(cache, i, **scaled) for i, b in enumerate(lens.blocks)]

    def ours() -> list[Tensor]:
        with torch.no_grad(), trace(model, attention=None) as record:
            model(ids, use_cache=False)
        step = 1 if name == "Mamba" else SIZES[name]["head_dim"]  # the channels of a head have one matrix
        return [layer.attention("each")[:, ::step] for layer in record.layers]

    return theirs if lens is not None else ours


def run_lens(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Both models."""
    tokens, details, figures = 16 if quick else TOKENS, {"transformer_lens": version("transformer-lens")}, []
    for name in SIZES:
        calls = {whose: matrices(name, whose, tokens) for whose in ("theirs", "ours")}
        both = zip(calls["ours"](), calls["theirs"](), strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in both)
        times = interleave(calls, 2 if quick else 5)
        arguments = [{"name": name, "whose": whose, "tokens": tokens} for whose in calls]
        memory = {each["whose"]: peak_memory("benchmarks.lens:matrices", **each) for each in arguments}
        how = f"{name}, {tokens} tokens"
        figures += [
            figure("lens", how, error),
            figure("lens time", how, paired(times["ours"], times["theirs"])),
            figure("lens memory", how, memory["ours"] / memory["theirs"]),
        ]
        milliseconds = {whose: Spread.of([1e3 * t for t in sample]) for whose, sample in times.items()}
        details[name] = {"error": error, "milliseconds": milliseconds, "bytes": memory, **SIZES[name]}
    return figures, details
