"""VMamba (arXiv 2401.10166): SS2D, four routes over the grid of each stage."""

from typing import ClassVar

from torch import Tensor, nn

from mamba_attn.adapters import Adapter, Seen
from mamba_attn.models import ss2d
from mamba_attn.rules import Rules
from mamba_attn.scan import ScanRecord

_PARTS = ("in_proj", "out_proj", "out_norm", "A_logs", "Ds", "dt_projs_bias")


class VMambaAdapter(Adapter):
    """Mixers with SS2D's parameter names, of either naming scheme."""

    family: ClassVar[str] = "VMamba"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has SS2D's parameters."""
        return all(hasattr(module, name) for name in _PARTS)

    def refusal(self, module: nn.Module, model: nn.Module) -> str | None:
        """Refuse scalar A per head (m0) and route counts that the cross-scan does not have."""
        if module.get_parameter("Ds").ndim != 1:
            return "it is the Mamba-2 variant (m0), which this adapter does not know."
        routes = module.get_parameter("dt_projs_bias").shape[0]
        if routes != ss2d.ROUTES:
            return f"it has {routes} routes; the cross-scan has {ss2d.ROUTES}."
        return None

    def project(self, module: nn.Module, x: Tensor, *, rules: Rules, seen: Seen) -> ScanRecord:
        """Return everything before the scans."""
        height, width = x.shape[1:3]
        layout = seen.layout
        if layout is None or layout.grid != (height, width):
            layout = seen.grid_layout(height, width)
        own = getattr(module, "routes", None)  # our SS2D knows its patch order
        orders = own(height, width) if callable(own) else None
        return ss2d.project(module, x, orders=orders, rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the normed, gated, projected output."""
        return ss2d.finish(module, record, y, rules)

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_norm, which receives the sum of the routes."""
        if record.layout is None:
            raise ValueError("scan_output(record): the record has no layout.")
        grid = (record.batch, *record.layout.grid, record.channels)
        return module.get_submodule("out_norm"), y.mT.reshape(grid)


ADAPTER = VMambaAdapter()
