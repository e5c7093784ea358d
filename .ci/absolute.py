"""Prepare a tree for PyPI: absolute REPOSITORY TAG, e.g. ``absolute https://github.com/OWNER/NAME v0.2.0``.

PyPI shows the README without the files beside it, so its links and pictures must name a host. A checkout knows none;
the release workflow does. It also fills in ``[project.urls]``.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)]+)\)")


def absolute(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose links and pictures name the host.

    Args:
        text: of the README.
        repository: address, without a slash at its end.
        tag: of the release.
    """

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({repository}/{kind}/{tag}/{match[3]})"

    return LINK.sub(link, text)


def with_urls(project: str, repository: str, tag: str) -> str:
    """Return ``pyproject.toml`` with the addresses of the repository.

    Args:
        project: its text.
        repository: as in ``absolute``.
        tag: of the release.
    """
    urls = {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{tag}/docs",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    lines = "".join(f'{name} = "{address}"\n' for name, address in urls.items())
    return project.replace("[project.urls]\n", f"[project.urls]\n{lines}", 1)


def main() -> int:
    """Rewrite both files."""
    repository, tag = sys.argv[1].rstrip("/"), sys.argv[2]
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = ROOT / name
        path.write_text(change(path.read_text(), repository, tag))
    return 0


if __name__ == "__main__":
    sys.exit(main())
