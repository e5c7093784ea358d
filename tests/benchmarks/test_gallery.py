"""The static gallery: its pages are files below 8 MB that need no server."""

import pytest

from benchmarks import gallery


@pytest.mark.parametrize(
    "name",
    ["text", *(pytest.param(each.name, marks=pytest.mark.full) for each in gallery.PAGES if each.name != "text")],
)
def test_a_page_is_one_file_below_8_megabytes(tmp_path, name):
    page = next(each for each in gallery.PAGES if each.name == name)
    path = gallery.write(page, tmp_path, ("pca",))
    text = path.read_text(encoding="utf-8")
    assert 50_000 < path.stat().st_size < 8_000_000
    assert '"live":false' in text
    assert "Where does" in text


def test_the_index_links_every_page():
    assert all(f'href="{each.name}.html"' in gallery.index() for each in gallery.PAGES)
