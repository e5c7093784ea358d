"""What is announced to go: the warning points at the user's line, and nothing outlives its version."""

import ast
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from mamba_attn.core.deprecation import warn_deprecated

ROOT = Path(__file__).parents[2]


def old(value=None):
    if value is not None:
        warn_deprecated("old(value=3): value", write="new=", gone="9.0")


def test_the_warning_says_what_to_write_and_points_at_the_line_that_called():
    with pytest.warns(
        DeprecationWarning, match=r"^old\(value=3\): value is deprecated; write new=. It stops .* 9\.0\.$"
    ) as found:
        old(3)
    assert found[0].filename == __file__


def announced():
    """(file, version) of every use of the helper in the library."""
    for path in (ROOT / "mamba_attn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "warn_deprecated":
                (gone,) = [keyword.value.value for keyword in node.keywords if keyword.arg == "gone"]
                yield path.name, gone


def test_nothing_outlives_its_version():
    version = Version(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    found = list(announced())
    assert found
    assert not [name for name, gone in found if Version(gone) <= version]


def test_what_goes_is_on_the_page_about_it():
    page = (ROOT / "docs" / "stability.md").read_text()
    assert all(f"to be removed in {gone}" in page for _, gone in announced())
