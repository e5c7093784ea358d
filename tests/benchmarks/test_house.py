"""The page about the architecture shows the imports as they are, and the way of an image is the one it takes."""

import re
import sys
from pathlib import Path

import mamba_attn
from benchmarks import house
from mamba_attn import images

ROOT = Path(__file__).parents[2]
AGAIN = "the imports have changed: run `python -m benchmarks.house`"


def test_the_drawing_and_the_table_are_those_of_the_imports():
    rooms = house.imported()
    assert house.DRAWING.read_text() == house.drawing(rooms), AGAIN
    assert house.page(rooms, house.PAGE.read_text()) == house.PAGE.read_text(), AGAIN


def test_an_import_that_another_implies_is_no_arrow():
    rooms = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert house.direct(rooms) == [("a", "b"), ("b", "c")]
    assert "| `commands` | `errors` |" in house.page(
        {name: {"errors"} for floor in house.HOUSE for name in floor}, house.PAGE.read_text()
    )


def test_an_image_goes_through_the_ten_stops_in_this_order(tmp_path):
    stops = re.findall(r"^\d+\. `(mamba_attn/[\w/]+\.py)`", house.PAGE.read_text(), re.MULTILINE)
    assert len(stops) == 10
    seen = {}

    def watch(frame, event, argument):
        if event == "call":
            seen.setdefault(frame.f_code.co_filename, len(seen))

    loaded = mamba_attn.load("vim_digits", weights="demo")
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        mamba_attn.explain(loaded, images.samples()[0], out=tmp_path, methods="raw_attention")
    finally:
        sys.setprofile(before)
    at = [seen[str(ROOT / stop)] for stop in stops]
    assert at == sorted(at), dict(zip(stops, at, strict=True))
