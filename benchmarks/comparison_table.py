"""The comparison's figures as the tables of docs/comparing.md: ``python benchmarks/comparison_table.py``."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

from benchmarks.comparison import OURS, is_baseline
from benchmarks.marked_pages import filled

PAGE = Path(__file__).parents[1] / "docs" / "comparing.md"
RESULTS = Path(__file__).parent / "results" / "compare.json"
COLUMNS = {  # part, half, metric
    "positive AUC": ("perturbation", None, "positive_auc_top"),
    "negative AUC": ("perturbation", None, "negative_auc_top"),
    "mIoU of boxes": ("boxes", "report", "miou"),
    "mIoU of digits": ("digits", "report", "miou"),
}
FIGURES = "figures [value, low, high, images, place]"
FAMILIES = ("vim", "vmamba", "vit")
Cells = dict[str, dict[tuple[str, str], str]]


def methods_table(results: Mapping[str, Any]) -> str:
    """Return a table of methods by model family, sorted by the first figure that each has.

    Args:
        results: contents of compare.json.
    """
    cells: Cells = {}
    order: dict[str, tuple[int, float]] = {}
    for column, where in COLUMNS.items():
        for table in _tables(results, *where):
            family = table["model"].partition("_")[0]
            for method, (value, _, _, images, _) in table[FIGURES][where[2]].items():
                fewer = f" ({images})" if images < table["images"] else ""
                name = _short(method)
                cells.setdefault(name, {})[family, column] = f"{value:.1f}{fewer}"
                order.setdefault(name, (FAMILIES.index(family), value))
    lines = [f"| method | {' | '.join(FAMILIES)} |", f"|---|{'---|' * len(FAMILIES)}"]
    for name in sorted(order, key=lambda each: order[each]):
        lines.append(f"| `{name}` | {' | '.join(_cell(cells[name], family) for family in FAMILIES)} |")
    return "\n".join(lines)


def standing_table(results: Mapping[str, Any]) -> str:
    """Return where our combination stands: ahead of which baselines by the paired interval, and behind what.

    Args:
        results: contents of compare.json.
    """
    lines = ["| | ours is ahead of, of the baselines | not ahead of | before it in the table |", "|---|---|---|---|"]
    for what, where in COLUMNS.items():
        for table in _tables(results, *where):
            found, ahead = table[FIGURES][where[2]], table["ours is ahead of"].get(where[2], [])
            if OURS not in found:
                continue
            baselines = [name for name in found if is_baseline(name)]
            missed = [name for name in baselines if name not in ahead]
            before = list(found)[: list(found).index(OURS)]
            row = (f"{table['model']}, {what}", f"{len(baselines) - len(missed)} of {len(baselines)}", _names(missed),
                   _names(before))  # fmt: skip
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def hours(results: Mapping[str, Any]) -> str:
    """Return what the table costs, in words.

    Args:
        results: contents of compare.json.
    """
    found = results["details"]["core hours"]
    quick = found["quick methods"]
    return (
        f"One core needs {sum(found['with all methods'].values()):.1f} hours for it, and "
        f"{sum(found['with quick methods'].values()):.1f} for the {len(quick)} quick methods alone "
        f"({_names(quick)}), told from the first {found['timed images']} images of every collection."
    )


def _tables(results: Mapping[str, Any], part: str, half: str | None, _: str) -> list[dict[str, Any]]:
    details = results["details"][part]
    found: list[dict[str, Any]] = details["tables"] if half is None else details["halves"][half]
    return found


def _short(method: str) -> str:
    """Without options that differ between collections."""
    return method.partition(":")[0] if method.startswith(("occlusion", "integrated")) else method


def _names(methods: Sequence[str]) -> str:
    return ", ".join(f"`{_short(name)}`" for name in methods) or "none"


def _cell(found: Mapping[tuple[str, str], str], family: str) -> str:
    texts = [found.get((family, column), "") for column in COLUMNS]
    return " / ".join(text or "-" for text in texts) if any(texts) else ""


PARTS = {"hours": hours, "methods": methods_table, "standing": standing_table}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), PARTS, json.loads(RESULTS.read_text())))
