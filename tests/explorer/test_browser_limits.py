"""In a real browser: what a mode, a model or a store does not have, and what is said of it."""

import pytest

from tests.explorer.browsing import Explorer, served
from tests.explorer.double import tiny


@pytest.fixture(scope="module")
def address():
    with served(tiny()) as address:
        yield address


@pytest.fixture
def explorer(browser, address):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    opened = Explorer(page, address)
    opened.open(address)
    yield opened
    page.close()
    assert opened.wrong == []


def test_colours_of_points_are_those_that_the_mode_has(explorer):
    page = explorer.page
    page.get_by_text("Display", exact=True).click()
    colour = page.locator(".control", has=page.get_by_text("colour of points", exact=True)).locator(".dash-dropdown")
    explorer.choose("points", "blocks")
    explorer.points(4)
    colour.filter(has_text="block").wait_for()  # what it fell back to
    colour.click()
    offered = page.locator(".dash-dropdown-content").get_by_role("option")
    assert offered.all_inner_texts() == ["block", "class", "predicted"]
    page.get_by_role("option", name="predicted").click()
    page.locator(".graph.scatter .legendtitletext", has_text="predicted").wait_for()
    page.wait_for_timeout(300)
    page.goto(page.url)
    colour.filter(has_text="predicted").wait_for()
    explorer.choose("points", "patches")
    colour.filter(has_text="column").wait_for()
    explorer.points(96)
