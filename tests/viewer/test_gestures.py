import numpy as np
import pytest

from mamba_attn.viewer.gestures import clicked, dragged, enclosed, moved, numbers
from mamba_attn.viewer.state import State

GRID = (3, 4)


@pytest.mark.parametrize(
    ("event", "cells"),
    [
        ({"points": [{"x": 2, "y": 1}]}, [6]),
        ({"points": [{"x": 4, "y": 1}]}, []),
        ({"points": [{"x": float("nan"), "y": 1}]}, []),
        ({"points": [{"x": float("inf"), "y": 1}]}, []),
        ({"points": [{"x": "a", "y": 1}]}, []),
        ({"points": []}, []),
        (None, []),
    ],
)
def test_a_click_is_a_cell_or_nothing(event, cells):
    assert clicked(event, GRID) == cells


@pytest.mark.parametrize(
    ("event", "cells"),
    [
        ({"range": {"x": [0.6, 2.4], "y": [1.4, 0.7]}}, [5, 6]),
        ({"range": {"x": [1.1, 1.2], "y": [0.1, 0.2]}}, [1]),  # inside one cell
        ({"lassoPoints": {"x": [-0.5, 1.5, -0.5], "y": [-0.5, -0.5, 1.5]}}, [0]),
        ({"lassoPoints": {"x": [-1, 3.2, 3.2, -1], "y": [0.5, 0.5, 1.5, 1.5]}}, [4, 5, 6, 7]),
        ({"lassoPoints": {"x": [0]}}, []),
        ({"range": {"x": [0], "y": [0, 1]}}, []),
        ({}, []),
        ("text", []),
    ],
)
def test_a_drag_is_the_cells_that_it_holds(event, cells):
    assert dragged(event, GRID) == cells


@pytest.mark.parametrize(
    ("event", "found"),
    [
        ({"range": {"x": [2, -0.1], "y": [-1, 1]}}, [0, 1]),
        ({"lassoPoints": {"x": [0.5, 3, 3, 0.5], "y": [-1, -1, 6, 6]}}, [1, 2]),
        ({"range": {"x": [float("nan"), 1], "y": [0, 1]}}, []),
        ({"points": [{"customdata": 1}]}, []),
        (None, []),
    ],
)
def test_a_drag_is_the_points_that_it_holds(event, found):
    assert enclosed(event, np.array([[0.0, 0.0], [1.0, 0.5], [2.0, 5.0]])) == found


def test_numbers_of_points_are_counted_once_and_within_bounds():
    event = {"points": [{"customdata": 3}, {"customdata": [1]}, {"customdata": 3}, {"customdata": 9}, {}, 7]}
    assert numbers(event, 4) == [1, 3]
    assert numbers({"points": 5}, 4) == numbers(None, 4) == []


def test_arrows_move_the_chosen_patch_and_stop_at_the_edge():
    assert moved(State(), "ArrowUp", GRID) == [6]
    assert moved(State(grid=GRID, cells=(6,)), "ArrowUp", GRID) == [2]
    assert moved(State(grid=GRID, cells=(2,)), "ArrowUp", GRID) == [2]
    assert moved(State(grid=GRID, cells=(7,)), "ArrowRight", GRID) == [7]
