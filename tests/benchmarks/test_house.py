"""The page about the architecture shows the imports as they are, and the way of an image is the one it takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import house

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


FOLLOW = """
import json, sys
import mamba_attn
from mamba_attn import images
loaded = mamba_attn.load("vim_digits", weights="demo")
seen = {}
def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_flags & 1:  # a function, not a file or class that is being imported
        seen.setdefault(frame.f_code.co_filename, len(seen))
sys.setprofile(watch)
mamba_attn.explain(loaded, images.samples()[0], out=sys.argv[1], methods="raw_attention")
sys.setprofile(None)
print(json.dumps(seen))
"""


def test_an_image_goes_through_the_ten_stops_in_this_order(tmp_path):
    stops = re.findall(r"^\d+\. `(mamba_attn/[\w/]+\.py)`", house.PAGE.read_text(), re.MULTILINE)
    assert len(stops) == 10
    # in a process of its own: here, the fixtures that look for leaks are on the way too
    command = [sys.executable, "-c", FOLLOW, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    at = [seen[str(ROOT / stop)] for stop in stops]
    assert at == sorted(at), dict(zip(stops, at, strict=True))
