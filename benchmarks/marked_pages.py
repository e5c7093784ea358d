"""Pages whose marked parts are written from results: ``<!-- NAME: from results/FILE -->`` to ``<!-- end -->``."""

import re
from collections.abc import Callable, Mapping
from typing import Any

_MARK = re.compile(r"(<!-- (\w[\w ]*): from results/[\w.]+ -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, parts: Mapping[str, Callable[[dict[str, Any]], str]], results: dict[str, Any]) -> str:
    """Return the page with every marked part rewritten.

    Args:
        text: of the page.
        parts: what writes each part, by the name in its mark.
        results: what every part is given.

    Raises:
        ValueError: a mark of the page names no part, or a part has no mark.
    """
    marks = [match[2] for match in _MARK.finditer(text)]
    if sorted(marks) != sorted(parts):
        raise ValueError(f"the page has marks for {sorted(marks)}; expected one for each of {sorted(parts)}.")
    return _MARK.sub(lambda match: f"{match[1]}{parts[match[2]](results).rstrip()}\n{match[3]}", text)
