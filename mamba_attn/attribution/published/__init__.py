"""Maps exactly as published code computes them, where that differs from the equations of its paper.

Classes of their own, as baselines to compare with; ``convention=`` and ``rule=`` of the exact methods name them. Each
says which code it follows; ``docs/how_it_works.md`` lists the differences.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature

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
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.errors import nearest

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

_TRACED = ("layers", "layout", "orders")  # options of tracing, which published methods know too


def named(method: TokenAttribution, kind: type[TokenAttribution], option: str) -> TokenAttribution | None:
    """Return the method that an option of an exact one names; None for the default, the exact method itself.

    Published code has no other options, so naming it excludes all of them.

    Args:
        method: the exact method.
        kind: class that defines the options; each is also an attribute of the same name.
        option: "convention" or "rule".

    Raises:
        ValueError: the value names no method, or other options are given too.
    """
    options = [each for each in signature(kind.__init__).parameters.values() if each.name not in _TRACED]
    default = {each.name: each.default for each in options if each.kind is each.KEYWORD_ONLY}
    value, methods = getattr(method, option), METHODS[kind.__name__, option]
    if value == default[option]:
        return None
    call = f"{kind.__name__}({option}={value!r}"
    if value not in methods:
        raise ValueError(f"{call}): no such {option}. {nearest(value, [default[option], *methods])}")
    changed = ", ".join(
        f"{name}={getattr(method, name)!r}"
        for name, normal in default.items()
        if name != option and getattr(method, name) != normal
    )
    if changed:
        raise ValueError(
            f"{call}, {changed}): {option}={value!r} is published code, which has no such option; leave {changed} "
            f"out, or {option}={value!r}."
        )
    found = methods[value](method.model, layers=method.layers)
    found.layout, found.orders = method.layout, method.orders
    found.called = f"{call})"
    return found
