"""The page: its frame, style and script, and what it shows as data that no name in it can break out of."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup

from mamba_attn.analytics.store import AttentionStore
from mamba_attn.core.document import render
from mamba_attn.figures import colours
from mamba_attn.findings.accuracy import known_accuracy
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.viewer.source import Source, cells_of, others, sheet_of

# modules, in the order in which they need each other
SCRIPTS = ("data", "colours", "state", "words", "maps", "points", "controls", "save", "main")
KEYS = (
    ("← ↑ → ↓", "move the chosen patch; in the points, to another point"), ("Esc", "clear selection"),
    ("r", "takes from / gives to"), ("[ ]", "previous, next block"), ("0 1 2 …", "all scans, or one"),
    (", .", "previous, next photo"), ("m", "all three maps, or one"), ("v", "patches / blocks / every block"),
    ("s", "sign of the values"), ("p", "path of the scan"), ("- +", "steps of the path"), ("b", "side by side"),
    ("l", "lock the colour scale"), ("u", "undo, as the browser's Back"), ("?", "this help"),
)  # fmt: skip
_PALETTES = {
    "viridis": colours.VIRIDIS,
    "cividis": colours.CIVIDIS,
    "orange": colours.DIVERGING[4:],
    "signed": colours.DIVERGING,
    "path": colours.PATH,
    "kinds": colours.CATEGORIES,
}


def page(about: dict[str, Any], notes: Sequence[str], matrices: Sequence[str] = (), start: str = "") -> str:
    """Return the whole page.

    Args:
        about: what it shows: "live", and "stores".
        notes: sentences under "Help".
        matrices: of a frozen page, as text.
        start: of a frozen page, the part of an address behind its #.
    """
    names = ", ".join(dict.fromkeys(store["name"] for store in about["stores"]))
    script = _script()
    palettes = {name: _channels(its) for name, its in _PALETTES.items()}
    fixed = {"percentile": colours.PERCENTILE, "palettes": palettes, "start": start}
    return render(
        "report.html",
        title=f"Where does {names} look?",
        policy=Markup(_policy(script, about["live"])),
        style=Markup(_asset("page.css")),
        keys=KEYS,
        notes=notes,
        about=Markup(as_json({**about, **fixed})),
        matrices=[Markup(text) for text in matrices],
        script=Markup(script),
    )


def described(source: Source, shown: Sequence[int] | None = None) -> dict[str, Any]:
    """Return a store for the page's script, as JSON values.

    Args:
        source: of the store.
        shown: numbers of layers; default: all.
    """
    layers = []
    for number in range(len(source.layers)) if shown is None else shown:
        layer = source.layers[number]
        cells = cells_of(layer.layout)
        rows, columns, across = sheet_of(layer.layout)
        of_token = {token: cell for cell, token in enumerate(cells)}
        scans = layer.orders.tolist() if layer.kind == ScanLayer.kind else []
        layers.append(
            {
                **{name: getattr(layer, name) for name in ("name", "stage", "block", "routes")},
                "number": number,
                "grid": [rows, columns],
                "slices": [across, layer.layout.grid[-2]] if across else None,
                "tokens": len(cells),
                "orders": [[of_token.get(token, -1) for token in order] for order in scans],
                "classes": len(layer.layout.class_tokens),
                "rest": len(others(layer.layout)),
            }
        )
    return {
        "name": source.store.model_name,
        "folder": getattr(getattr(source.store, "folder", None), "name", ""),
        "layers": layers,
        "stages": [layer.stage for layer in source.layers],
        "blocks": [layer.block for layer in source.layers],
        "collected": len(source.store.images),
        "featured": source.featured,
        "top1": known_accuracy(source.store) if isinstance(source.store, AttentionStore) else None,
        "images": [entry(image) for image in source.images],
    }


def entry(image: Any) -> list[Any]:
    """Return an image for the page's script: its name, label, prediction, whether that is right, kept, tokens."""
    return [image.key, image.label, image.predicted, image.correct, image.kept, getattr(image, "words", None)]


def as_json(value: Any) -> str:
    """Return JSON that may stand in a script element: no character of it ends one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII alone
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _script() -> str:
    """All modules as one, because a page on a disk cannot import files: their imports go, their order is theirs."""
    text = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    text = re.sub(r"^import [^;]*;\n", "", text, flags=re.MULTILINE)
    return f"(() => {{\n'use strict';\n{re.sub('^export ', '', text, flags=re.MULTILINE)}\n}})();"


def _policy(script: str, live: bool) -> str:
    """Allow this script and no other, and no request to another address; of a frozen page, to none."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    own = "img-src 'self' data:; connect-src 'self'" if live else "img-src data:"
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; form-action 'none'; {own}"


def _channels(its: list[str]) -> list[list[int]]:
    """Colours as lists of red, green and blue, for the script."""
    chosen = colours.Scale(0, len(its) - 1, its)
    found: list[list[int]] = colours.to_rgb(np.arange(len(its), dtype=np.float64), chosen).tolist()
    return found


def _asset(name: str) -> str:
    return files("mamba_attn.viewer").joinpath("assets", name).read_text(encoding="utf-8")
