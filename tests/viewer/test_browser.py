"""The explorer in a real browser: what is drawn after each gesture, no errors, nothing leaves the machine."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks.browser import served
from mamba_attn.analytics.embed import embed
from mamba_attn.viewer.state import State
from tests.viewer.browsing import Explorer
from tests.viewer.double import tiny


@pytest.fixture(scope="module")
def store():
    return tiny()


@pytest.fixture(scope="module")
def address(store):
    with served(store) as address:
        yield address


def grid(values):
    return np.asarray(values).reshape(8, 12)


def test_a_click_on_a_patch_draws_its_row_and_lights_its_point(explorer, store):
    mean = store.mean(store.layers[0])
    explorer.heat(grid(mean.mean(0)))
    explorer.page.mouse.click(*explorer.cell(2, 5))
    explorer.wait("Where patch (2, 5) looks")
    explorer.heat(grid(mean[2 * 12 + 5]))
    assert explorer.drawn("patches")["frame"] == 4  # the edges of one cell
    explorer.choose("a patch", "gives to")
    explorer.wait("Where patch (2, 5) is seen from")
    explorer.heat(grid(mean[:, 2 * 12 + 5]))
    assert explorer.drawn("scatter")["lit"] == [2 * 12 + 5]
    # its row, column, step in every route
    text = explorer.page.locator(".card").inner_text()
    assert "row 2, column 5" in text
    assert "30th, 43rd, 67th and 54th of 96 in routes 1-4" in text


def test_a_dragged_region_draws_the_mean_of_its_rows_and_routes_switch(explorer, store):
    layer = store.layers[0]
    explorer.drag([explorer.cell(1, 2), explorer.cell(3, 6)])
    explorer.wait("Where 15 patches look, on average")
    region = [row * 12 + column for row in range(1, 4) for column in range(2, 7)]
    explorer.heat(grid(store.mean(layer)[region].mean(0)))
    assert explorer.drawn("patches")["frame"] == 2 * (3 + 5)
    of_sum = explorer.places()
    explorer.choose("route", "3")
    explorer.heat(grid(store.mean(layer, 2)[region].mean(0)))
    explorer.lie(embed(store.mean(layer, 2)[layer.layout.patches.numpy()]).points)
    assert explorer.places().shape == of_sum.shape
    assert np.abs(explorer.places() - of_sum).max() > 0.1 * np.abs(of_sum).max()
    explorer.page.keyboard.press("0")
    explorer.lie(of_sum)
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
    heading = explorer.page.get_by_role("heading", name=re.compile(r"Where \d+ patches look"))
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
    explorer.choose("compare", "blocks of this stage")
    explorer.points(8)  # two blocks, four images
    explorer.page.mouse.click(*explorer.point(4))  # block 1, image 0, kept in full
    expected = store.matrix(store.layers[3], store.images[0]).mean(0).reshape(2, 3)
    explorer.heat(expected)
    assert explorer.page.locator(".strip img").count() == 1


def test_two_panes_share_the_choice_and_the_address_brings_it_back(explorer, store, address):
    explorer.page.mouse.click(*explorer.cell(4, 4))
    explorer.wait("Where patch (4, 4) looks")
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


def test_what_is_under_the_pointer_and_what_shift_adds(explorer, store):
    mean, mouse = store.mean(store.layers[0]), explorer.page.mouse
    mouse.move(*explorer.cell(3, 7))
    card = explorer.page.locator(".card")
    card.get_by_text("row 3, column 7").wait_for()
    row = np.argsort(-np.abs(mean[3 * 12 + 7]))[0]
    assert f"({row // 12}, {row % 12}) {mean[3 * 12 + 7, row]:.2g}" in card.inner_text()
    assert card.locator("img").evaluate("(image) => image.naturalWidth") >= 12  # its map
    assert explorer.drawn("patches")["frame"] == 0  # nothing is chosen

    mouse.click(*explorer.cell(3, 7))
    explorer.lit([43])
    assert explorer.pixel(43)[3] == 255  # drawn in full
    assert 0 < explorer.pixel(95)[3] < 60  # faint
    explorer.page.keyboard.down("Shift")
    explorer.click(*explorer.cell(0, 0))
    explorer.lit([0, 43])
    explorer.drag([explorer.cell(6, 0), explorer.cell(7, 1)])
    explorer.lit([0, 43, 72, 73, 84, 85])
    explorer.click(*explorer.cell(3, 7))
    explorer.lit([0, 72, 73, 84, 85])  # taken away again
    explorer.page.keyboard.up("Shift")
    explorer.heat(grid(mean[[0, 72, 73, 84, 85]].mean(0)))
    explorer.page.get_by_role("button", name="clear selection").click()
    explorer.lit([])
    explorer.heat(grid(mean.mean(0)))


def test_a_box_and_a_click_among_the_points(explorer, store):
    page, mean = explorer.page, store.mean(store.layers[0])
    explorer.points(96)
    page.mouse.move(*explorer.point(17))
    page.locator(".card").get_by_text("row 1, column 5").wait_for()
    page.mouse.click(*explorer.point(17))
    explorer.lit([17])
    explorer.heat(grid(mean[17]))
    page.locator(".graph.scatter .modebar-btn[data-title='Box Select']").click()
    box = explorer.box("scatter")
    explorer.drag([
        (box["x"] + 3, box["y"] + 3), (box["x"] + box["width"] - 3, box["y"] + box["height"] - 3),
    ])  # fmt: skip
    explorer.wait("Where 96 patches look, on average")
    explorer.lit(range(96))


def test_keys_choose_patches_routes_blocks_and_modes(explorer, store):
    press, mean = explorer.page.keyboard.press, store.mean(store.layers[0])
    press("ArrowUp")  # the middle comes first
    explorer.wait("Where patch (4, 6) looks")
    for key in ("ArrowLeft", "ArrowUp", "r"):
        press(key)
    explorer.heat(grid(mean[:, 3 * 12 + 5]))
    press("2")
    explorer.heat(grid(store.mean(store.layers[0], 1)[:, 3 * 12 + 5]))
    press("Escape")
    explorer.wait("Where patches are seen from, on average")
    press("v")
    explorer.points(4)
    press("?")
    explorer.page.locator("#keys").get_by_text("move the chosen patch").wait_for()


def test_the_path_of_a_route_step_by_step(explorer):
    explorer.page.get_by_text("Display", exact=True).click()
    before = explorer.drawn("patches")["traces"]
    explorer.page.get_by_text("scan path", exact=True).click()
    explorer.page.wait_for_function(
        "(count) => document.querySelector('.graph.patches .js-plotly-plot')._fullData.length > count", arg=before
    )
    slider = explorer.page.locator(
        ".control", has=explorer.page.get_by_text("show first N steps (0: all)")
    ).get_by_role("slider")
    slider.focus()
    for _ in range(5):
        explorer.page.keyboard.press("ArrowRight")
    steps = """() => document.querySelector('.graph.patches .js-plotly-plot')._fullData
        .filter((trace) => trace.name !== 'chosen' && trace.mode?.includes('lines'))
        .map((trace) => trace.x.filter((x) => x !== null).length)"""
    explorer.page.wait_for_function(f"Math.max(...({steps})()) <= 10")


def test_all_blocks_lead_to_one_and_are_saved(explorer, store, tmp_path):
    explorer.page.get_by_role("button", name="all blocks").click()
    gallery = explorer.page.locator("#gallery")
    gallery.locator("img").nth(len(store.layers) - 1).wait_for()
    assert gallery.locator("button.current").inner_text().startswith("stage 0 · block 0")
    with np.load(explorer.saved("save the gallery as NPZ", tmp_path)) as arrays:
        for layer in store.layers:
            expected = store.mean(layer).mean(0).reshape(layer.layout.grid)
            np.testing.assert_allclose(arrays[layer.name], expected, rtol=1e-4)
    assert "all blocks, all routes" in explorer.saved("save the gallery as HTML", tmp_path).read_text()
    assert explorer.saved("save the gallery as PNG", tmp_path).read_bytes()[:4] == b"\x89PNG"
    gallery.get_by_text("stage 2 · block 1").click()
    last = next(layer for layer in store.layers if (layer.stage, layer.block) == (2, 1))
    explorer.heat(store.mean(last).mean(0).reshape(last.layout.grid))


def test_views_are_saved_whole(explorer, store, tmp_path):
    explorer.page.mouse.click(*explorer.cell(0, 3))
    explorer.wait("Where patch (0, 3) looks")
    saved = {
        (view, kind): explorer.saved(f"save the {view} view as {kind}", tmp_path)
        for view in ("patches", "scatter") for kind in ("HTML", "NPZ", "PNG")
    }  # fmt: skip
    with np.load(saved["patches", "NPZ"]) as arrays:
        np.testing.assert_allclose(arrays["map"], grid(store.mean(store.layers[0])[3]), rtol=1e-5)
        assert arrays["patches"].tolist() == [3]
    with np.load(saved["scatter", "NPZ"]) as arrays:
        assert arrays["points"].shape == (96, 2)
        assert arrays["selected"].tolist() == [3]
    for view in ("patches", "scatter"):
        picture = np.asarray(Image.open(saved[view, "PNG"]).convert("RGB"))
        assert min(picture.shape[:2]) > 600
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
        page = saved[view, "HTML"].read_text()
        assert "<script src=" not in page
    assert "Where patch (0, 3) looks" in saved["patches", "HTML"].read_text()


def test_a_saved_page_draws_itself_without_a_network(explorer, browser, tmp_path):
    path = explorer.saved("save the scatter view as HTML", tmp_path)
    context = browser.new_context(offline=True)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.point').length === 96")
    assert [url for url in asked if not url.startswith(("data:", "blob:", "file:"))] == []
    context.close()


def test_two_stores_side_by_side_each_in_its_order(browser, store):
    other = tiny(1, order="diagonal")
    with served(store, other) as address:
        page = browser.new_page(viewport={"width": 1600, "height": 1400})
        opened = Explorer(page, address)
        opened.open(address)
        page.get_by_role("button", name="side by side").click()
        page.wait_for_function("document.querySelectorAll('.graph.patches .js-plotly-plot').length === 2")
        page.locator("article").nth(1).locator(".dash-dropdown").first.click()
        page.get_by_role("option", name="vmamba_micro (2)").click()
        opened.heat(grid(other.mean(other.layers[0]).mean(0)), pane=1)
        opened.heat(grid(store.mean(store.layers[0]).mean(0)), pane=0)
        page.wait_for_timeout(500)  # the panes were made anew
        page.mouse.click(*opened.cell(5, 5))
        opened.heat(grid(store.mean(store.layers[0])[65]), pane=0)
        opened.heat(grid(other.mean(other.layers[0])[65]), pane=1)
        opened.lit([65], pane=1)
        page.close()
    assert opened.wrong == []
