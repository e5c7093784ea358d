"""Write the table of cuda/README.md from the counted issue slots.

python -m benchmarks.kernel.slots_page
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.kernel.slots import WORK
from benchmarks.marked_pages import filled

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "cuda" / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "slots.json"


def table(results: dict[str, Any]) -> str:
    """One line per kernel and size that is a whole model's: 24 layers, a batch of 8."""
    lines = ["| 24 layers, batch 8 | kernel | steps | states | ms |", "|---|---|---|---|---|"]
    for work in WORK:
        if work.copies % 24:
            continue
        ideal = results["details"][work.what]["ideal ms"]
        what = work.what.replace(" slots", "")
        lines.append(f"| {what} | `{work.kernel}` | {work.length} | {work.states} | {ideal:.2f} |")
    return "\n".join(lines)


PARTS = {"slots": table}


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(), PARTS, json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
