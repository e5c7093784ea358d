"""VMamba (arXiv 2401.10166) and the forks of its code: SS2D, four routes over the grid of each stage.

VMamba's variants and the forks of its code give the same names to their parameters and differ in their equations: in
the routes, in what the norm behind the scans gets, and in where they round. These are the adapter's alternatives.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from torch import Tensor, nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import ss2d
from mamba_attn.tracing.adapters import Adapter, Seen, has_parts


@dataclass(frozen=True)
class VMambaAdapter(Adapter):
    """Mixers with SS2D's parameter names, of either naming scheme, channels first or last.

    Args:
        scan: "cross", "one way" or "both ways".
        norm_frame: as in ``ss2d.finish``.
        precision: as in ``ss2d.finish``.
    """

    family: ClassVar[str] = "VMamba"
    scan: str = "cross"
    norm_frame: str | None = None
    precision: str = "norm"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has SS2D's parameters."""
        return has_parts(module, ("A_logs", "Ds", "dt_projs_bias"))

    def alternatives(self, module: nn.Module) -> Iterable["VMambaAdapter"]:
        """Return what SS2D's variants compute: other roundings first, then other frames of the norm, then routes."""
        choices = product(
            ("cross", "both ways", "one way"), (None, "flat", "last", "first"), ("norm", "features", "scan")
        )
        return (VMambaAdapter(*choice) for choice in choices)

    def project(self, module: nn.Module, x: Tensor, *, rules: Rules, seen: Seen, **ignored: Any) -> ScanRecord:
        """Return everything before the scans; like SS2D, ignores other keyword arguments.

        Raises:
            UnsupportedModelError: an input that is not a grid of tokens, or parameters of another mixer.
        """
        _check_shapes(module)
        if x.ndim != 4:
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} got an input of shape {tuple(x.shape)}; this adapter "
                "knows (batch, height, width, features), or features first where the module's channel_first is true."
            )
        x = x.movedim(1, 3) if _channel_first(module) else x
        height, width = x.shape[1:3]
        layout = seen.layout
        if layout is None or layout.grid != (height, width):
            layout = seen.grid_layout(height, width)
        return ss2d.project(module, x, orders=self._orders(module, height, width, x), rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the normed, gated, projected output."""
        output = ss2d.finish(module, record, y, rules, norm_frame=self.norm_frame, precision=self.precision)
        return output.movedim(3, 1) if _channel_first(module) else output

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_norm, which receives the sum of the routes."""
        frame = ss2d.frame_of_norm(module, self.norm_frame)
        return module.get_submodule("out_norm"), ss2d.framed(record.on_grid(y), frame)

    def _orders(self, module: nn.Module, height: int, width: int, x: Tensor) -> Tensor:
        """Return the token visited at each step of the four routes."""
        if isinstance(module, ss2d.SS2D):
            return module.routes(height, width)
        if self.scan == "cross":
            return ss2d.cross_scan(height, width, x.device)
        return ss2d.raster_scan(height, width, x.device, self.scan == "both ways")


def _channel_first(module: nn.Module) -> bool:
    """Whether the module gets and returns (batch, channels, height, width); ours says so of its submodules alone."""
    return bool(getattr(module, "channel_first", False)) and not isinstance(module, ss2d.SS2D)


def _check_shapes(module: nn.Module) -> None:
    """Raise UnsupportedModelError for parameters that are not those of four routes of scalar states per channel."""
    parts: Any = module
    if parts.Ds.ndim != 1:
        raise UnsupportedModelError("its Ds has more than one axis, as that of the Mamba-2 variant (m0).")
    routes = parts.dt_projs_bias.shape[0] if parts.dt_projs_bias.ndim == 2 else 1
    if routes != ss2d.ROUTES:
        raise UnsupportedModelError(f"it has {routes} routes; the cross-scan has {ss2d.ROUTES}.")
    if parts.A_logs.ndim != 2 or not len(parts.A_logs) == len(parts.Ds) == parts.dt_projs_bias.numel():
        raise UnsupportedModelError("its routes share A_logs or Ds.")


ADAPTER = VMambaAdapter()
