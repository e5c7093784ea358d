"""In a real browser: what a mode, a model or a store does not have, and what is said of it."""

import pytest

from benchmarks.browser import served
from mamba_attn.analytics import AttentionStore, collect
from tests.analytics.cases import folder_of, request
from tests.viewer.browsing import Explorer
from tests.viewer.double import tiny


@pytest.fixture(scope="module")
def address():
    with served(tiny()) as address:
        yield address


def test_colours_of_points_are_those_that_the_mode_has(explorer):
    page = explorer.page
    page.get_by_text("Display", exact=True).click()
    colour = page.locator(".control", has=page.get_by_text("colour of points", exact=True)).locator(".dash-dropdown")
    explorer.choose("compare", "blocks of this stage")
    explorer.points(4)
    colour.filter(has_text="block").wait_for()  # what it fell back to
    colour.click()
    offered = page.locator(".dash-dropdown-content").get_by_role("option")
    assert offered.all_inner_texts() == ["block", "class", "predicted"]
    page.get_by_role("option", name="predicted").click()
    page.locator(".graph.scatter .legendtitletext", has_text="predicted").wait_for()
    page.wait_for_timeout(300)
    page.goto(page.url)
    page.get_by_text("Display", exact=True).click()
    colour.filter(has_text="predicted").wait_for()
    explorer.choose("compare", "patches of this block")
    colour.filter(has_text="column").wait_for()
    explorer.points(96)


def test_softmax_attention_offers_no_path_no_gate_and_no_rank(browser, tmp_path):
    collect(request(folder_of(tmp_path, 1), "vit_micro", keep=1), tmp_path / "store")
    with served(AttentionStore.open(tmp_path / "store")) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        opened = Explorer(page, address)
        opened.open(address)
        traces = opened.drawn("patches")["traces"]
        page.get_by_text("Display", exact=True).click()
        page.keyboard.press("p")
        labels = page.locator("details").inner_text()
        assert not {"gate", "D", "scan path", "show first N steps (0: all)", "rank"} & set(labels.split("\n"))
        page.mouse.move(*opened.cell(0, 0, (3, 5)))
        page.locator(".card").get_by_text("row 0, column 0").wait_for()
        assert "visited" not in page.locator(".card").inner_text()
        assert opened.drawn("patches")["traces"] == traces
        page.close()
    assert opened.wrong == []


def test_an_address_that_cannot_be_read_is_said_above_the_default_view(browser, address):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    opened = Explorer(page, address)
    opened.open(f"{address}?state=AAAA")
    page.wait_for_timeout(500)  # the first drawing does not take it away
    assert "cannot be read" in page.locator("#message").inner_text()
    page.close()
    assert opened.wrong == []


def test_a_lasso_over_blocks_opens_one_and_what_is_open_is_lit(explorer):
    explorer.choose("compare", "blocks of this stage")
    explorer.points(4)
    explorer.lit([0, 1, 2, 3])  # the mean of the block's four images
    box, (x, y) = explorer.box("scatter"), explorer.point(2)
    explorer.drag([(x - 4, y - 4), (x + 4, y - 4), (x + 4, y + 4), (x - 4, y + 4), (x - 4, y - 4)])
    assert box["x"] <= x <= box["x"] + box["width"]
    explorer.lit([2])
    explorer.page.get_by_role("heading", name="Where patches look, on average · image_2.jpg").wait_for()
    explorer.page.locator(".list", has_text="image_2.jpg").wait_for()
    explorer.page.locator(".strip img").wait_for()
    explorer.choose("compare", "patches of this block")
    explorer.points(96)
    explorer.page.locator(".strip img").wait_for(state="detached")


def test_side_by_side_views_line_up_and_what_cannot_be_saved_says_why(explorer):
    page = explorer.page
    page.get_by_role("button", name="side by side").click()
    page.wait_for_function("document.querySelectorAll('.graph.patches .js-plotly-plot').length === 2")
    page.get_by_text("Display", exact=True).first.click()
    page.wait_for_timeout(300)
    for view in ("scatter", "patches"):
        first, second = (page.locator(f".graph.{view}").nth(pane).bounding_box() for pane in (0, 1))
        assert first["y"] == second["y"]
    page.get_by_text("gate", exact=True).first.click()
    page.locator(".notice", has_text="Gate and D exist for single images only").wait_for()
    page.get_by_title("save the patches view as PNG").first.click()
    page.locator("#message", has_text="Gate and D exist for single images only").wait_for()
