"""Pictures: pure functions of arrays that return plotly figures, or RGB arrays (``overlay_rgb``, ``figures.png``).

Each is imported on first use: ``colours`` and ``picture`` need only numpy, because the core uses them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba_attn.figures import png
    from mamba_attn.figures.charts import reach, state_trajectory
    from mamba_attn.figures.heatmaps import depth_grid, layer_grid, matrix, overlay, volume
    from mamba_attn.figures.patch_grid import patch_view, scan_path
    from mamba_attn.figures.png import overlay_rgb
    from mamba_attn.figures.points import embedding
    from mamba_attn.figures.rescale import shown
    from mamba_attn.figures.text import depths, to_bertviz, token_grid, tokens

__all__ = [
    "depth_grid",
    "depths",
    "embedding",
    "layer_grid",
    "matrix",
    "overlay",
    "overlay_rgb",
    "patch_view",
    "png",
    "reach",
    "scan_path",
    "shown",
    "state_trajectory",
    "to_bertviz",
    "token_grid",
    "tokens",
    "volume",
]
_WHERE = {
    "depth_grid": "heatmaps",
    "depths": "text",
    "embedding": "points",
    "layer_grid": "heatmaps",
    "matrix": "heatmaps",
    "overlay": "heatmaps",
    "overlay_rgb": "png",
    "patch_view": "patch_grid",
    "reach": "charts",
    "scan_path": "patch_grid",
    "shown": "rescale",
    "state_trajectory": "charts",
    "to_bertviz": "text",
    "token_grid": "text",
    "tokens": "text",
    "volume": "heatmaps",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_WHERE.get(name, name)}")
    except ImportError as error:
        raise ImportError(f"figures.{name} needs plotly: pip install 'mamba_attn[viz]'") from error
    return module if name not in _WHERE else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
