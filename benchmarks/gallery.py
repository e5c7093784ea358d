"""Writes the static gallery: pages of the bundled models that need no server: ``python -m benchmarks.gallery FOLDER``.

Each page is one file below 8 MB; ``index.html`` links them. ``--quick`` leaves t-SNE and UMAP out, which take a minute.
"""

import argparse
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mamba_attn
from mamba_attn.images import samples
from mamba_attn.viewer.report.content import make
from mamba_attn.viewer.traced import Traced, traced

MEGABYTES = 7.9  # of a page
TEXT = (
    "ROMEO: The king is dead, and all the court is still.\n"
    "JULIET: What king is dead? I saw him on the hill.\n"
    "ROMEO: The king"
)


class Page(NamedTuple):
    """A page of the gallery: its file, what it is, what it shows, and how it opens."""

    name: str
    title: str
    shown: Callable[[], list[Traced]]
    start: str = ""


def photos(model: str, name: str = "", **options: Any) -> Traced:
    """Return a bundled model with its demo weights on the six sample photos.

    Args:
        model: its name.
        name: in titles.
        options: of the model.
    """
    loaded = mamba_attn.load(model, weights="demo", **options)
    loaded.name = name or loaded.name
    return traced(loaded, samples(), labels=[path.stem.split("_")[1] for path in samples()])


def orders() -> list[Traced]:
    """Return one VMamba, with the same weights, reading its patches in three orders; its grids up to 16 x 16."""
    found = [
        photos("vmamba_micro", f"vmamba_micro, {name}", order=order)
        for order, name in (("raster", "rows and columns"), ("morton", "Morton order"), ("diagonal", "diagonals"))
    ]
    for each in found:
        each.layers = each.layers[1:]
    return found


PAGES = (
    Page("vmamba_micro", "VMamba: four scans, along rows and columns", lambda: [photos("vmamba_micro")]),
    Page("vim_micro", "Vision Mamba: two scans, and a class token in the middle", lambda: [photos("vim_micro")]),
    Page("orders", "One VMamba, its patches read in three orders, side by side", orders, "b=1&b.store=1"),
    Page("text", "A language model that reads letters", lambda: [traced(mamba_attn.load("mamba_plays"), TEXT)]),
)


def write(page: Page, folder: Path, methods: tuple[str, ...]) -> Path:
    """Write a page, and return its file.

    Args:
        page: which.
        folder: where.
        methods: of dimension reduction.
    """
    text, _ = make(
        page.shown(), methods, len(samples()), MEGABYTES, f"mamba_attn.viewer, for {page.title}", start=page.start
    )
    path = folder / f"{page.name}.html"
    path.write_text(text, encoding="utf-8")
    return path


def index() -> str:
    """Return the page that links them."""
    links = "".join(f'<li><a href="{each.name}.html">{html.escape(each.title)}</a></li>' for each in PAGES)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Where Mamba models look</title>"
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:42rem;"
        "padding:0 1rem}</style><h1>Where Mamba models look</h1>"
        "<p>Click a patch of a photo, or a token of a text, to see which others it takes information from. The pages "
        f"hold their numbers and need no server.</p><ul>{links}</ul></html>\n"
    )


def main() -> int:
    """Write the gallery."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made if it is missing")
    parser.add_argument("--quick", action="store_true", help="PCA alone")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        path = write(page, args.folder, ("pca",) if args.quick else ("pca", "tsne", "umap"))
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    (args.folder / "index.html").write_text(index(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
