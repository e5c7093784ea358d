"""Shows plotly's figures in the gallery's pages, with one plotly.js for all of them and none from a network."""

import ast
import textwrap
from pathlib import Path
from typing import Any

import plotly
from plotly.basedatatypes import BaseFigure
from plotly.io import to_html
from plotly.io._sg_scraper import plotly_sg_scraper

SCRIPT = "plotly.min.js"


def scraper(block: tuple[str, str, int], block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Return what shows the figure at the end of a block; plotly's own scraper draws its picture, for thumbnails.

    Args:
        block: label, code and line number.
        block_vars: the block's variables.
        gallery_conf: of sphinx-gallery.
    """
    plotly_sg_scraper(block, block_vars, gallery_conf)
    figure = block_vars["example_globals"].get("___")
    body = ast.parse(block[1]).body
    if not isinstance(figure, BaseFigure) or not body or not isinstance(body[-1], ast.Expr):
        return ""
    page = to_html(figure, full_html=False, include_plotlyjs=False, include_mathjax=False)
    script = f'<script src="../_static/{SCRIPT}"></script>'
    return "\n.. raw:: html\n\n" + textwrap.indent(f'{script}<div class="figure">{page}</div>', "    ") + "\n"


def add_script(app: Any, error: Exception | None) -> None:
    """Copy plotly.js from the installed package into the site."""
    if error is None and app.builder.format == "html":
        source = Path(plotly.__file__).parent / "package_data" / SCRIPT
        (Path(app.outdir) / "_static" / SCRIPT).write_bytes(source.read_bytes())


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("build-finished", add_script)
    return {"parallel_read_safe": False}
