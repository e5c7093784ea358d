"""Runs docs/tour.ipynb and stores what its cells show, as small pictures: ``python -m benchmarks.tour``.

A reader who only looks at the file sees them without running it, and without plotly's script. Pictures are taken by
chromium, which draws figures as a notebook does.
"""

import ast
import base64
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"
MADE_BY = "python -m benchmarks.tour"
LARGEST = 60_000  # bytes of a picture
_COLOURS = (256, 128, 64, 32)  # of a picture, as many as fit


def run_cell(source: str, namespace: dict[str, Any], name: str) -> Any:
    """Run a cell and return the value of its last line, if that is an expression.

    Args:
        source: of the cell.
        namespace: of the notebook.
        name: of the cell, for tracebacks.
    """
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return None if last is None else eval(compile(last, name, "eval"), namespace)


def text_of(value: Any) -> str:
    """Return what stands for a value where there are no pictures: the same in every run."""
    if hasattr(value, "to_html"):
        return f"<Figure: {value.layout.title.text or 'points'}>"
    if hasattr(value, "folder"):
        return repr(value).replace(str(value.folder), value.folder.name)
    return repr(value)


def digest(cells: list[dict[str, Any]]) -> str:
    """Return the checksum of all cells and their outputs: who edits one by hand, and not by running it, changes it.

    Args:
        cells: of the notebook.
    """
    contents = [[cell["cell_type"], "".join(cell["source"]), cell.get("outputs", [])] for cell in cells]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def main() -> int:
    """Run the notebook and write it again."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with _browser() as page:
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(code, start=1):
            value = run_cell("".join(cell["source"]), namespace, f"{NOTEBOOK.name}, cell {number}")
            cell["execution_count"] = number
            cell["outputs"] = [] if value is None else [_output(value, number, page)]
    notebook["metadata"]["outputs"] = {"made_by": MADE_BY, "sha256": digest(notebook["cells"])}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size:,} bytes")
    return 0


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser.new_page(viewport={"width": 760, "height": 900}, device_scale_factor=1)
        browser.close()


def _output(value: Any, number: int, page: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": [text_of(value)]}
    if hasattr(value, "to_html"):
        page.set_content(value.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
        data["image/png"] = _picture(page.locator(".plotly-graph-div"))
    elif hasattr(value, "_repr_html_"):
        html = value._repr_html_()
        page.set_content(html.replace(str(value.folder), value.folder.name) if hasattr(value, "folder") else html)
        data["image/png"] = _picture(page.locator("body > div").first)
    return {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}


def _picture(element: Any) -> str:
    """An element of the page as PNG in base64."""
    from PIL import Image

    element.page.wait_for_timeout(500)
    shot = Image.open(io.BytesIO(element.screenshot())).convert("RGB")
    for colours in _COLOURS:
        file = io.BytesIO()
        shot.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() < LARGEST:
            return base64.b64encode(file.getvalue()).decode("ascii")
    raise ValueError(f"a picture of {shot.size} has {file.tell():,} bytes; show less in it.")


if __name__ == "__main__":
    sys.exit(main())
