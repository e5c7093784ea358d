"""The site's own code, without Sphinx: links, pages that a reader can reach, and the scripts of the gallery."""

import ast
import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCRIPTS = sorted((DOCS / "examples").glob("*.py"))
QUICK = {"05_fork", "09_text"}  # the others are run by building the site too


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_gallery_has_a_question_per_script():
    assert 10 <= len(SCRIPTS) <= 14
    for number, path in enumerate(SCRIPTS, 1):
        assert path.stem.startswith(f"{number:02}_")
        text = path.read_text()
        title, line = ast.get_docstring(ast.parse(text)).splitlines()[:2]
        assert line == "=" * len(title)
        assert "figures." in text
        assert len(text.splitlines()) < 110


@pytest.mark.parametrize(
    "path",
    [pytest.param(each, marks=[] if each.stem in QUICK else pytest.mark.full) for each in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_a_script_of_the_gallery_runs(path):
    names = runpy.run_path(str(path))
    if path.stem == "05_fork":
        matrix = names["trace"]["snakes.0"].attention()[0]
        assert matrix.shape == (64, 64)
        order = names["trace"]["snakes.0"].scan.read_order
        grid = torch.arange(64).view(8, 8)
        assert torch.equal(order[0], grid.flatten())
        assert torch.equal(order[1], grid.T.flatten().flip(0))
    if path.stem == "09_text":
        words = names["words"]
        assert words[int(names["heat"][0, :-1].argmax())] in (" charming", " hilarious")


def test_every_page_is_reached_from_the_first():
    reached, queue = set(), ["index"]
    while queue:
        page = queue.pop()
        path = DOCS / f"{page}.md"
        if page in reached or not path.exists():  # pages that the build writes
            continue
        reached.add(page)
        for block in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.DOTALL):
            entries = [line for line in block.splitlines() if line and line[0] != ":"]
            queue += [(path.parent / entry).resolve().relative_to(DOCS.resolve()).as_posix() for entry in entries]
    assert {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")} <= {*reached, *IGNORED}


IGNORED = {path.relative_to(DOCS).with_suffix("").as_posix() for path in (DOCS / "_build").rglob("*.md")}


def test_links_between_pages_of_the_repository_lead_somewhere():
    for path in [*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md"), ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)(?:#[^)]*)?\)", text):
            written = target.startswith(("gallery/", "api/", "../gallery/", "../api/"))  # by building the site
            assert written or (path.parent / target).exists(), f"{path.name}: {target}"


def test_links_outside_docs_lead_to_the_repository_or_nowhere():
    resolved = module(DOCS / "_ext" / "outside_links.py").resolved
    text = "[results](../benchmarks/results), [other](../comparing.md) and [part](../cuda/README.md#part)"
    at_host = resolved(text, "results", "https://host/it")
    assert at_host == (
        "[results](https://host/it/blob/main/benchmarks/results), [other](https://host/it/blob/main/comparing.md) and "
        "[part](https://host/it/blob/main/cuda/README.md#part)"
    )
    assert (
        resolved(text, "how-to/loop", "")
        == "[results](../benchmarks/results), [other](../comparing.md) and [part](../cuda/README.md#part)"
    )
    assert resolved(text, "results", "") == "results, other and part"


def test_links_of_the_site_that_lead_nowhere_are_found(tmp_path):
    broken_links = module(DOCS / "build.py").broken_links
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="sub/b.html#there">1</a><a href="#here">2</a><a href="gone.html">3</a>'
        '<a href="https://elsewhere">4</a><a href="live/page.html">5</a><a href="sub/b.html#gone">6</a>'
    )
    (tmp_path / "sub" / "b.html").write_text('<p id="there"><img src="../picture.png"><a href="../a.html#here">7</a>')
    found = ["a.html: gone.html", "a.html: sub/b.html#gone", "sub/b.html: ../picture.png"]
    assert broken_links(tmp_path, ("live",)) == found
    assert broken_links(tmp_path) == sorted([*found, "a.html: live/page.html"])


def _site(folder):
    """A site whose search finds one page, which links to another in its text and to a third in its contents."""
    pages = {
        "search": "<p>1 page found</p><div id=search-results><ul><li><a href='found.html?q=x#x'>found</a></ul></div>",
        "found": "<article><p><a href='linked.html#there'>see</a><div class=toctree-wrapper><a href='listed.html'>"
        "all</a></div><a href='hidden.html' style='display: none'>no</a></article><a href='beside.html'>next</a>",
        **dict.fromkeys(["linked", "listed", "hidden", "beside"], "<article>text</article>"),
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(f"<!doctype html><html><body>{text}</body></html>")
    return folder


def test_two_clicks_are_a_result_and_a_link_in_the_text_of_its_page(tmp_path, monkeypatch, capfd):
    search = module(ROOT / ".ci" / "search.py")
    if search.chromium() is None:
        pytest.skip("no chromium")
    site = _site(tmp_path)
    for answer, said in {"found": "clicks: 1", "linked": "clicks: 2"}.items():
        monkeypatch.setattr(search, "ASKED", {"words": f"{answer}.html"})
        assert search.main(site) == 0
        assert said in capfd.readouterr().out
    monkeypatch.setattr(search, "ASKED", {each: f"{each}.html" for each in ("listed", "hidden", "beside")})
    assert search.main(site) == 1
    captured = capfd.readouterr()
    assert captured.out.count("not found") == 3
    assert captured.err == ""


def test_without_a_browser_the_search_fails_unless_that_is_meant(tmp_path, monkeypatch, capsys):
    search = module(ROOT / ".ci" / "search.py")
    monkeypatch.setattr(search, "chromium", lambda: None)
    monkeypatch.delenv(search.SKIP, raising=False)
    assert search.main(tmp_path) == 1
    assert "the site's search is not checked." in capsys.readouterr().out
    monkeypatch.setenv(search.SKIP, "1")
    assert search.main(tmp_path) == 0


def test_only_a_browser_that_left_is_passed_over(capsys):
    search = module(ROOT / ".ci" / "search.py")
    server = search._Server.__new__(search._Server)
    for error, said in ((BrokenPipeError(), False), (ConnectionResetError(), False), (ValueError("own"), True)):
        try:
            raise error
        except (OSError, ValueError):
            server.handle_error(None, ("127.0.0.1", 1))
        assert ("own" in capsys.readouterr().err) is said
