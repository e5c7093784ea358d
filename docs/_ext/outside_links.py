"""Links from docs/ to files outside it: on the site they lead to the repository, or are plain text without one."""

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]*)(#[^)]*)?\)")


def resolved(text: str, page: str, repository: str) -> str:
    """Return a page whose links to files outside docs/ lead to the repository.

    Args:
        text: of the page, as a code host shows it.
        page: its name, such as "how-to/training_loop".
        repository: address, or "" where there is none.
    """

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match[2]))
        if path.startswith("docs/"):
            return match[0]
        return f"[{match[1]}]({repository}/blob/main/{path}{match[3] or ''})" if repository else match[1]

    return LINK.sub(link, text)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""

    def read(app: Any, page: str, source: list[str]) -> None:
        source[0] = resolved(source[0], page, app.config.repository)

    app.add_config_value("repository", "", "env")
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
