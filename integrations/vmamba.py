"""VMamba (arXiv 2401.10166) and the forks of its code: SS2D, four routes over the grid of each stage."""

from typing import Any, ClassVar

from torch import Tensor, nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import ss2d
from mamba_attn.tracing.adapters import Adapter, Seen

from ._ss2d_variants import channel_first, check_parts, is_ours, variant


class VMambaAdapter(Adapter):
    """Mixers with SS2D's parameter names, of either naming scheme, channels first or last."""

    family: ClassVar[str] = "VMamba"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has SS2D's parameters."""
        return all(hasattr(module, name) for name in ("A_logs", "Ds", "dt_projs_bias"))

    def refusal(self, module: nn.Module, model: nn.Module) -> str | None:
        """Refuse what is not known to compute SS2D's equations."""
        try:
            check_parts(module)
            variant(module)
        except UnsupportedModelError as reason:
            return str(reason)
        return None

    def project(self, module: nn.Module, x: Tensor, *, rules: Rules, seen: Seen, **ignored: Any) -> ScanRecord:
        """Return everything before the scans; SS2D ignores other keyword arguments, too.

        Raises:
            UnsupportedModelError: an input that is not a grid of tokens.
        """
        if x.ndim != 4:
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} got an input of shape {tuple(x.shape)}; this adapter "
                "knows (batch, height, width, features), or features first where the module's channel_first is true."
            )
        x = x.movedim(1, 3) if channel_first(module) else x
        height, width = x.shape[1:3]
        layout = seen.layout
        if layout is None or layout.grid != (height, width):
            layout = seen.grid_layout(height, width)
        return ss2d.project(module, x, orders=_orders(module, height, width, x), rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the normed, gated, projected output."""
        _, frame, precision = variant(module)
        output = ss2d.finish(module, record, y, rules, norm_frame=frame, precision=precision)
        return output.movedim(3, 1) if channel_first(module) else output

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_norm, which receives the sum of the routes."""
        frame = ss2d.frame_of_norm(module, variant(module).norm_frame)
        return module.get_submodule("out_norm"), ss2d.framed(record.on_grid(y), frame)


def _orders(module: nn.Module, height: int, width: int, x: Tensor) -> Tensor:
    """The token visited at each step of the four routes."""
    if isinstance(module, ss2d.SS2D) and is_ours(module):
        return module.routes(height, width)
    scan = variant(module).scan
    if scan == "cross":
        return ss2d.cross_scan(height, width, x.device)
    return ss2d.raster_scan(height, width, x.device, scan == "both ways")


ADAPTER = VMambaAdapter()
