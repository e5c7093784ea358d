"""The page about the kernels has the issue slots of the results."""

import json

from benchmarks.kernel import slots_page
from benchmarks.marked_pages import filled


def test_the_page_has_the_slots_of_the_results() -> None:
    results = json.loads(slots_page.RESULTS.read_text())
    page = slots_page.PAGE.read_text()
    assert filled(page, slots_page.PARTS, results) == page, "python -m benchmarks.kernel.slots_page writes it"
    details = results["details"]
    assert details["Mamba-2 scan slots"]["slots"] < details["Mamba-2 scan slots by channel"]["slots"]
