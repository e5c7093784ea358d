"""VSSD (arXiv 2407.18559) in its non-causal form, whose mixers sum over all tokens; its causal forms call a scan."""

from typing import ClassVar

from torch import Tensor, nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models import non_causal_mixer
from mamba_attn.tracing.adapters import Adapter, Seen, has_parts

_PARTS = ("in_proj", "conv2d", "act", "A_log", "dt_bias", "D", "norm", "out_proj", "ngroups", "ssd_positve_dA")


class VSSDAdapter(Adapter):
    """Mixers with VSSD's attribute names that are set to sum over all tokens."""

    family: ClassVar[str] = "VSSD"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has the parts of such a mixer, and calls no scan."""
        return has_parts(module, _PARTS) and bool(getattr(module, "linear_attn_duality", False))

    def project(
        self,
        module: nn.Module,
        u: Tensor,
        H: int,
        W: int,
        seq_idx: object = None,
        *,
        rules: Rules,
        seen: Seen,
    ) -> ScanRecord:
        """Return everything before the sum; the arguments are those of the mixer's forward, which ignores seq_idx."""
        height, width = int(H), int(W)
        layout = seen.layout
        if layout is None or layout.grid != (height, width):
            layout = seen.grid_layout(height, width)
        return non_causal_mixer.project(module, u, height, width, rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the normed, gated, projected output."""
        return non_causal_mixer.finish(module, record, y, rules)

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return the norm, which receives the sum over tokens."""
        return module.get_submodule("norm"), y.mT


ADAPTER = VSSDAdapter()
