"""Mamba (arXiv 2312.00752) with mamba_ssm's names: one direction, from the first token to the last.

mamba_ssm's own mixer, transformers' and those of mamba.py and mamba-minimal have these names.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import vim_mixer
from mamba_attn.tracing import patch_embedding
from mamba_attn.tracing.adapters import Adapter, LayoutSource, Seen, has_parts

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")


@dataclass(frozen=True)
class MambaAdapter(Adapter):
    """Mixers with exactly mamba_ssm's names, on the fast path or off it.

    Args:
        normed: whether dt, B and C are normed, as mamba.py may.
    """

    family: ClassVar[str] = "Mamba"
    normed: bool = False

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has the parts of a Mamba mixer."""
        return has_parts(module, _PARTS)

    def alternatives(self, module: nn.Module) -> "Iterable[MambaAdapter]":
        """Return the adapter without norms, and with them where the module has some."""
        return (self, replace(self, normed=True)) if hasattr(module, "dt_layernorm") else (self,)

    def project(self, module: nn.Module, *args: Any, rules: Rules, seen: Seen, **kwargs: Any) -> ScanRecord:
        """Return everything before the scans, from the first argument of the mixer's forward, and ``orders``.

        Raises:
            UnsupportedModelError: an input that is not (batch, tokens, features).
        """
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        x = next(iter(given.values()))
        if not isinstance(x, Tensor) or x.ndim != 3:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} got an input of shape {shape}; this adapter "
                "knows (batch, tokens, features)."
            )
        layout = seen.layout if seen.layout is not None and seen.layout.tokens == x.shape[1] else None
        return vim_mixer.project(module, x, orders=given.get("orders"), rules=rules, layout=layout, normed=self.normed)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the gated, projected output."""
        return vim_mixer.finish(module, record, y, rules)

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_proj, which receives the gated sum of the directions."""
        gated = y if record.gate is None else y * record.gate
        out_proj: nn.Module = module.get_submodule("out_proj")
        return out_proj, gated.mT

    def layout_sources(self, model: nn.Module) -> Iterable[LayoutSource]:
        """Return the patch embedding and the first layer, if the model has them."""
        return patch_embedding.layout_sources(model)


ADAPTER = MambaAdapter()
