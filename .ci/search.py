"""The site's own search answers what users ask most: each question leads to its page in at most two clicks.

    python .ci/search.py SITE

SITE is what docs/build.py wrote. Without a chromium nothing is checked, and the script says so.
"""

import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote_plus, urldefrag, urljoin

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


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""


def main(site: Path) -> int:
    """Type every question into the search page, and follow what it finds."""
    browser = chromium()
    if browser is None:
        print("no chromium here: the site's search is not checked.")
        return 0
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start, missing = f"http://127.0.0.1:{server.server_port}/", []
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=browser, args=FLAGS).new_page()
        for words, answer in ASKED.items():
            clicks = None
            page.goto(f"{start}search.html?q={quote_plus(words)}")
            page.wait_for_function("() => /found|did not match/.test(document.body.innerText)", timeout=60_000)
            found = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
            found = list(dict.fromkeys(urldefrag(link)[0].partition("?")[0] for link in found))[:SHOWN]
            if start + answer in found:
                clicks = 1
            elif any(start + answer in _links(page, link) for link in found):
                clicks = 2
            print(f"{words}: {'not found' if clicks is None else f'clicks: {clicks}'}")
            missing += [words] * (clicks is None)
    server.shutdown()
    return bool(missing)


def _links(page, address: str) -> list[str]:
    page.goto(address)
    links = page.eval_on_selector_all("article a", "links => links.map(link => link.getAttribute('href'))")
    return [urldefrag(urljoin(address, link))[0] for link in links if link]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
