"""Maps exactly as published code computes them, where that differs from the equations of its paper.

Classes of their own, as baselines to compare with; ``convention=`` and ``rule=`` of the exact methods name them. Each
says which code it follows; ``docs/how_it_works.md`` lists the differences.
"""

from collections.abc import Callable
from functools import partial

from mamba_attn.attribution.maps import TokenAttribution
from mamba_attn.attribution.published.hidden_mamba import (
    HiddenMambaAttentionRollout,
    HiddenMambaAttribution,
    HiddenMambaRawAttention,
)
from mamba_attn.attribution.published.implicit_unified import (
    UnifiedAttentionRollout,
    UnifiedMambaAttribution,
    UnifiedRawAttention,
)
from mamba_attn.attribution.published.true_matrices import Equation24, PublishedRecipe
from mamba_attn.attribution.published.vmamba_analysis import VMambaAnalysisMap, VMambaAnalysisRollout

__all__ = [
    "METHODS",
    "Equation24",
    "HiddenMambaAttentionRollout",
    "HiddenMambaAttribution",
    "HiddenMambaRawAttention",
    "PublishedRecipe",
    "UnifiedAttentionRollout",
    "UnifiedMambaAttribution",
    "UnifiedRawAttention",
    "VMambaAnalysisMap",
    "VMambaAnalysisRollout",
]

# what an option of an exact method stands for: called with (model, layers=...)
METHODS: dict[tuple[str, str], dict[str, Callable[..., TokenAttribution]]] = {
    ("RawAttention", "convention"): {
        "hidden_mamba": HiddenMambaRawAttention,
        "implicit_unified": UnifiedRawAttention,
        "vmamba_analysis": VMambaAnalysisMap,
        "vmamba_analysis_dt": partial(VMambaAnalysisMap, steps=True),
    },
    ("AttentionRollout", "convention"): {
        "hidden_mamba": HiddenMambaAttentionRollout,
        "implicit_unified": UnifiedAttentionRollout,
        "vmamba_analysis": VMambaAnalysisRollout,
        "vmamba_analysis_dt": partial(VMambaAnalysisRollout, steps=True),
    },
    ("MambaAttribution", "convention"): {
        "hidden_mamba": HiddenMambaAttribution,
        "implicit_unified": UnifiedMambaAttribution,
    },
    ("MambaAttribution", "rule"): {"paper": Equation24, "published_code": PublishedRecipe},
}
