"""Marked parts of a page are written anew, and nothing else is."""

import pytest

from benchmarks.marked_pages import filled

END = "<!-- end -->\n"
FIRST, SECOND = "<!-- two words: from results/x.json -->\n", "<!-- b: from results/x.json -->\n"
PAGE = f"before\n{FIRST}old\n{END}between\n{SECOND}{END}"


def test_marked_parts_alone_change() -> None:
    parts = {"two words": lambda results: f"new {results['n']}\n\n", "b": lambda _: "also"}
    page = filled(PAGE, parts, {"n": 3})
    assert page == f"before\n{FIRST}new 3\n{END}between\n{SECOND}also\n{END}"
    assert filled(page, parts, {"n": 3}) == page


@pytest.mark.parametrize("names", [("two words",), ("two words", "b", "weather")])
def test_marks_and_parts_are_the_same(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"marks for \['b', 'two words'\]; expected one for each of"):
        filled(PAGE, dict.fromkeys(names, lambda _: ""), {})
