"""The explorer in a real browser: what is drawn after each gesture, no errors, nothing leaves the machine."""

import math
import shutil
import threading

import numpy as np
import pytest

from mamba_attn.explorer.app import build
from mamba_attn.explorer.serving import bound
from mamba_attn.explorer.state import State
from tests.explorer.double import tiny

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
DRAWN = """([pane, view]) => {
    const graph = document.querySelectorAll('.graph.' + view + ' .js-plotly-plot')[pane];
    const heat = graph._fullData.find((trace) => trace.type === 'heatmap');
    const lines = graph._fullData.filter((trace) => trace.name === 'chosen');
    return {
        z: heat ? Array.from(heat.z, (row) => Array.from(row)) : null,
        frame: lines.length ? lines[0].x.length / 3 : 0,
        traces: graph._fullData.length,
        points: graph._fullData[0].x ? graph._fullData[0].x.length : 0,
        lit: graph.drawnPoints ? graph.drawnPoints.lit : null,
    };
}"""


PLACE = """([pane, number]) => {
    const graph = document.querySelectorAll('.graph.scatter .js-plotly-plot')[pane];
    const { xaxis, yaxis } = graph._fullLayout, trace = graph._fullData[0], box = graph.getBoundingClientRect();
    return [box.x + xaxis._offset + xaxis.l2p(trace.x[number]), box.y + yaxis._offset + yaxis.l2p(trace.y[number])];
}"""


@pytest.fixture(scope="module")
def store():
    return tiny()


@pytest.fixture(scope="module")
def address(store):
    with bound(build([store]), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield running
        running.close()


class Explorer:
    """A page with what went wrong on it."""

    def __init__(self, page, address):
        self.page, self.wrong = page, []
        page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else self.wrong.append(r.url)
        )
        page.on("response", lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)

    def open(self, address):
        self.page.goto(address)
        self.page.wait_for_selector(".graph.patches .js-plotly-plot .nsewdrag")
        self.page.wait_for_selector(".graph.scatter .js-plotly-plot .nsewdrag")
        self.wait("What all patches, on average, read")

    def wait(self, title):
        self.page.get_by_role("heading", name=title, exact=True).first.wait_for()

    def drawn(self, view, pane=0):
        return self.page.evaluate(DRAWN, [pane, view])

    def heat(self, expected, pane=0):
        """Wait until the map is what it shall be."""
        for _ in range(50):
            found = np.array(self.drawn("patches", pane)["z"])
            if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-12):
                return
            self.page.wait_for_timeout(100)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)

    def box(self, view):
        return self.page.locator(f".graph.{view} .nsewdrag").first.bounding_box()

    def cell(self, row, column, grid=(8, 12)):
        box = self.box("patches")
        return box["x"] + (column + 0.5) / grid[1] * box["width"], box["y"] + (row + 0.5) / grid[0] * box["height"]

    def points(self, count, pane=0):
        """Wait until there are so many points."""
        self.page.wait_for_function(
            """([pane, count]) => document.querySelectorAll('.graph.scatter')[pane].querySelector('.js-plotly-plot')
            ._fullData?.[0]?.x?.length === count""",
            arg=[pane, count],
        )

    def point(self, number, pane=0):
        """Where a point is on the screen."""
        return self.page.evaluate(PLACE, [pane, number])

    def drag(self, corners):
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*corner, steps=4)
        self.page.mouse.up()

    def choose(self, label, text):
        self.page.locator(".control", has=self.page.get_by_text(label, exact=True)).get_by_text(
            text, exact=True
        ).click()


@pytest.fixture
def explorer(browser, address):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    opened = Explorer(page, address)
    opened.open(address)
    yield opened
    page.close()
    assert opened.wrong == []


def grid(values):
    return np.asarray(values).reshape(8, 12)


def test_a_click_on_a_patch_draws_its_row_and_lights_its_point(explorer, store):
    mean = store.mean(store.layers[0])
    explorer.heat(grid(mean.mean(0)))
    explorer.page.mouse.click(*explorer.cell(2, 5))
    explorer.wait("What patch (2, 5) reads")
    explorer.heat(grid(mean[2 * 12 + 5]))
    assert explorer.drawn("patches")["frame"] == 4  # the edges of one cell
    explorer.choose("a patch", "is read")
    explorer.wait("Where patch (2, 5) is read")
    explorer.heat(grid(mean[:, 2 * 12 + 5]))
    assert explorer.drawn("scatter")["lit"] == [2 * 12 + 5]
    # its row, column, step in every route
    text = explorer.page.locator(".card").inner_text()
    assert "row 2, column 5" in text
    assert "30, 43, 67, 54 of 96" in text


