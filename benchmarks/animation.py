"""Records docs/explore.webp from the real page, in a browser: ``python -m benchmarks.animation`` (needs chromium).

It opens the one-file page of the small VMamba, clicks a few patches, drags a region and changes the block.
"""

import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from benchmarks import gallery
from benchmarks.browser import FLAGS, chromium

OUT = Path(__file__).resolve().parents[1] / "docs" / "explore.webp"
SIZE, WIDTH = (1280, 800), 860  # of the window, and of the picture, in pixels
LARGEST = 1_000_000  # bytes
HOLD = 1100  # ms that a picture stays
CLICKS = ((2, 5), (5, 2), (6, 6))  # (row, column) of patches, in eighths of the map
TIMEOUT = 120_000  # ms


class Film:
    """Pictures of a page, with the pointer drawn where it is.

    Args:
        page: of the browser.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[Image.Image] = []

    def shoot(self, at: tuple[float, float] | None = None) -> None:
        """Take a picture once the page is drawn.

        Args:
            at: the pointer, in pixels of the window.
        """
        self.page.wait_for_timeout(400)
        picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        if at is not None:
            ImageDraw.Draw(picture).ellipse(
                (at[0] - 9, at[1] - 9, at[0] + 9, at[1] + 9), outline="#00a0ff", width=4, fill="#ffffff"
            )
        scale = WIDTH / picture.width
        self.frames.append(picture.resize((WIDTH, round(picture.height * scale)), Image.Resampling.LANCZOS))

    def place(self, row: float, column: float) -> tuple[float, float]:
        """Return a place on the first map, given in eighths of it, in pixels of the window."""
        box = self.page.locator("canvas.map").first.bounding_box()
        return box["x"] + (column + 0.5) / 8 * box["width"], box["y"] + (row + 0.5) / 8 * box["height"]

    def save(self, path: Path) -> int:
        """Write the film, smaller if it must be; return its bytes.

        Raises:
            ValueError: it does not fit below ``LARGEST``.
        """
        for quality in (80, 65, 50, 35):
            first, *rest = self.frames
            first.save(path, save_all=True, append_images=rest, duration=HOLD, loop=0, quality=quality, method=6)
            if path.stat().st_size < LARGEST:
                return path.stat().st_size
        raise ValueError(f"{path}: {path.stat().st_size} bytes at the lowest quality; film fewer pictures.")


def played(page: Any) -> Film:
    """Play the scene.

    Args:
        page: with the viewer opened.
    """
    film = Film(page)
    page.wait_for_function("() => window.viewer && viewer.maps()[0]?.values", timeout=TIMEOUT)
    film.shoot()
    for row, column in CLICKS:
        page.mouse.click(*(at := film.place(row, column)))
        film.shoot(at)
    start, end = film.place(1, 1), film.place(3, 4)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=5)
    page.mouse.up()
    film.shoot(end)
    page.evaluate("() => { location.hash = 'layer=0' }")
    film.shoot()
    return film


def main() -> int:
    """Film it.

    Raises:
        SystemExit: there is no browser.
    """
    from playwright.sync_api import sync_playwright

    found = chromium()
    if found is None:
        raise SystemExit("python -m benchmarks.animation needs chromium: apt-get install chromium.")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = gallery.write(gallery.PAGES[0], Path(folder), ("pca",))
        browser = driver.chromium.launch(executable_path=found, args=FLAGS, timeout=TIMEOUT)
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        page.goto(path.as_uri(), timeout=TIMEOUT)
        film = played(page)
        browser.close()
    print(f"{OUT.name}: {len(film.frames)} pictures, {film.save(OUT) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
