"""The page: its frame, style and script, and what it shows as data that no name in it can break out of."""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup

from mamba_attn.core.document import render
from mamba_attn.figures import colours
from mamba_attn.figures.patch_grid import THIN
from mamba_attn.viewer.report.budget import Content
from mamba_attn.viewer.report.content import gather
from mamba_attn.viewer.report.quantised import ERROR, STEPS

SCRIPTS = ("data.js", "colours.js", "points.js", "patches.js", "controls.js", "start.js")
KEYS = (
    ("← ↑ → ↓", "move the chosen patch, or to another block or image"), ("Esc", "clear selection"),
    ("r", "takes from / gives to"), ("[ ]", "previous, next block"), ("0 1 2 …", "sum, or a route"),
    ("m", "average / image"), ("v", "blocks / patches"), ("p", "path of the route"), ("- +", "steps of the path"),
    ("s", "sign of the values"),
)  # fmt: skip
_TITLE = "Attention between patches"
_PALETTES = {
    "viridis": colours.VIRIDIS,
    "cividis": colours.CIVIDIS,
    "signed": colours.BLUE_ORANGE,
    "path": colours.PATH,
    "kinds": colours.CATEGORIES,
}
_NOTE = (
    "Numbers are stored in 16 bits, with one scale per row of a matrix, so the error is at most "
    f"1/{round(1 / ERROR):,} of the largest number in the row."
)


def make(
    stores: Sequence[Any],
    methods: Sequence[str],
    images: int,
    size: float,
    made_with: str,
    advance: Callable[[str], None] = lambda what: None,
) -> tuple[str, Content]:
    """Return the page of some stores, and what it holds.

    Args:
        stores: ``AttentionStore`` objects.
        methods: of dimension reduction; but for the first, of the routes' sum alone.
        images: per store, how many of those kept in full are shown.
        size: of the page at most, in 10^6 bytes.
        made_with: what made the page, for its last note.
        advance: called with what is being done.

    Raises:
        ReportError: nothing can be shown, or the names alone do not fit.
        ImportError: a method's package is not installed.
    """
    content = gather(
        stores,
        methods,
        images,
        int(size * 1e6),
        advance=advance,
        frame=lambda empty: len(page(empty, made_with).encode()),
    )
    return page(content, made_with), content


def page(content: Content, made_with: str) -> str:
    """Return the whole page.

    Args:
        content: of ``gather``.
        made_with: the command, or any other words for its last note.
    """
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();"
    names = ", ".join(dict.fromkeys(store["name"] for store in content.stores))
    return render(
        "report.html",
        title=f"{_TITLE}: {names}",
        policy=Markup(_policy(script)),
        style=Markup(_asset("report.css")),
        keys=KEYS,
        notes=[*content.notes, _NOTE, f"Made with {made_with}."],
        about=Markup(as_json(_about(content))),
        matrices=[Markup(text) for text in content.matrices],
        script=Markup(script),
    )


def as_json(value: Any) -> str:
    """Return JSON that may stand in a script element: no character of it ends one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII alone
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(script: str) -> str:
    """Allow this script and no other, and no request to any address."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"


def _about(content: Content) -> dict[str, Any]:
    return {
        "stores": content.stores,
        "steps": STEPS,
        "percentile": colours.PERCENTILE,
        "thin": THIN,
        "ink": colours.INK,
        "palettes": {name: _channels(its) for name, its in _PALETTES.items()},
    }


def _channels(its: list[str]) -> list[list[int]]:
    """Colours as lists of red, green and blue, for the script."""
    chosen = colours.Scale(0, len(its) - 1, its)
    found: list[list[int]] = colours.to_rgb(np.arange(len(its), dtype=np.float64), chosen).tolist()
    return found


def _asset(name: str) -> str:
    return files("mamba_attn.viewer.report").joinpath("assets", name).read_text(encoding="utf-8")
