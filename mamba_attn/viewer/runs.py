"""Packs numbers as runs, to fit a lasso over thousands into an address: 3, 4, 5, 9 become "3:5,9"."""

import re
from collections.abc import Sequence
from typing import Any

_RUN = re.compile(r"(-?\d{1,7})(?::(-?\d{1,7}))?")


def packed(numbers: Sequence[int]) -> str:
    """Return numbers as text, in their order; neighbours that count up become one run."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}:{last}" for first, last in found)


def unpacked(text: str, most: int) -> list[int]:
    """Return the numbers of ``packed``.

    Args:
        text: runs.
        most: numbers.

    Raises:
        ValueError: no runs, or more numbers.
    """
    found: list[int] = []
    for run in text.split(",") if text else []:
        match = _RUN.fullmatch(run)
        if match is None:
            raise ValueError(f"{run[:20]!r} is not a run of numbers")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= most - len(found):
            raise ValueError(f"more than {most} numbers are selected")
        found += range(first, last + 1)
    return found


def packed_pairs(pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return pairs, in their order, as the first numbers and, for each of them, runs of the second ones."""
    firsts: list[int] = []
    lines: list[list[int]] = []
    for first, second in pairs:
        if not firsts or firsts[-1] != first:
            firsts.append(first)
            lines.append([])
        lines[-1].append(second)
    return {"of": firsts, "runs": [packed(line) for line in lines]} if pairs else {}


def unpacked_pairs(given: dict[str, Any], most: int) -> list[list[int]]:
    """Return the pairs of ``packed_pairs``, as lists.

    Args:
        given: its result, from anywhere.
        most: pairs.

    Raises:
        ValueError: something else, or more pairs.
    """
    firsts, lines = given.get("of", []), given.get("runs", [])
    fits = isinstance(firsts, list) and isinstance(lines, list) and len(firsts) == len(lines)
    if not fits or {type(first) for first in firsts} - {int} or {type(line) for line in lines} - {str}:
        raise ValueError("points are runs of numbers")
    found: list[list[int]] = []
    for first, line in zip(firsts, lines, strict=True):
        found += [[first, second] for second in unpacked(line, most - len(found))]
    return found
