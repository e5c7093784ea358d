"""Write the tables of docs/text.md from the results.

python -m benchmarks.text_page
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import text_perturbation, text_truth
from benchmarks.marked_pages import filled

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "text.md"
PARTS = {
    "known truth": text_truth.table,
    "trainings": text_truth.trainings,
    "missed": text_truth.missed,
    "areas": text_perturbation.table,
}


def measured() -> dict[str, Any]:
    """The results that the page shows, by what they are about."""
    files = {"truth": "text_truth", "areas": "text_perturbation"}
    return {what: json.loads((HERE / "results" / f"{file}.json").read_text()) for what, file in files.items()}


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(), PARTS, measured()))


if __name__ == "__main__":
    main()
