"""Mixers of transformers' language models, and mamba_ssm's Mamba-2.

Mamba's in Mamba, Falcon Mamba and Jamba; Zamba's; Mamba-2's in Mamba-2, Bamba, Zamba2, Nemotron H, Granite 4 and Falcon
H1. Versions differ in where they set padding to zero; the place whose output is the module's own is used.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mamba_attn.core.rules import PLAIN, Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import mamba2_mixer, vim_mixer, zamba_mixer
from mamba_attn.tracing.adapters import Adapter, Seen, has_parts
from mamba_attn.tracing.texts import ONE_EACH, SEVERAL

_PARTS = ("in_proj", "conv1d", "A_log", "D", "out_proj", "act")
_EQUATIONS = {
    ("x_proj", "dt_proj", "time_step_rank"): vim_mixer,
    ("x_proj_weight", "dt_proj_weight", "dt_proj_bias"): zamba_mixer,
    ("dt_bias", "n_groups", "num_heads"): mamba2_mixer,
    ("dt_bias", "ngroups", "nheads", "headdim"): mamba2_mixer,  # mamba_ssm's
}


@dataclass(frozen=True)
class LanguageAdapter(Adapter):
    """Mixers with transformers' or mamba_ssm's names.

    Args:
        masked: where padding is set to zero, see ``vim_mixer.MASKED``.
    """

    family: ClassVar[str] = "Mamba of language models"
    masked: tuple[str, ...] = vim_mixer.MASKED[0]

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has the parts of such a mixer."""
        return has_parts(module, _PARTS) and any(has_parts(module, names) for names in _EQUATIONS)

    def alternatives(self, module: nn.Module) -> "Iterable[LanguageAdapter]":
        """Yield an adapter for every place at which versions set padding to zero."""
        return (LanguageAdapter(masked) for masked in vim_mixer.MASKED)

    def project(self, module: nn.Module, *args: Any, rules: Rules, seen: Seen, **kwargs: Any) -> ScanRecord:
        """Return everything before the scan, from the first argument of the mixer's forward and ``attention_mask``.

        Raises:
            UnsupportedModelError: several texts in one row.
        """
        given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        x, named = next(iter(given.values())), {**given, **given.get("kwargs", {})}
        packed = [name for name in SEVERAL if named.get(name) is not None]
        if packed:
            raise UnsupportedModelError(f"it is called with {packed[0]}, {ONE_EACH}")
        real = named.get("attention_mask")
        real = real if isinstance(real, Tensor) and real.shape == x.shape[:2] else None
        layout = seen.layout if seen.layout is not None and seen.layout.tokens == x.shape[1] else None
        equations = _equations(module)
        options: dict[str, Any] = {"rules": rules, "layout": layout, "real": real, "masked": self.masked}
        options |= {"normed": True} if equations is vim_mixer else {}
        record: ScanRecord = equations.project(module, x, **options)
        return record

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the gated, projected output; in Mamba-2 normed behind the gate."""
        if _equations(module) is mamba2_mixer:
            return mamba2_mixer.finish(module, record, y, rules)
        return vim_mixer.finish(module, record, y, rules)

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_proj, which receives the scan after its gate, and in Mamba-2 after its norm."""
        if _equations(module) is mamba2_mixer:
            return module.get_submodule("out_proj"), mamba2_mixer.normed(module, record, y, PLAIN)
        return module.get_submodule("out_proj"), (y if record.gate is None else y * record.gate).mT


def _equations(module: nn.Module) -> Any:
    return next(equations for names, equations in _EQUATIONS.items() if has_parts(module, names))


ADAPTER = LanguageAdapter()
