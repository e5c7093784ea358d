"""Where a chromium is, for tests and measurements: they drive the page as a user does."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """Return the path of the system's chromium, or of the one that playwright installed; None without any."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as driver:
        path = Path(driver.chromium.executable_path)
    return str(path) if path.is_file() else None


@contextmanager
def served(*stores: Any) -> Iterator[str]:
    """The address of an explorer of stores, in threads of this process."""
    from mamba_attn.viewer.server import Explorer
    from mamba_attn.viewer.serving import bound

    with bound(Explorer(list(stores)), "127.0.0.1", 0) as (server, listening):
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
