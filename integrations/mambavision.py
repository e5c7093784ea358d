"""MambaVision (arXiv 2407.08083): mixers that scan half of their channels, in windows.

Its attention has the attributes of timm's, so ``timm_vit`` handles it; this file adds the layout of its windows.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import mambavision_mixer
from mamba_attn.tracing.adapters import Adapter, LayoutSource, Seen, has_parts

_PARTS = ("in_proj", "conv1d_x", "conv1d_z", "x_proj", "dt_proj", "out_proj", "A_log", "D")
_STAGE = ("blocks", "window_size", "transformer_block")


class MambaVisionAdapter(Adapter):
    """Mixers with MambaVision's attribute names."""

    family: ClassVar[str] = "MambaVision"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has the parts of a scan, and a convolution for each half of the channels."""
        return has_parts(module, _PARTS)

    def project(self, module: nn.Module, hidden_states: Tensor, *, rules: Rules, seen: Seen) -> ScanRecord:
        """Return everything before the scans, one per window.

        Raises:
            UnsupportedModelError: an input that is not (batch, tokens, features).
        """
        if hidden_states.ndim != 3:
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} got an input of shape {tuple(hidden_states.shape)}; "
                "this adapter knows mixers over (batch, tokens, features)."
            )
        layout = seen.frame_of(module, *hidden_states.shape[:2])
        return mambavision_mixer.project(module, hidden_states, rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the projected output."""
        return mambavision_mixer.finish(module, record, y, rules)

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_proj, which receives the scan's output and the channels that went around it."""
        return module.get_submodule("out_proj"), mambavision_mixer.side_by_side(record, y)

    def layout_sources(self, model: nn.Module) -> Iterable[LayoutSource]:
        """Return the stages that cut their input into windows for their blocks; MambaVision's first two do not."""
        stages = [module for module in model.modules() if all(hasattr(module, name) for name in _STAGE)]
        return [
            LayoutSource(stage, _LayoutReader(stage), before=True, inside=True)
            for stage in stages
            if stage.transformer_block
        ]


class _LayoutReader:
    def __init__(self, stage: nn.Module) -> None:
        self.stage = stage

    def __call__(self, seen: Seen, inputs: tuple[Any, ...], output: Any) -> TokenLayout | None:
        x = inputs[0] if inputs else None
        window = self.stage.window_size
        if not isinstance(x, Tensor) or x.ndim != 4 or not isinstance(window, int):
            return None
        seen.batch = x.shape[0]  # a stage may be called alone
        return seen.grid_layout(x.shape[2], x.shape[3], window)


ADAPTER = MambaVisionAdapter()
