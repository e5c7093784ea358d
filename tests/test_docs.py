"""The code in docs/: it runs as it stands there, and says what the page says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_attn.attribution import catalogue
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.testing import LawError, check_adapter
from mamba_attn.tracing.adapters import _registered

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str) -> dict[str, Any]:
    """The names that a page's Python blocks leave behind, run one after the other."""
    text = (DOCS / page).read_text()
    namespace: dict[str, Any] = {"__name__": page}
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(DOCS / page), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def family() -> Iterator[dict[str, Any]]:
    before = list(_registered)
    try:
        yield run("adding_a_family.md")
    finally:
        _registered[:] = before


def test_the_worked_example_obeys_the_laws(family: dict[str, Any]) -> None:
    assert family["report"].matrix_error <= 1e-5
    model = family["model"].double()
    report = check_adapter(model, family["images"].double(), tolerance=1e-11)
    assert [layer.name for layer in report.layers] == ["mixers.0", "mixers.1"]
    model.float()


def test_the_worked_examples_matrices_and_maps(family: dict[str, Any]) -> None:
    assert family["heat"].shape == (2, 1, 48, 32)
    matrix = family["trace"]["mixers.0"].attention()
    assert matrix.shape == (2, 96, 96)
    quarter = torch.stack(torch.meshgrid(torch.arange(12) % 2, torch.arange(8) % 2, indexing="ij"), -1).view(96, 2)
    same = (quarter[:, None] == quarter[None]).all(-1)
    assert not matrix[:, ~same].any()
    assert bool((matrix[:, same] != 0).any())


def test_swapping_two_quarters_is_found(family: dict[str, Any]) -> None:
    class Swapped(family["EfficientVMambaAdapter"]):
        def project(self, module: Any, x: Any, **kwargs: Any) -> Any:
            record = super().project(module, x, **kwargs)
            return record.replace(read_order=record.read_order[[1, 0, 2, 3]])

    with pytest.raises(LawError):
        check_adapter(family["model"], family["images"], adapters=[Swapped()])


def test_what_the_worked_example_refuses(family: dict[str, Any]) -> None:
    model, adapter = family["Model"]().eval(), family["EfficientVMambaAdapter"]()
    with pytest.raises(UnsupportedModelError, match="pads odd grids; 11x8"):
        check_adapter(model, torch.randn(1, 3, 44, 32), adapters=[adapter])
    model.mixers[1].step_size = 3
    with pytest.raises(UnsupportedModelError, match=r"mixers\.1.*step_size is 3"):
        check_adapter(model, family["images"], adapters=[adapter])


def test_the_adapter_has_about_forty_lines() -> None:
    text = (DOCS / "adding_a_family.md").read_text()
    adapter = text[text.index("class EfficientVMambaAdapter") : text.index("What each method is for")]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 50


def test_comparing_in_code() -> None:
    found = run("comparing.md")
    assert found["cell"] == 8
    assert 0 <= found["positive"] <= 80
    assert 0 <= found["negative"] <= 80


def test_every_method_that_folds_attention_is_on_the_page_about_folding() -> None:
    text = (DOCS / "aggregation.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert named <= set(catalogue.METHODS)
    assert {name for name, entry in catalogue.METHODS.items() if entry.made_of != catalogue.ANY} == named
