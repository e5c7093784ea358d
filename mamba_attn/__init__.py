"""Exact hidden attention of vision Mamba models, from forward hooks, as explanations and pictures.

Names and rooms (``mamba_attn.trace``, ``mamba_attn.attribution``, ...) are imported when they are first asked for, so
that ``mamba-attn --help`` need not wait for torch.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_attn.core import torchvision_repair
from mamba_attn.errors import MambaAttnError, nearest

if TYPE_CHECKING:
    from mamba_attn import analytics as analytics
    from mamba_attn import attribution as attribution
    from mamba_attn import datasets as datasets
    from mamba_attn import distributed as distributed
    from mamba_attn import erf as erf
    from mamba_attn import errors as errors
    from mamba_attn import evaluation as evaluation
    from mamba_attn import explanations as explanations
    from mamba_attn import figures as figures
    from mamba_attn import findings as findings
    from mamba_attn import images as images
    from mamba_attn import models as models
    from mamba_attn import ops as ops
    from mamba_attn import orders as orders
    from mamba_attn import stand_ins as stand_ins
    from mamba_attn import testing as testing
    from mamba_attn import tracing as tracing
    from mamba_attn import viewer as viewer
    from mamba_attn.commands.functions import collect, compare, explore
    from mamba_attn.core.attention_record import AttentionRecord
    from mamba_attn.core.layout import TokenLayout
    from mamba_attn.core.loaded_model import LoadedModel
    from mamba_attn.core.scan_record import ScanRecord
    from mamba_attn.core.transform import Transform
    from mamba_attn.datasets.loading import load
    from mamba_attn.explanations.explaining import explain
    from mamba_attn.ops import (
        attention_column,
        attention_row,
        hidden_attention,
        left_product,
        right_product,
        selective_scan,
    )
    from mamba_attn.stand_ins import cpu_stand_ins
    from mamba_attn.tracing.adapters import Adapter, AttentionAdapter, register_adapter
    from mamba_attn.tracing.interventions import knockout, replace_attention
    from mamba_attn.tracing.tracer import Trace, trace

__version__ = "0.2.0"

__all__ = [
    "Adapter",
    "AttentionAdapter",
    "AttentionRecord",
    "LoadedModel",
    "MambaAttnError",
    "ScanRecord",
    "TokenLayout",
    "Trace",
    "Transform",
    "attention_column",
    "attention_row",
    "collect",
    "compare",
    "cpu_stand_ins",
    "explain",
    "explore",
    "hidden_attention",
    "knockout",
    "left_product",
    "load",
    "models",
    "ops",
    "orders",
    "register_adapter",
    "replace_attention",
    "right_product",
    "selective_scan",
    "trace",
]

_HOMES = {
    "commands.functions": ("collect", "compare", "explore"),
    "core.attention_record": ("AttentionRecord",),
    "core.layout": ("TokenLayout",),
    "core.loaded_model": ("LoadedModel",),
    "core.scan_record": ("ScanRecord",),
    "core.transform": ("Transform",),
    "datasets.loading": ("load",),
    "explanations.explaining": ("explain",),
    "ops": (
        "attention_column", "attention_row", "hidden_attention", "left_product", "right_product", "selective_scan",
    ),
    "stand_ins": ("cpu_stand_ins",),
    "tracing.adapters": ("Adapter", "AttentionAdapter", "register_adapter"),
    "tracing.interventions": ("knockout", "replace_attention"),
    "tracing.tracer": ("Trace", "trace"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_ROOMS = (
    "analytics",
    "attribution",
    "commands",
    "core",
    "datasets",
    "distributed",
    "erf",
    "errors",
    "evaluation",
    "explanations",
    "figures",
    "findings",
    "images",
    "integrations",
    "models",
    "ops",
    "orders",
    "stand_ins",
    "testing",
    "tracing",
    "viewer",
)

torchvision_repair.install()

_HERE = Path(__file__).parent
if not (_HERE / "integrations").is_dir():
    # in a checkout, integrations/ and cuda/ stand next to this package; in a wheel they are inside it
    __path__.append(str(_HERE.parent))

if not TYPE_CHECKING:  # for a type checker, a module with __getattr__ has every name

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"mamba_attn.{name}")
        if name in _HOME_OF:
            found = getattr(importlib.import_module(f"mamba_attn.{_HOME_OF[name]}"), name)
            globals()[name] = found
            return found
        hint = "" if name.startswith("__") else f" {nearest(name, [*__all__, *_ROOMS])}"
        raise AttributeError(f"mamba_attn has no {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS, *(name for name in globals() if name.startswith("__"))})
