"""The page in a real browser for everyone: any width, dark or light, enlarged, read aloud, without its server."""

import re
from pathlib import Path

import pytest

from benchmarks.browser import served
from tests.viewer.browsing import Viewer


def test_when_the_server_is_gone_a_banner_says_so(browser, store):
    with served(store) as address:
        page = browser.new_page()
        Viewer(page, address).open()
    page.keyboard.press("]")
    page.get_by_role("alert").filter(has_text="The explorer does not answer").wait_for()
    page.close()


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(400, "light"), (1440, "dark")]
    + [
        pytest.param(*each, marks=pytest.mark.full)
        for each in ((400, "dark"), (720, "light"), (720, "dark"), (1440, "light"))
    ],
)
def test_no_width_scrolls_sideways(browser, address, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    viewer = Viewer(page, address).open()
    for state in ("", "b=1&b.layer=2", "mode=every&large=true"):
        viewer.open(state)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > sum(map(int, re.findall(r"\d+", ground)[:3]))) == (
        scheme == "dark"
    )
    page.close()
    assert viewer.wrong == []


def test_axe_finds_nothing(viewer):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text()
    for scheme, state in (
        ("light", ""),
        ("light", "b=1"),
        ("dark", "mode=blocks&show=classes"),
        ("dark", "mode=every"),
    ):
        viewer.page.emulate_media(color_scheme=scheme)
        viewer.open(state)
        viewer.page.evaluate("""() => { document.querySelector('#more').open = true;
            document.querySelector('#help').hidden = false; }""")
        viewer.page.evaluate(script)
        found = viewer.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    viewer.page.emulate_media(color_scheme="light")


def test_at_200_percent_a_map_is_on_the_first_screen(browser, address):
    page = browser.new_page(viewport={"width": 720, "height": 450})  # 1440 x 900, twice as large
    viewer = Viewer(page, address).open()
    box = page.locator("canvas.map").first.bounding_box()
    assert box["y"] + box["height"] / 4 < 450
    page.close()
    assert viewer.wrong == []


def test_every_control_has_a_name(viewer):
    viewer.more()
    viewer.page.wait_for_timeout(300)
    nameless = viewer.page.evaluate("""() => {
        const all = [...document.querySelectorAll('button, select, input, canvas[tabindex]')];
        return all.filter((one) => {
            const label = one.getAttribute('aria-label') || one.labels?.[0]?.innerText || one.innerText || one.title;
            return one.checkVisibility() && !label?.trim();
        }).map((one) => one.outerHTML.slice(0, 200)); }""")
    assert nameless == []
