"""The look that every figure shares; plotly's global template is neither used nor set."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import plotly.graph_objects as go

from mamba_attn.figures.colours import INK

FONT = {"family": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": INK}


class Figure(go.Figure):  # type: ignore[misc]
    """A plotly figure that shows itself without a network.

    In a notebook plotly's renderers show figures and bring their script along, if nbformat is installed. Plotly's
    ``_repr_html_`` names an address to load it from instead; here the script is inside, 4.5 MB.
    """

    def _repr_html_(self) -> str:
        return str(self.to_html(full_html=False, include_plotlyjs=True))

    def _ipython_display_(self) -> None:
        if find_spec("nbformat"):
            super()._ipython_display_()
        else:  # plotly's renderers raise
            import_module("IPython.display").display_html(self._repr_html_(), raw=True)


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
