import pytest

from benchmarks.browser import FLAGS
from tests.viewer.browsing import CHROMIUM, Viewer


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium, or playwright install")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def screen(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    yield page
    page.close()


@pytest.fixture
def viewer(screen, address):
    """The module's page at its own address, opened again, with signs; nothing may have gone wrong on it."""
    opened = Viewer(screen, address).open("sign=signed")
    yield opened
    opened.leave()
    assert opened.wrong == []
