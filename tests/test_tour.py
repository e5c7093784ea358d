"""docs/tour.ipynb: its cells run as they stand there, and show what the text says.

Cells are executed here, as the examples of the other pages are, and not by a kernel: warnings are errors, shapes are
checked, nothing may be left on the model, and no ports, processes and thirty further packages are needed for it.
"""

import base64
import io
import json
from typing import Any

import plotly.graph_objects as go
import pytest
from PIL import Image

from benchmarks.tour import LARGEST, MADE_BY, NOTEBOOK, digest, run_cell, text_of
from mamba_attn.analytics import AttentionStore
from mamba_attn.tracing.layers import Layer

TOUR = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def shown() -> list[Any]:
    """(value, its HTML) of every cell that shows something."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for number, cell in enumerate(CODE):
        value = run_cell("".join(cell["source"]), namespace, f"tour.ipynb, cell {number}")
        assert bool(cell["outputs"]) == (value is not None)
        if value is not None:
            (output,) = cell["outputs"]
            assert output["data"]["text/plain"] == [text_of(value)]
            values.append((value, value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)))
    return values


def test_every_cell_runs_and_shows_what_the_text_says(shown: list[Any]) -> None:
    values = [value for value, _ in shown]
    assert values[0] == "t-shirt"
    assert isinstance(values[1], Layer)
    assert (tuple(values[2][0]), values[2][1]) == ((64, 64), True)
    kinds = [go.Figure, go.Figure, AttentionStore, go.Figure, go.Figure]
    assert all(isinstance(value, kind) for value, kind in zip(values[3:], kinds, strict=True))
    points = values[6].data[0]
    assert len(points.x) == 256
    assert len(points.selectedpoints) == 16


def test_handles_are_small_pictures(shown: list[Any]) -> None:
    for value, text in shown:
        if isinstance(value, Layer | AttentionStore):
            assert text.startswith("<div")
            assert text.count("<img") >= 2
            assert len(text) < 150_000


def test_the_outputs_are_those_of_a_run_and_small() -> None:
    again = f"run {MADE_BY}: cells and outputs of the notebook are not those of one run"
    assert TOUR["metadata"]["outputs"] == {"made_by": MADE_BY, "sha256": digest(TOUR["cells"])}, again
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1)), again
    assert NOTEBOOK.stat().st_size < 600_000
    pictures = [output["data"]["image/png"] for cell in CODE for output in cell["outputs"] if len(output["data"]) > 1]
    assert len(pictures) == 6
    for text in pictures:
        content = base64.b64decode(text, validate=True)
        assert len(content) < LARGEST
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) >= 200
            assert len(picture.convert("RGB").getcolors(2**20)) > 20  # something is drawn


def test_an_edit_by_hand_is_seen() -> None:
    for change in ({"source": ["1 + 1"]}, {"outputs": []}):
        cells = [*TOUR["cells"][:-1], {**TOUR["cells"][-1], **change}]
        cells[4] = {**cells[4], **change}
        assert digest(cells) != TOUR["metadata"]["outputs"]["sha256"]


def test_the_notebook_is_well_formed() -> None:
    assert (TOUR["nbformat"], TOUR["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in TOUR["cells"]}) == len(TOUR["cells"])
    assert {cell["cell_type"] for cell in TOUR["cells"]} == {"markdown", "code"}
