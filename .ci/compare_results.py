"""Print two folders of ``benchmarks/run.py --out`` side by side, as Markdown: compare_results OLD NEW."""

import json
import sys
from pathlib import Path


def rows(folder: Path) -> dict[str, tuple[float, str]]:
    """Return value and unit of every figure of a folder, by what it is."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text())["figures"]:
            if row["value"] is not None:
                found[row["what"] + (f" ({row['how']})" if row["how"] else "")] = (row["value"], row["unit"])
    return found


def table(old: dict[str, tuple[float, str]], new: dict[str, tuple[float, str]]) -> str:
    """Return the figures that both have, and their ratio.

    Args:
        old: of what the change is based on.
        new: of the change.
    """
    lines = ["| what | before | after | after / before |", "|---|---|---|---|"]
    for what, (value, unit) in new.items():
        if what in old:
            before = old[what][0]
            ratio = f"{value / before:.2f}" if before else ""
            lines.append(f"| {what} | {before:.3g} {unit} | {value:.3g} {unit} | {ratio} |")
    return "\n".join(lines)


def main() -> int:
    """Print it."""
    print("Measured on one shared machine, one after the other; repeat before you believe a difference.\n")
    print(table(*(rows(Path(folder)) for folder in sys.argv[1:3])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
