"""Vim (arXiv 2401.09417): bidirectional mixers, class token in the middle, first or absent."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from mamba_attn.adapters import Adapter, LayoutSource, Seen
from mamba_attn.layout import TokenLayout
from mamba_attn.models import vim_mixer
from mamba_attn.rules import Rules
from mamba_attn.scan import ScanRecord

_PARTS = ["in_proj", "out_proj", "A_log", "D", "A_b_log", "D_b", "conv1d", "conv1d_b", "x_proj", "x_proj_b"]


class VimAdapter(Adapter):
    """Mixers with Vim's attribute names."""

    family: ClassVar[str] = "Vim"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has the parameters of both directions."""
        return all(hasattr(module, name) for name in _PARTS)

    def project(
        self, module: nn.Module, x: Tensor, orders: Tensor | None = None, *, inference_params: None = None,
        rules: Rules, seen: Seen,
    ) -> ScanRecord:  # fmt: skip
        """Return everything before the scans; the official blocks pass ``inference_params=None``."""
        layout = seen.layout if seen.layout is not None and seen.layout.tokens == x.shape[1] else None
        return vim_mixer.project(module, x, orders=orders, rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the gated, projected output."""
        return vim_mixer.finish(module, record, y, rules)

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_proj, which receives the gated sum of both directions."""
        gated = y if record.gate is None else y * record.gate
        out_proj: nn.Module = module.get_submodule("out_proj")
        return out_proj, gated.mT

    def layout_sources(self, model: nn.Module) -> Iterable[LayoutSource]:
        """Return the patch embedding's convolution: its output is the grid."""
        for module in model.modules():
            projection = getattr(getattr(module, "patch_embed", None), "proj", None)
            if isinstance(projection, nn.Conv2d) and hasattr(module, "layers"):
                return [LayoutSource(projection, _LayoutReader(module, projection))]
        return []


class _LayoutReader:
    def __init__(self, model: nn.Module, projection: nn.Conv2d) -> None:
        self.model = model
        self.projection = projection

    def __call__(self, seen: Seen, inputs: tuple[Any, ...], output: Tensor) -> TokenLayout:
        height, width = output.shape[-2:]
        place = getattr(self.model, "class_token", None)
        positions = {"middle": (height * width // 2,), "first": (0,)}.get(str(place), ())
        return TokenLayout(
            grid=(height, width), patch_size=self.projection.kernel_size[0], stride=self.projection.stride[0],
            class_tokens=positions,
        )  # fmt: skip


ADAPTER = VimAdapter()
