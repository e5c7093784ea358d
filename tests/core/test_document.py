"""Pages from templates: names stay text, what a template asks for has to be there, charts are whole SVG."""

import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from mamba_attn.core.document import Look, Plot, render

EVIL = "<b onclick='alert(1)'>\" & co"


def test_plain_text_stays_text_and_the_command_stands_at_the_end():
    page = render("explain_index.html", title=EVIL, pages=[(EVIL, 'a"b', "")], command=EVIL)
    assert "<b onclick" not in page
    assert page.count("&lt;b onclick=&#39;alert(1)&#39;&gt;&#34; &amp; co") == 5
    assert 'href="a&#34;b.html"' in page
    assert "<h2>How to reproduce this page</h2>" in page
    assert "How to reproduce" not in render("explain_index.html", title="", pages=[])
    assert "<h1><i>x</i></h1>" in render("explain_index.html", title=Markup("<i>x</i>"), pages=[])


def test_a_name_that_is_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="pages"):
        render("explain_index.html", title="")


def test_pages_need_no_network():
    for path in files("mamba_attn").joinpath("templates").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|@import|<link(?! rel=\"icon\" href=\"data:)|src=[\"'](?!{{)", text), path.name


def test_a_plot_is_svg_in_the_order_of_drawing():
    plot = Plot(30, 20)
    plot.level(0, 30, 10, Look("#e4e4e4", width=1))
    plot.line([(0, 1), (2.04, 3)], Look("red", "4 3"), EVIL)
    plot.dot(1, 2, "red")
    plot.text(1, 2, EVIL, "start", bold=True)
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

        def handle_data(self, data):
            found.append(data)

    Tags(convert_charrefs=True).feed(plot.svg())
    tags = [each for each in found if isinstance(each, tuple)]
    assert [tag for tag, _ in tags] == ["svg", "line", "polyline", "title", "circle", "text"]
    assert tags[0][1]["viewbox"] == "0 0 30 20"
    assert tags[2][1]["points"] == "0.0,1.0 2.0,3.0"
    assert tags[2][1]["stroke-dasharray"] == "4 3"
    assert "stroke-dasharray" not in tags[1][1]
    assert [each for each in found if isinstance(each, str)] == [EVIL, EVIL]
