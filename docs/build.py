"""Builds the site without a network: warnings are errors, and every internal link leads somewhere.

``python docs/build.py [--quick] [--out FOLDER]``; ``--quick`` does not run the gallery, nor write the live pages.
"""

import argparse
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

HERE = Path(__file__).parent


class _Links(HTMLParser):
    """Collects where a page links to, and what in it can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one tag."""
        given = dict(attrs)
        self.places.update(value for key in ("id", "name") if (value := given.get(key)))
        self.links += [value for key in ("href", "src") if (value := given.get(key))]


def broken_links(site: Path, absent: tuple[str, ...] = ()) -> list[str]:
    """Return the links between pages of a site that lead nowhere, as "page: link".

    Args:
        site: folder of the pages.
        absent: folders that this build left out.
    """
    pages = {}
    for path in sorted(site.rglob("*.html")):
        if path.relative_to(site).parts[0] not in ("live", "_static"):  # pages without links, and the theme's templates
            pages[path.resolve()] = found = _Links()
            found.feed(path.read_text(encoding="utf-8"))
    broken = []
    for path, found in pages.items():
        for link in dict.fromkeys(found.links):
            address, place = urldefrag(link)
            if "://" in address or address.startswith(("mailto:", "data:", "#")):
                continue
            target = (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
            if any(site.resolve() / folder in target.parents for folder in absent):
                continue
            known = pages.get(target)
            if not target.exists() or (place and known and unquote(place) not in known.places):
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


def main(given: list[str] | None = None) -> int:
    """Build, check, and say how long it took."""
    parser = argparse.ArgumentParser(prog="python docs/build.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "_build" / "html", help="folder of the site")
    parser.add_argument("--quick", action="store_true", help="neither run the gallery nor write the live pages")
    args = parser.parse_args(given)
    started = time.perf_counter()
    options = ["-D", "plot_gallery=0", "-D", "live_pages=0"] if args.quick else []
    command = [sys.executable, "-m", "sphinx", "-q", "-aE", "-W", "--keep-going", "-n", "-b", "html", *options]
    built = subprocess.run([*command, str(HERE), str(args.out)]).returncode
    broken = broken_links(args.out, ("live",) if args.quick else ())
    for each in broken:
        print(f"broken link: {each}")
    pages = len(list(args.out.rglob("*.html")))
    print(f"{pages} pages, {len(broken)} broken links, {time.perf_counter() - started:.0f} s")
    return built or bool(broken)


if __name__ == "__main__":
    sys.exit(main())
