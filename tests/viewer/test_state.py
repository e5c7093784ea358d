import base64
import json
import random
import zlib

import pytest

from mamba_attn.viewer.state import LONGEST, Pane, State

FULL = State(
    (Pane(layer=3, route=2, mode="blocks", gate=True, opacity=0.5), Pane(what="difference", image=7)),
    (8, 12), (0, 95, -1), ((2, 1), (3, 0)),
)  # fmt: skip


@pytest.mark.parametrize("state", [State(), FULL])
def test_a_state_comes_back_from_json_and_from_an_address(state):
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state
    text = state.to_url()
    assert text.replace("-", "").replace("_", "").isalnum()
    assert State.from_url(text) == state


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "the state is an object"),
        ({"panes": []}, "one or two panes"),
        ({"panes": [{}] * 3}, "one or two panes"),
        ({"panes": [{"mode": "<script>"}]}, "mode is one of"),
        ({"panes": [{"layer": 1.5}]}, "layer is a list of whole numbers"),
        ({"panes": [{"layer": 10**9}]}, "layer is out of range"),
        ({"panes": [{"gate": 1}]}, "gate is true or false"),
        ({"panes": [{"opacity": 2}]}, "opacity lies in"),
        ({"grid": [0, 4]}, "the grid 0x4 is not possible"),
        ({"grid": [2, 2], "cells": [4]}, "cells outside a grid of 2x2"),
        ({"cells": [True]}, "cells is a list of whole numbers"),
        ({"cells": [0] * 70_000}, "cells is a list"),
        ({"points": [[1]]}, "points is a list of 2 whole numbers"),
    ],
)
def test_what_is_no_state_is_refused_in_words(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        State.from_json(given)


@pytest.mark.parametrize("text", ["%%%", "AAAA", "e", "eJw", "a" * (LONGEST + 1)])
def test_an_address_that_is_none_is_refused_in_words(text):
    with pytest.raises(ValueError, match=r"state in the address cannot be read|more than"):
        State.from_url(text)


def test_any_lasso_over_a_thousand_images_fits_an_address():
    pairs = [(layer, image) for layer in range(12) for image in range(1000)]
    chance = random.Random(0)
    for count in (1000, 6000, 9000, 12_000):
        state = State(points=tuple(sorted(chance.sample(pairs, count))), grid=(64, 64), cells=tuple(range(4096)))
        assert State.from_url(state.to_url()) == state
    # an order that no gesture makes is left out
    wild = State((Pane(layer=2),), points=tuple(chance.sample(pairs, 12_000)))
    assert State.from_url(wild.to_url()) == State((Pane(layer=2),))


def test_addresses_of_lists_are_still_read():
    old = base64.urlsafe_b64encode(zlib.compress(json.dumps(FULL.to_json()).encode())).decode().rstrip("=")
    assert State.from_url(old) == FULL


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cells": "0:9999999"}, "more than 65536 numbers"),
        ({"cells": "1:x"}, "not a run of numbers"),
        ({"points": {"of": [1], "runs": []}}, "points are runs"),
        ({"points": {"of": ["a"], "runs": ["1"]}}, "points are runs"),
        ({"points": {"of": [1] * 3, "runs": ["0:30000"] * 3}}, "more than 5534 numbers"),
    ],
)
def test_runs_that_are_none_are_refused_in_words(given, sentence):
    text = base64.urlsafe_b64encode(zlib.compress(json.dumps(given).encode())).decode().rstrip("=")
    with pytest.raises(ValueError, match=sentence):
        State.from_url(text)


def test_an_address_cannot_unfold_to_a_flood():
    flood = base64.urlsafe_b64encode(zlib.compress(b"[" * 2**23, 9)).decode().rstrip("=")
    assert len(flood) < LONGEST
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        State.from_url(flood)


def test_chosen_cells_lie_at_the_same_place_on_other_grids():
    state = State(grid=(2, 3), cells=(0, 5, -1))
    assert state.on_grid((2, 3)) == [0, 5]
    assert state.on_grid((4, 6)) == [0, 1, 6, 7, 16, 17, 22, 23]
    assert State(grid=(4, 6), cells=(16, 17, 22, 23)).on_grid((2, 3)) == [5]
    assert State(grid=(4, 6), cells=(23,)).on_grid((2, 3)) == [5]  # a cell that holds no centre of the larger ones