def test_a_dragged_region_draws_the_mean_of_its_rows_and_routes_switch(explorer, store):
    layer = store.layers[0]
    explorer.drag([explorer.cell(1, 2), explorer.cell(3, 6)])
    explorer.wait("What 15 patches, on average, read")
    region = [row * 12 + column for row in range(1, 4) for column in range(2, 7)]
    explorer.heat(grid(store.mean(layer)[region].mean(0)))
    assert explorer.drawn("patches")["frame"] == 2 * (3 + 5)
    explorer.choose("route", "3")
    explorer.heat(grid(store.mean(layer, 2)[region].mean(0)))
    explorer.page.keyboard.press("0")
    explorer.heat(grid(store.mean(layer)[region].mean(0)))


def test_a_lasso_over_points_frames_their_patches(explorer, store):
    box = explorer.box("scatter")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    width, height = box["width"] * 0.495, box["height"] * 0.495
    turn = [2 * math.pi * step / 24 for step in range(25)]
    # a superellipse that holds all but points in the corners
    square = [
        (x + width * max(-1, min(1, 1.3 * math.cos(a))), y + height * max(-1, min(1, 1.3 * math.sin(a)))) for a in turn
    ]
    explorer.drag(square)
    heading = explorer.page.get_by_role("heading", name="patches, on average, read").filter(has_not_text="all")
    heading.wait_for()
    count = int(heading.inner_text().split()[1])
    assert 0 < count <= 96
    explorer.page.wait_for_timeout(300)
    assert len(explorer.drawn("scatter")["lit"]) == count
    state = explorer.page.evaluate("new URLSearchParams(location.search).get('state')")
    cells = list(State.from_url(state).cells)
    assert len(cells) == count
    explorer.heat(grid(store.mean(store.layers[0])[cells].mean(0)))


def test_points_become_blocks_of_a_stage_and_a_click_opens_one(explorer, store):
    explorer.page.keyboard.press("]")
    explorer.page.keyboard.press("]")
    explorer.choose("points", "blocks")
    explorer.points(8)  # two blocks, four images
    explorer.page.mouse.click(*explorer.point(4))  # block 1, image 0, kept in full
    expected = store.matrix(store.layers[3], store.images[0]).mean(0).reshape(2, 3)
    explorer.heat(expected)
    assert explorer.page.locator(".strip img").count() == 1


def test_two_panes_share_the_choice_and_the_address_brings_it_back(explorer, store, address):
    explorer.page.mouse.click(*explorer.cell(4, 4))
    explorer.wait("What patch (4, 4) reads")
    explorer.page.get_by_role("button", name="side by side").click()
    explorer.page.wait_for_function("document.querySelectorAll('.graph.patches .js-plotly-plot').length === 2")
    explorer.page.locator("article").nth(1).locator(".segments").first.get_by_text("4", exact=True).click()
    explorer.heat(grid(store.mean(store.layers[0])[52]), pane=0)
    explorer.heat(grid(store.mean(store.layers[0], 3)[52]), pane=1)
    explorer.page.wait_for_timeout(500)
    again = explorer.page.url
    assert "state=" in again
    explorer.page.goto(again)
    explorer.page.wait_for_function("document.querySelectorAll('.graph.patches .js-plotly-plot').length === 2")
    explorer.heat(grid(store.mean(store.layers[0], 3)[52]), pane=1)


def test_views_are_saved_whole(explorer, store, tmp_path):
    explorer.page.mouse.click(*explorer.cell(0, 3))
    explorer.wait("What patch (0, 3) reads")
    saved = {}
    for kind in ("HTML", "NPZ", "PNG"):
        with explorer.page.expect_download() as download:
            explorer.page.get_by_title(f"save the patches view as {kind}").click()
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
    with np.load(saved["NPZ"]) as arrays:
        np.testing.assert_allclose(arrays["map"], grid(store.mean(store.layers[0])[3]))
        assert arrays["patches"].tolist() == [3]
    assert saved["PNG"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = saved["HTML"].read_text()
    assert "<script src=" not in page
    assert "What patch (0, 3) reads" in page
