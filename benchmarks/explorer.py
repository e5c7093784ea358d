"""`mamba-attn explore` in a real browser: milliseconds from a gesture to the picture that it draws."""

import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.browser import FLAGS, chromium, served
from benchmarks.kernel.timing import Spread
from benchmarks.report import Figure, figure
from mamba_attn import models
from mamba_attn.analytics import AttentionStore, Request, collect
from mamba_attn.datasets import loading, open_data
from mamba_attn.viewer.demo import demo_store

MODEL, PIXELS, GRID = "vmamba_tiny_s1l8", 224, 56
KINDS = ("patch click", "hover", "region drag", "route switch", "mode switch", "scatter click")
WARM = 3  # interactions of every kind before those that count
# The event that starts a gesture's answer, and whether the answer is drawn; both on the page's own clock. What is
# measured ends with the frame after the one in which everything is there.
PROBE = """() => {
    const seen = () => ({
        map: viewer.maps()[0].values?.slice(0, 60).join(),
        lit: viewer.lit(0).join(),
        points: viewer.points()[0].key + viewer.points()[0].places.length,
        card: document.querySelector('#card').innerText,
    });
    let began = 0;
    for (const kind of ['pointerup', 'pointermove', 'click'])
        document.addEventListener(kind, (event) => { if (kind === window.probe.kind) began = event.timeStamp; }, true);
    window.probe = {
        kind: 'pointerup',
        before: null,
        arm: (kind) => { window.probe.kind = kind; window.probe.before = seen(); },
        until: (what) => new Promise((done, fail) => {
            const late = performance.now() + 20000;
            const look = () => {
                const now = seen();
                if (what.every((name) => now[name] !== window.probe.before[name] && now[name] !== undefined))
                    requestAnimationFrame(() => done(performance.now() - began));
                else if (performance.now() > late) fail('not drawn: ' + what);
                else requestAnimationFrame(look);
            };
            look();
        }),
    };
}"""
FIRST = "() => viewer.maps()[0]?.values && new Promise((done) => requestAnimationFrame(() => done(performance.now())))"


def collected(folder: Path, pixels: int) -> Path:
    """A store of a VMamba of random weights over two synthetic images, its first stage alone."""
    photos = folder / "photos"
    photos.mkdir()
    y, x = np.mgrid[0:pixels, 0:pixels] / pixels
    for number in (1, 2):
        rgb = [np.sin(9 * x * number), np.cos(7 * y), np.hypot(x - 0.5, y - 0.5) * 2 - 1]
        Image.fromarray(np.uint8(127.5 + 127.5 * np.clip(np.stack(rgb, -1), -1, 1))).save(photos / f"{number}.png")
    torch.manual_seed(0)
    weights = folder / "weights.pth"
    torch.save(models.create(MODEL, image_size=pixels).state_dict(), weights)
    weights.with_suffix(".json").write_text(f'{{"options": {{"image_size": {pixels}}}}}')
    subject = loading.load(MODEL, str(weights))
    collect(Request(subject, open_data(str(photos)), layers=["layers.0.*"]), folder / "store")
    return folder / "store"


