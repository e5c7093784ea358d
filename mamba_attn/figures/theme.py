"""The look that every figure shares; plotly's global template is neither used nor set."""

from typing import Any

import plotly.graph_objects as go

from mamba_attn.figures.colours import INK

FONT = {"family": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": INK}


def plain(figure: go.Figure, *, title: str | None, width: int, height: int) -> go.Figure:
    """Return the figure without template: white, small margins."""
    figure.layout.template = go.layout.Template()  # whatever plotly.io.templates.default says
    return figure.update_layout(
        title={"text": title, "x": 0.5, "xanchor": "center"} if title else None,
        font=FONT, paper_bgcolor="white", plot_bgcolor="white", width=width, height=height,
        margin={"l": 50, "r": 20, "t": 50 if title else 20, "b": 45},
    )  # fmt: skip


def square_cells(figure: go.Figure, **where: Any) -> None:
    """Row 0 on top, cells square, no lines."""
    figure.update_xaxes(showgrid=False, zeroline=False, constrain="domain", **where)
    figure.update_yaxes(showgrid=False, zeroline=False, constrain="domain", autorange="reversed", **where)
