"""What the page asks for, checked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_attn.viewer.state import CELLS, Pane, unpacked


def test_a_pane_of_json_is_the_pane():
    asked = {"store": 1, "layer": 3, "route": -1, "what": "image", "gate": True, "method": "umap", "unknown": 7}
    assert Pane.parsed(asked) == Pane(1, 3, -1, what="image", gate=True, method="umap")
    assert Pane.parsed({}) == Pane()


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer", -1), ("layer", True), ("layer", 1.0), ("layer", 10**7), ("route", -2), ("what", "all"),
     ("what", ["mean"]), ("gate", 1), ("mode", None), ("image", "0")],
)  # fmt: skip
def test_what_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Pane.parsed({name: value})


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_pane_is_an_object(value):
    with pytest.raises(ValueError, match="a pane is an object"):
        Pane.parsed(value)


@given(st.lists(st.integers(-64, 9999), max_size=60))
def test_runs_hold_any_numbers_in_their_order(numbers):
    assert unpacked(",".join(map(str, numbers))) == numbers
    assert unpacked(",".join(f"{number}:{number + 2}" for number in numbers)) == [
        number + more for number in numbers for more in range(3)
    ]


@pytest.mark.parametrize("text", ["a", "1:", ":1", "1,,2", "1.5", f"0:{CELLS}", "1:2:3", "\u0663", None, 3, [1]])
def test_damaged_runs_are_refused(text):
    with pytest.raises(ValueError, match=r"run|more than"):
        unpacked(text)
