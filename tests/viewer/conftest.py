import pytest
import torch

import mamba_attn
from benchmarks.browser import FLAGS, served
from tests.viewer.browsing import CHROMIUM, Viewer
from tests.viewer.double import tiny


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


@pytest.fixture(scope="module")
def store():
    found = tiny()
    found.images = [
        type(i)(i.key, i.label, p, True, c)
        for i, p, c in zip(found.images, ["cat", "cat", "dog", "dog"], (True, False, False, True), strict=True)
    ]
    for image in found.images[1:]:  # the double keeps the first alone
        with torch.no_grad(), mamba_attn.trace(found.model()) as record:
            found.model()(mamba_attn.images.normalise(found.pixels(image)[None]))
        for mine, layer in zip(found.layers, record.layers, strict=True):
            found._matrix[(mine.name, "sum", image.key)] = layer.attention()[0].double().numpy()
            for route, matrix in enumerate(layer.attention(routes="each")[0].double().numpy()):
                found._matrix[(mine.name, route, image.key)] = matrix
    return found


@pytest.fixture(scope="module")
def address(store):
    with served(store) as found:
        yield found