class Hand:
    """What moves the mouse over the page, and how long the page takes to follow.

    Args:
        page: of the browser.
        grid: patches on a side.
    """

    def __init__(self, page: Any, grid: int) -> None:
        self.page, self.grid = page, grid
        self.random = np.random.default_rng(0)
        while not page.evaluate(
            "() => window.viewer && viewer.maps()[0]?.values && viewer.points()[0].places.length > 1"
        ):
            page.wait_for_timeout(50)
        page.evaluate(PROBE)

    def place(self, margin: int = 2) -> tuple[float, float]:
        """A patch on the screen, anywhere."""
        box = self.page.locator("canvas.map").first.bounding_box()
        row, column = self.random.integers(margin, self.grid - margin, 2) + 0.5
        return box["x"] + column * box["width"] / self.grid, box["y"] + row * box["height"] / self.grid

    def timed(self, act: Callable[[], None], what: tuple[str, ...], kind: str = "pointerup") -> float:
        """Milliseconds from the gesture's last event until all these have changed and are drawn."""
        self.page.evaluate("(kind) => window.probe.arm(kind)", kind)
        act()
        found = float(self.page.evaluate("(what) => window.probe.until(what)", list(what)))
        self.page.wait_for_timeout(300)  # a person looks first
        return found

    def patch_click(self) -> float:
        """A click on a patch: its map, and its point."""
        self.page.mouse.move(*(at := self.place()))
        self.page.wait_for_timeout(150)
        return self.timed(lambda: self.page.mouse.click(*at), ("map", "lit"))

    def hover(self) -> float:
        """Rest the pointer on another patch: its card, with its map."""
        return self.timed(lambda: self.page.mouse.move(*self.place()), ("card",), "pointermove")

    def region_drag(self) -> float:
        """A box over patches: the mean of their maps, and their points."""
        self.page.mouse.move(*self.place(4))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(4), steps=5)
        return self.timed(self.page.mouse.up, ("map", "lit"))

    def route_switch(self) -> float:
        """Another route: another map, and other points."""
        other = 2 if self.page.evaluate("viewer.state.panes[0].route") == 1 else 1
        label = self.page.locator(f"label:has([name=route][value='{other}'])")
        return self.timed(label.click, ("map", "points"), "click")

    def mode_switch(self) -> float:
        """From the patches of a block to the blocks of a stage, or back: other points."""
        other = "patches" if self.page.evaluate("viewer.state.panes[0].mode") == "blocks" else "blocks"
        label = self.page.locator(f"label:has([name=mode][value='{other}'])")
        return self.timed(label.click, ("points",), "click")

    def scatter_click(self) -> float:
        """A click on a point that no other covers: it is lit, and the map of its patch."""
        self.page.locator("canvas.plot").first.scroll_into_view_if_needed()
        at = self.page.evaluate(
            """(draw) => { const box = document.querySelector('canvas.plot').getBoundingClientRect();
            const all = viewer.points()[0].places, now = viewer.lit(0).join();
            const alone = all.filter((p, k) => String(k) !== now && all.every((q, i) => i === k
                || Math.hypot(p[0] - q[0], p[1] - q[1]) > 15));
            const [x, y] = alone[Math.floor(draw * alone.length)]; return [box.x + x, box.y + y]; }""",
            self.random.random(),
        )
        self.page.mouse.move(*at)
        self.page.wait_for_timeout(150)
        return self.timed(lambda: self.page.mouse.click(*at), ("map", "lit"))


def opened(browser: Any, address: str) -> tuple[float, int]:
    """Milliseconds from opening the address to the first picture, and the bytes received until then."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    received: list[float] = []
    session.on("Network.dataReceived", lambda event: received.append(event["dataLength"]))
    page.goto(address)
    while not (found := page.evaluate(FIRST)):
        page.wait_for_timeout(5)
    page.close()
    return float(found), int(sum(received))


def run_explore(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about the explorer."""
    found = chromium()
    if found is None or importlib.util.find_spec("playwright") is None:
        raise SystemExit(
            "benchmarks/run.py explore needs playwright and chromium: pip install playwright, then "
            "apt-get install chromium or playwright install chromium."
        )
    from playwright.sync_api import sync_playwright

    pixels, rounds = (64, 4) if quick else (PIXELS, 40)
    with (
        tempfile.TemporaryDirectory() as folder,
        served(AttentionStore.open(collected(Path(folder), pixels))) as address,
        served(AttentionStore.open(demo_store())) as demo,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        starts = [opened(browser, address) for _ in range(2 if quick else 7)]
        demos = [opened(browser, demo) for _ in range(2 if quick else 7)]
        page.goto(address + "#layer=0")
        hand = Hand(page, pixels // 4)
        milliseconds = {}
        for kind in KINDS:
            gesture = getattr(hand, kind.replace(" ", "_"))
            milliseconds[kind] = [gesture() for _ in range(WARM + rounds)][WARM:]
            if kind == "mode switch" and (WARM + rounds) % 2:
                gesture()  # back to patches
        version = browser.version
        browser.close()
    figures = []
    for kind, sample in milliseconds.items():
        figures.append(figure("explore median", kind, Spread.of(sample)))
        figures.append(figure("explore 95", kind, statistics.quantiles(sample, n=20, method="inclusive")[-1]))
    for how, sample in (("56 x 56 patches", starts), ("the demo", demos)):
        figures.append(figure("explore first", how, Spread.of([time for time, _ in sample])))
        figures.append(figure("explore bytes", how, max(size for _, size in sample) / 1000))
    details = {"model": MODEL, "pixels": pixels, "grid": pixels // 4, "browser": version, "milliseconds": milliseconds}
    return figures, details
