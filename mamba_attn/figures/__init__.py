"""Pictures: pure functions of arrays that return plotly figures, or RGB arrays (``mamba_attn.figures.png``).

Imported on demand only, because it needs plotly.
"""

try:
    import PIL  # noqa: F401
    import plotly.graph_objects  # noqa: F401
except ImportError as error:
    raise ImportError("mamba_attn.figures needs plotly and Pillow: pip install 'mamba_attn[viz]'") from error

from mamba_attn.figures.depth import depth_grid
from mamba_attn.figures.embedding import embedding
from mamba_attn.figures.layers import layer_grid
from mamba_attn.figures.matrix import matrix
from mamba_attn.figures.overlay import overlay
from mamba_attn.figures.patch_view import patch_view
from mamba_attn.figures.reach import reach
from mamba_attn.figures.roofline import roofline
from mamba_attn.figures.scan_path import scan_path
from mamba_attn.figures.shown import shown
from mamba_attn.figures.state_trajectory import state_trajectory

__all__ = [
    "depth_grid", "embedding", "layer_grid", "matrix", "overlay", "patch_view", "reach", "roofline",
    "scan_path", "shown", "state_trajectory",
]  # fmt: skip
