"""The answer whether PCA is needed first is that of its results."""

import json

from benchmarks import embedding
from benchmarks.marked_pages import filled


def test_the_page_has_the_answer_of_the_results() -> None:
    page = embedding.PAGE.read_text()
    assert filled(page, embedding.PARTS, json.loads(embedding.RESULTS.read_text())) == page


def test_the_answer_follows_the_numbers() -> None:
    trust, overlap = {"with": [0.9, 0.8], "without": [0.7, 0.7]}, {"with": [0.5], "without": [0.4]}
    check = {"trustworthiness": trust, "overlap": overlap, "kept": 0.6, "needed": True}
    details = {"how": "", "points": 20, "a, tsne": check, "a, umap": check | {"needed": False, "kept": 0.7}}
    rows = embedding.answer({"details": details}).splitlines()
    assert rows[2] == "| a, tsne | 0.850 / 0.700 | 0.500 / 0.400 | yes |"
    assert rows[-1].startswith("Needed in 1 of 2 cases: 20 points")
    assert "keep 60% to 70% of the 12" in rows[-1]
    del details["a, tsne"]
    assert "Not needed in any" in embedding.answer({"details": details})
