"""docs/tour.ipynb: its cells run as they stand there, and show what the text says.

Cells are executed here, as the examples of the other pages are, and not by a kernel: warnings are errors, shapes are
checked, nothing may be left on the model, and no ports, processes and thirty further packages are needed for it.
"""

import ast
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from mamba_attn.analytics import AttentionStore
from mamba_attn.layers import Layer

TOUR = json.loads((Path(__file__).parents[1] / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def run(source: str, namespace: dict[str, Any], name: str) -> Any:
    """Run a cell and return the value of its last line, if that is an expression."""
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return None if last is None else eval(compile(last, name, "eval"), namespace)


@pytest.fixture(scope="module")
def shown() -> list[Any]:
    """(value, its HTML) of every cell that shows something."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for number, cell in enumerate(CODE):
        value = run("".join(cell["source"]), namespace, f"tour.ipynb, cell {number}")
        if value is not None:
            values.append((value, value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)))
    return values


def test_every_cell_runs_and_shows_what_the_text_says(shown: list[Any]) -> None:
    values = [value for value, _ in shown]
    assert values[0] == "t-shirt"
    assert isinstance(values[1], Layer)
    assert (tuple(values[2][0]), values[2][1]) == ((64, 64), True)
    kinds = [type(value) for value in values[3:]]
    assert kinds == [go.Figure, go.Figure, AttentionStore, go.Figure, go.Figure]
    points = values[6].data[0]
    assert len(points.x) == 256
    assert len(points.selectedpoints) == 16


def test_handles_are_small_pictures(shown: list[Any]) -> None:
    for value, text in shown:
        if isinstance(value, Layer | AttentionStore):
            assert text.startswith("<div")
            assert text.count("<img") >= 2
            assert len(text) < 150_000


def test_the_notebook_is_committed_without_outputs() -> None:
    assert (TOUR["nbformat"], TOUR["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in TOUR["cells"]}) == len(TOUR["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert {cell["cell_type"] for cell in TOUR["cells"]} == {"markdown", "code"}
