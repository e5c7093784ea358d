"""The site's own search answers what users ask most: each question leads to its page in at most two clicks.

    python .ci/search.py SITE

SITE is what docs/build.py wrote. The first click is on one of the first results; the second on a link in the text of
the page that it opened, and not in a list of all pages, which would lead anywhere. Without a chromium the check fails,
unless MAMBA_ATTN_NO_BROWSER is set.
"""

import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote_plus, urldefrag

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.browser import FLAGS, chromium

ASKED = {  # the words somebody types: where the answer is
    "my own model": "how-to/own_model.html",
    "fine-tuned number of classes": "how-to/own_model.html",
    "normalisation mean std": "how-to/own_model.html",
    "checkpoint does not load": "how-to/own_model.html",
    "trained at another resolution": "how-to/own_model.html",
    "own network mamba_ssm blocks": "how-to/unet_of_mamba_blocks.html",
    "segmentation pixel": "how-to/segmentation_pixel.html",
}
SHOWN = 5  # results that a reader looks at
SKIP = "MAMBA_ATTN_NO_BROWSER"
# lists of pages: contents, and the thumbnails of a gallery
_LISTS = "nav, .toctree-wrapper, .sphx-glr-thumbnails, .sphx-glr-thumbcontainer"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that left a page before all of it was sent."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError | ConnectionResetError):
            super().handle_error(request, client_address)


def main(site: Path) -> int:
    """Type every question into the search page, and click on what it finds."""
    browser = chromium()
    if browser is None:
        meant = bool(os.environ.get(SKIP))
        print(f"no chromium here: the site's search is not checked{f', as {SKIP} says' if meant else ''}.")
        if not meant:
            print(f"Install one, or set {SKIP}=1 where it is meant to be left out.")
        return 0 if meant else 1
    from playwright.sync_api import sync_playwright

    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start, missing = f"http://127.0.0.1:{server.server_port}/", []
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=browser, args=FLAGS).new_page()
        for words, answer in ASKED.items():
            way = _way(page, start, words, start + answer)
            shown = " > ".join(each.removeprefix(start) for each in way)
            print(f"{words}: {f'clicks: {len(way)} ({shown})' if way else 'not found'}")
            missing += [words] * (not way)
    server.shutdown()
    server.server_close()
    return 1 if missing else 0


def _way(page, start: str, words: str, answer: str) -> list[str]:
    """Return the pages that one or two clicks led to, the last one with the answer; none if they do not lead there."""
    found = _search(page, start, words)
    for result in [answer] if answer in found else found:
        _search(page, start, words)
        _click(page, "#search-results li a", result)
        if _page(page.url) == answer:
            return [answer]
        if answer in _links(page, "article a") and _click(page, "article a", answer):
            return [result, _page(page.url)]
    return []


def _search(page, start: str, words: str) -> list[str]:
    """Return the pages that a reader is offered."""
    page.goto(f"{start}search.html?q={quote_plus(words)}")
    page.wait_for_function("() => /found|did not match/.test(document.body.innerText)", timeout=60_000)
    return _links(page, "#search-results li a")[:SHOWN]


def _links(page, where: str) -> list[str]:
    """Return the pages that visible links lead to, without those of lists of pages."""
    script = "(links, lists) => links.filter(a => a.checkVisibility() && !a.closest(lists)).map(a => a.href)"
    return list(dict.fromkeys(map(_page, page.eval_on_selector_all(where, script, _LISTS))))


def _click(page, where: str, target: str) -> bool:
    """Click on the first link to a page; return whether that page opened."""
    for link in page.query_selector_all(where):
        if _page(link.evaluate("a => a.href")) == target and not link.evaluate("(a, l) => a.closest(l)", _LISTS):
            with page.expect_navigation():
                link.click()
            return _page(page.url) == target
    return False


def _page(address: str) -> str:
    return urldefrag(address)[0].partition("?")[0]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
