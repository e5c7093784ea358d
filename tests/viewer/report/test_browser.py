"""The report in a real browser, from the disk, without a network: what is drawn after each gesture."""

import shutil

import numpy as np
import pytest

from mamba_attn.figures import colours
from mamba_attn.viewer.report.quantised import ERROR
from tests.viewer.report import cases

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PIXELS = """([id, places]) => {
    const canvas = document.getElementById(id);
    const ratio = canvas.width / canvas.clientWidth;
    const context = canvas.getContext('2d');
    const pixel = (place) => place.map((at) => Math.floor(at * ratio));
    return places.map((place) => Array.from(context.getImageData(...pixel(place), 1, 1).data));
}"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return cases.stored(tmp_path_factory.mktemp("vmamba"))


@pytest.fixture(scope="module")
def address(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(cases.report(store, methods=["pca"])[0], encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield running
        running.close()


class Report:
    """A page with what went wrong on it."""

    def __init__(self, page, address):
        self.page, self.wrong = page, []
        page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on(
            "request", lambda r: None if r.url == address or r.url.startswith("data:") else self.wrong.append(r.url)
        )
        page.goto(address)
        self.title("Where patches look, on average, average of 5 images")

    def title(self, text):
        self.page.get_by_role("heading", name=text, exact=True).wait_for()

    def drawn(self):
        return np.array(self.page.evaluate("report.drawn.values"))

    def shows(self, expected, row=None):
        """Wait until the map is what it shall be, as far as its quantisation allows."""
        expected = np.asarray(expected).ravel()
        largest = np.abs(expected if row is None else row).max()
        for _ in range(50):
            found = self.drawn()
            if found.shape == expected.shape and np.abs(found - expected).max() <= 1.01 * ERROR * largest:
                return
            self.page.wait_for_timeout(60)
        assert np.abs(found - expected).max() <= 1.01 * ERROR * largest

    def lit(self):
        return self.page.evaluate("report.lit()")

    def pixels(self, canvas, places):
        return np.array(self.page.evaluate(PIXELS, [canvas, [list(map(float, place)) for place in places]]))

    def cell(self, row, column):
        box, size = self.page.locator("#patches").bounding_box(), self.page.evaluate("report.drawn.box.size")
        return box["x"] + (column + 0.5) * size, box["y"] + (row + 0.5) * size

    def point(self, number):
        box, place = self.page.locator("#points").bounding_box(), self.page.evaluate(f"report.scatter.at[{number}]")
        return box["x"] + place[0], box["y"] + place[1]

    def drag(self, corners):
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*corner, steps=3)
        self.page.mouse.up()

    def choose(self, label, text):
        self.page.locator(".control", has=self.page.get_by_text(label, exact=True)).get_by_text(
            text, exact=True
        ).click()


@pytest.fixture
def report(browser, address):
    context = browser.new_context(viewport={"width": 1300, "height": 860}, offline=True)
    opened = Report(context.new_page(), address)
    yield opened
    harmed = opened.page.evaluate("window.harmed")
    context.close()
    assert opened.wrong == []
    assert harmed is None


def test_a_click_on_a_patch_draws_its_row_frames_it_and_lights_its_point(report, store):
    mean = store.mean(0)
    report.shows(mean.mean(0), mean)
    report.page.mouse.click(*report.cell(2, 5))
    report.title("Where patch (2, 5) looks, average of 5 images")
    report.shows(mean[29])
    assert report.lit() == [29]
    # what is on the canvas: one point full, the others faint; a dark frame around the cell
    at = report.page.evaluate("report.scatter.at")
    lit = report.pixels("points", [at[29]])[0]
    palette = colours.Scale(0, 11, colours.CIVIDIS)
    assert np.abs(lit[:3] - colours.to_rgb(np.array([5.0]), palette)[0].astype(int)).max() <= 2
    assert lit[3] == 255
    others = [number for number in range(96) if min(np.hypot(*np.subtract(at[number], at[29])), 99) > 20]
    assert (report.pixels("points", [at[number] for number in others])[:, 3] < 255).mean() > 0.5
    size = report.page.evaluate("report.drawn.box.size")
    edge = report.pixels("patches", [(5 * size, 2.5 * size), (6 * size, 2.5 * size), (5.5 * size, 2 * size)])
    assert (edge[:, :3].max(axis=1) < 60).all()
    text = report.page.locator("#card").inner_text()
    assert "row 2, column 5" in text
    assert "30th, 43rd, 67th and 54th of 96" in text


def test_colours_are_those_of_the_figures(report, store):
    report.page.mouse.click(*report.cell(4, 4))
    report.page.locator("input[data-name=opacity]").fill("1")
    for sign, palette in (("signed", colours.BLUE_ORANGE), ("absolute", colours.VIRIDIS)):
        report.choose("values", sign)
        row = store.mean(0)[52]
        values = np.abs(row) if sign == "absolute" else row
        report.shows(values)
        report.page.wait_for_timeout(100)
        limits = colours.limits(values)
        expected = colours.to_rgb(values, colours.scale(values, colours=palette, **limits)).astype(int)
        size = report.page.evaluate("report.drawn.box.size")
        places = [((cell % 12 + 0.5) * size, (cell // 12 + 0.5) * size) for cell in range(96)]
        assert np.abs(report.pixels("patches", places)[:, :3] - expected).max() <= 4
    report.choose("values", "positive")
    report.shows(np.maximum(store.mean(0)[52], 0), store.mean(0)[52])


def test_boxes_and_lassos_in_both_views(report, store):
    mean = store.mean(0)
    report.drag([report.cell(1, 2), report.cell(3, 6)])
    report.title("Where 15 patches look, on average, average of 5 images")
    region = [row * 12 + column for row in range(1, 4) for column in range(2, 7)]
    assert report.lit() == region
    report.shows(mean[region].mean(0), mean[region])
    report.page.locator(".tools[data-view=patches]").get_by_text("lasso").click()
    half = [report.cell(*place) for place in ((-0.4, -0.4), (-0.4, 2.6), (2.6, -0.4))]
    report.drag([*half, half[0]])
    report.title("Where 6 patches look, on average, average of 5 images")
    assert report.lit() == [0, 1, 2, 12, 13, 24]
    for tool in ("lasso", "box"):
        report.page.locator(".tools[data-view=points]").get_by_text(tool).click()
        at = np.array(report.page.evaluate("report.scatter.at"))
        box = report.page.locator("#points").bounding_box()
        left, right = np.sort(at[:, 0])[[0, 29 if tool == "lasso" else 9]] + (-9, 0.01)
        corners = [(left, 2), (right, 2), (right, box["height"] - 4), (left, box["height"] - 4)]
        corners = [(box["x"] + x, box["y"] + y) for x, y in (corners if tool == "lasso" else corners[::2])]
        report.drag(corners)
        inside = [int(number) for number in np.flatnonzero(at[:, 0] < right)]
        report.title(f"Where {len(inside)} patches look, on average, average of 5 images")
        assert report.lit() == inside
        report.shows(mean[inside].mean(0), mean[inside])


def test_routes_columns_images_and_blocks(report, store):
    report.page.mouse.click(*report.cell(2, 5))
    report.choose("route", "3")
    report.shows(store.mean(0, 2)[29])
    report.choose("a patch", "gives to")
    report.shows(store.mean(0, 2)[:, 29], store.mean(0, 2))
    report.choose("show", "this image")
    key = store.images[0].key
    report.title(f"Where patch (2, 5) is seen from, {key}, route 3")
    report.shows(store.matrix(0, 0, 2)[:, 29], store.matrix(0, 0, 2))
    report.page.locator("select[data-name=image]").select_option(index=1)
    report.shows(store.matrix(0, 1, 2)[:, 29], store.matrix(0, 1, 2))
    report.page.keyboard.press("0")
    report.page.locator("select[data-name=layer]").select_option(index=2)
    matrix = store.matrix(2, 1)
    report.page.keyboard.press("Escape")
    report.page.locator("#patches").click(position={"x": 5, "y": 5})
    report.shows(matrix[:, 0], matrix)


def test_points_become_blocks_of_a_stage_and_a_click_opens_one(report, store):
    report.page.locator("select[data-name=layer]").select_option(index=1)
    report.choose("compare", "blocks of this stage")
    report.page.get_by_role("heading", name="Stage 1: blocks, 5 images").wait_for()
    assert report.page.evaluate("report.scatter.at.length") == 10
    report.page.mouse.click(*report.point(6))  # block 1, image 1, which is kept
    matrix = store.matrix(2, 1)
    report.shows(matrix.mean(0), matrix)
    assert report.lit() == [6]
    report.page.mouse.click(*report.point(4))  # block 0, image 4, which is not
    report.shows(store.mean(1).mean(0), store.mean(1))
    notice = report.page.locator("#patches-notice").inner_text()
    assert (
        notice == f"{store.images[4].key}: its matrix is not in this report; showing the average of all images instead."
    )
    box = report.page.locator("#points").bounding_box()
    report.drag([(box["x"] + x, box["y"] + y) for x, y in ((1, 1), (box["width"] - 1, 1), (box["width"] - 1, 399),
                                                          (box["width"] - 1, box["height"] - 1),
                                                          (1, box["height"] - 1))])  # fmt: skip
    assert report.lit() == list(range(10))
    assert report.page.locator("#strip img").count() == 5


def test_the_path_of_a_route_and_its_steps(report):
    report.page.locator("input[data-name=opacity]").fill("1")
    size = report.page.evaluate("report.drawn.box.size")
    middle = [((column + 1.0) * size, 0.5 * size) for column in (1, 8)]  # between cells of the first row
    before = report.pixels("patches", middle)[:, :3]
    report.page.get_by_label("scan path").check()
    report.page.locator("input[data-name=step]").fill("6")
    report.page.wait_for_timeout(200)
    after = report.pixels("patches", middle)[:, :3]
    changed = np.abs(after - before).max(axis=1)
    assert changed[0] > 20
    assert changed[1] <= 2
    assert report.page.get_by_text("step 6 of 96").is_visible()


def test_the_keyboard_reaches_everything(report, store):
    for _ in range(40):
        report.page.keyboard.press("Tab")
        if report.page.evaluate("document.activeElement.id") == "patches":
            break
    assert report.page.evaluate("document.activeElement.id") == "patches"
    for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
        report.page.keyboard.press(key)
    report.title("Where patch (3, 7) looks, average of 5 images")
    report.shows(store.mean(0)[43])
    spoken = report.page.locator("#spoken").inner_text()
    assert spoken.startswith("Where patch (3, 7) looks, average of 5 images. Strongest: ")
    report.page.keyboard.press("r")
    report.page.keyboard.press("2")
    report.shows(store.mean(0, 1)[:, 43], store.mean(0, 1))
    report.page.keyboard.press("Escape")
    report.title("Where patches are seen from, on average, average of 5 images, route 2")
    report.page.locator("input[data-name=route]:checked").focus()
    report.page.keyboard.press("ArrowRight")
    report.shows(store.mean(0, 2).mean(1), store.mean(0, 2))
    # the control was built anew and still has the focus
    assert report.page.evaluate("document.activeElement.value") == "2"


def test_hostile_names_are_text(report, store):
    key = store.images[1].key
    assert cases.HOSTILE in key
    assert report.page.locator("select[data-name=image] option").all_inner_texts() == [
        image.key for image in store.images[:2]
    ]
    report.choose("compare", "blocks of this stage")
    report.page.locator("select[data-name=colour]").select_option("class")
    assert cases.HOSTILE in report.page.locator("#legend").inner_text()
    report.page.mouse.click(*report.point(1))
    report.title(f"Where patches look, on average, {key}")
    assert report.page.locator("img[src=x]").count() == 0
