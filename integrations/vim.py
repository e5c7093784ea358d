"""Vim (arXiv 2401.09417), its forks, and Mamba-Reg (arXiv 2405.14858): Mamba mixers that may run in both directions."""

from typing import Any, ClassVar

from torch import nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models import vim_mixer
from mamba_attn.tracing.adapters import Seen, has_parts

from .mamba import MambaAdapter

_MARKS = ("A_b_log", "bimamba_type", "biscan")


class VimAdapter(MambaAdapter):
    """Mixers with Vim's names: bimamba_type v1, v2 or none, with or without division of the summed directions."""

    family: ClassVar[str] = "Vim"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has projections, and attributes of a second direction."""
        projections = has_parts(module, ("in_proj", "out_proj"))
        return projections and any(has_parts(module, (name,)) for name in _MARKS)

    def project(self, module: nn.Module, *args: Any, rules: Rules, seen: Seen, **kwargs: Any) -> ScanRecord:
        """Return everything before the scans, and warn if the model's own code skips one of them."""
        if hasattr(module, "A_b_log") and len(vim_mixer.scans(module)) == 1:
            seen.warn_once(
                f"{type(module).__name__} has use_fast_path=False: Vim's own code then runs the forward direction "
                "alone and halves nothing, and so does this trace. Set use_fast_path = True on its mixers for both."
            )
        return super().project(module, *args, rules=rules, seen=seen, **kwargs)


ADAPTER = VimAdapter()
