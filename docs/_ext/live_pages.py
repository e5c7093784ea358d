"""Adds the viewer's one-file pages to the site, as ``benchmarks.gallery`` writes them; a quick build has none."""

from pathlib import Path
from typing import Any


def add_pages(app: Any, error: Exception | None) -> None:
    """Write them into ``live/`` of the site."""
    if error is None and app.builder.format == "html":
        from benchmarks import gallery

        folder = Path(app.outdir) / "live"
        folder.mkdir(exist_ok=True)
        for page in gallery.PAGES if app.config.live_pages else ():
            gallery.write(page, folder, ("pca",))
        (folder / "index.html").write_text(gallery.index(), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_config_value("live_pages", True, "", [bool])
    app.connect("build-finished", add_pages)
    return {"parallel_read_safe": True}
