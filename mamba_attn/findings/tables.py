"""Findings as tables: aligned text, CSV and JSON."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mamba_attn.findings.accuracy import Orders
from mamba_attn.findings.controls import ALL, Report, Row
from mamba_attn.findings.intervals import Estimate
from mamba_attn.findings.registry import FINDINGS, Finding
from mamba_attn.findings.results import MODEL

Texts = tuple[str, list[str], list[list[str]]]
TERMS = {
    "trained": "mean over images and blocks, in brackets its interval of 95 %: a bootstrap over images or, for "
    "findings that compare images or average them, Student's over groups of images that share none.",
    "untrained": "the same architecture with random weights: mean over seeds, in brackets the range in which one more "
    "such model lies with 95 % (Student's prediction interval).",
    "p": "which part of untrained models lies as far from their mean as the trained one, by Student's t, after Holm's "
    "correction over the rows of the table.",
    "range of untrained": "where the trained model is, to the range expected of untrained models: outside (above or "
    "below) where p is at most 0.03, else inside. One trained model does not tell what training does in general.",
    "seeds below": "how many of the untrained models lie below the trained one; no distribution is assumed.",
    "training": "what training does, if weights of further training runs were given: the mean of all trained models "
    "minus that of untrained ones, in brackets its interval over models; more or less if p after Holm's correction is "
    "at most 0.05.",
    "paper says": "what arXiv 2502.20764 says of a trained model, and whether it holds here; open where the interval "
    "decides neither.",
    "reordered": "the trained weights scanning in a random order.",
    "its own order": "whether the trained model's number is more or less in the order that it was trained in than "
    "reordered.",
    "shuffled": "the trained attention, the patches' places in random order: what chance gives.",
}
CAUTION = (
    "Intervals, unlike p, are not corrected for their number: of twenty, one errs. The low correlation of two blocks "
    "is the 10 % quantile over as many pairs as are named, less that of blocks whose patches stand in random orders."
)
LEGEND = "\n".join([*(f"{term}: {what}" for term, what in TERMS.items()), CAUTION])
OUTSIDE = ("above", "below")  # verdicts
_HEADER = ["", "finding", *TERMS]


def summary(report: Report) -> Texts:
    """Return title, header and rows of a store's findings, averaged over its blocks.

    Args:
        report: of the store.
    """
    found = [row for name in FINDINGS if (row := _of_all(report, FINDINGS[name])) is not None]
    rows = [_cells(row, report.pairs) for row in found]
    known = "" if report.accuracy is None else f", top-1 {report.accuracy:.2f} %"
    order = f", {report.order} order" if report.order else ""
    return f"{report.name}: {report.model}{order}, {report.images} images{known}", _HEADER, rows


def verdicts(report: Report) -> list[str]:
    """Return what was found in sentences: which claims of the paper hold, and what differs from untrained models.

    Args:
        report: of the store.
    """
    rows = [row for finding in FINDINGS.values() if (row := _of_all(report, finding)) is not None]
    claims = [row for row in rows if row.claimed]
    found = []
    if claims:
        count = sum(row.claimed == "holds" for row in claims)
        found.append(f"{count} of {len(claims)} claims of the paper hold for {report.name}.")
    for word, says in (("holds", "Holds"), ("fails", "Fails"), ("open", "Open, as the interval contains the bound")):
        named = [
            f"{row.about.title} ({number(row.trained.value)}; the paper says {{}} {{:g}})".format(*row.about.claim)
            for row in claims
            if row.claimed == word and row.about.claim is not None
        ]
        found += [f"{says}: {'; '.join(named)}."] if named else []
    measured = [row for row in rows if row.verdict]
    if measured:
        sides = {side: [row.about.title for row in measured if row.verdict == side] for side in OUTSIDE}
        listed = "; ".join(f"{side}: {', '.join(titles)}" for side, titles in sides.items() if titles)
        count = sum(map(len, sides.values()))
        found.append(
            f"{count} of {len(measured)} numbers lie outside the range expected of untrained models"
            f"{f' ({listed})' if listed else ''}."
        )
    return found


def side_by_side(reports: Sequence[Report]) -> Texts:
    """Return title, header and rows of all stores: trained, untrained, and what is outside the range of untrained.

    Args:
        reports: of the stores.
    """
    rows = []
    for finding in FINDINGS.values():
        found = [_of_all(report, finding) for report in reports]
        if any(found):
            pairs = zip(found, reports, strict=True)
            cells = ["" if row is None else _short(row, report.pairs) for row, report in pairs]
            rows.append([finding.of, finding.title, *cells])
    title = "side by side: trained (untrained); ! outside the range expected of untrained models"
    return title, ["", "finding", *(report.name for report in reports)], rows


def orders_table(orders: Orders) -> Texts:
    """Return title, header and rows of what correlates with accuracy over orders.

    Args:
        orders: of one model.
    """
    rows = [
        [FINDINGS[name].of, FINDINGS[name].title, f"{its.correlation:+.2f}", f"{its.border:.2f}", f"{its.chance:.3f}"]
        for name, its in sorted(orders.correlations.items(), key=lambda pair: -abs(pair[1].correlation))
    ]
    title = f"{orders.model}: what goes with accuracy over {len(orders.accuracy)} orders"
    return title, ["", "finding", "rank correlation", "95 % of chance below", "p"], rows


def orders_sentence(orders: Orders) -> str:
    """Describe whether accuracy differs over orders, and what correlates with it.

    Args:
        orders: of one model.
    """
    count, models = len(orders.accuracy), sum(len(each) for each in orders.accuracy.values())
    parts = [f"{orders.model}: top-1 of {models} models in {count} orders differs by {orders.spread:.2f} points."]
    if orders.chance is None:
        parts.append("With one seed each, this cannot be distinguished from the effect of the seed.")
    else:
        differ = "more than by chance" if orders.chance < 0.05 else "no more than by chance"
        parts.append(
            f"Seeds of one order differ by {orders.seeds_spread:.2f}; orders differ {differ} (p = {orders.chance:.3f})."
        )
    found = orders.strongest
    if found is None:
        parts.append("There are too few orders, or numbers, for a correlation.")
    else:
        name, its, corrected = found
        certain = "" if corrected < 0.05 else ", which is no evidence"
        parts.append(
            f"Strongest with accuracy: {FINDINGS[name].title}, rank correlation {its.correlation:+.2f} over "
            f"{its.count} orders, p = {its.chance:.3f}; times {len(orders.correlations)} findings "
            f"{corrected:.2f}{certain}. So few orders can show a strong relation alone."
        )
    return " ".join(parts)


def blocks_table(report: Report) -> Texts:
    """Return title, header and rows of all findings, place by place.

    Args:
        report: of a store.
    """
    rows = [[row.place, *_cells(row, [])] for row in report.rows if row.place not in (ALL, MODEL)]
    return f"{report.name}: by block and stage", ["place", *_HEADER], rows


def as_csv(reports: Sequence[Report]) -> str:
    """Return all numbers of all stores as CSV, one per line."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ["trained", "order"]
    writer.writerow(
        [
            "store",
            "model",
            "scan_order",
            "images",
            "finding",
            "of",
            "place",
            "random",
            "untrained_low",
            "untrained_high",
            "chance",
            "corrected",
            "below",
            "training",
            "training_low",
            "training_high",
            "training_corrected",
            "reordered",
            "shuffled",
            "claim",
            "paper",
            "verdict",
            "order_verdict",
            "training_verdict",
            *(f"{name}_{what}" for name in names for what in ("value", "low", "high")),
        ]
    )
    for report in reports:
        for row in report.rows:
            claim = "" if row.about.claim is None else "{} {:g}".format(*row.about.claim)
            its = row.untrained
            untrained = [None] * 5 if its is None else [its.low, its.high, its.chance, its.corrected, its.below]
            gained = row.training
            effect = [None] * 4 if gained is None else [gained.value, gained.low, gained.high, gained.corrected]
            writer.writerow(
                [
                    report.name,
                    report.model,
                    report.order,
                    report.images,
                    row.finding,
                    row.about.of,
                    row.place,
                    *map(_number, (row.random, *untrained, *effect, row.reordered, row.shuffled)),
                    claim,
                    row.claimed,
                    row.verdict,
                    row.order_verdict,
                    row.training_verdict,
                    *(_number(value) for name in names for value in _three(getattr(row, name))),
                ]
            )
    return file.getvalue()


def as_json(reports: Sequence[Report], orders: Sequence[Orders], about: dict[str, Any]) -> dict[str, Any]:
    """Return all results as JSON values.

    Args:
        reports: of the stores.
        orders: what correlates with accuracy.
        about: metadata of the call.
    """
    return {
        **about,
        "findings": {name: _described(each) for name, each in FINDINGS.items()},
        "stores": [_plain(report) for report in reports],
        "orders": [
            {
                **asdict(each),
                "spread": each.spread,
                "seeds_spread": each.seeds_spread,
                "chance": each.chance,
                "sentence": orders_sentence(each),
            }
            for each in orders
        ],
    }


def row_as_json(row: Row) -> dict[str, Any]:
    """Return a row with its verdicts as JSON values.

    Args:
        row: of a report.
    """
    known = {name: value for name, value in asdict(row).items() if value is not None and (value or name != "others")}
    verdicts = {"paper": row.claimed, "verdict": row.verdict, "order_verdict": row.order_verdict}
    return {**known, **verdicts, **({"training_verdict": row.training_verdict} if row.training else {})}


def _plain(report: Report) -> dict[str, Any]:
    return {**asdict(report), "rows": [row_as_json(row) for row in report.rows]}


def _described(finding: Finding) -> dict[str, Any]:
    source = f" of {finding.source}" if finding.source else ""
    return {
        "of": finding.of,
        "title": finding.title,
        "question": finding.question,
        "level": finding.level,
        "claim": finding.claim,
        "formula": f"{(finding.function.__doc__ or '').partition(chr(10))[0]}{source}",
    }


def _of_all(report: Report, finding: Finding) -> Row | None:
    """Return the row for the whole model."""
    return report.row(finding.name, MODEL if finding.level == "model" else ALL)


def _cells(row: Row, pairs: Sequence[int]) -> list[str]:
    claim = "" if row.about.claim is None else "{} {:g} ".format(*row.about.claim)
    its = row.untrained
    untrained = number(row.random) + (f" [{number(its.low)}, {number(its.high)}]" if its is not None else "")
    return [
        row.about.of,
        f"{row.about.title}{over_pairs(row.finding, pairs)}",
        shown(row.trained),
        untrained,
        "" if its is None else probability(its.corrected),
        in_words(row.verdict),
        "" if its is None else f"{its.below} of {len(row.seeds)}",
        training(row),
        f"{claim}{row.claimed}",
        number(row.reordered),
        row.order_verdict,
        number(row.shuffled),
    ]


def _short(row: Row, pairs: Sequence[int]) -> str:
    mark = "!" if row.verdict in OUTSIDE else ""
    untrained = "" if row.random is None else f" ({number(row.random)}){mark}"
    return f"{number(row.trained.value)}{untrained}{over_pairs(row.finding, pairs)}"


def over_pairs(finding: str, pairs: Sequence[int]) -> str:
    """Describe of how many pairs of blocks a finding is a quantile; empty for other findings.

    Args:
        finding: its name.
        pairs: number of pairs of blocks, per stage with pairs.
    """
    if finding != "block_correlation" or not pairs:
        return ""
    return f", of {' and '.join(map(str, pairs))} pair{'' if pairs == [1] else 's'}"


def in_words(verdict: str) -> str:
    """Return where a model is to the range expected of untrained ones, as text.

    Args:
        verdict: of a row.
    """
    return f"outside, {verdict}" if verdict in OUTSIDE else verdict


def training(row: Row) -> str:
    """Return what training does to a number, as text; empty for one trained model.

    Args:
        row: of a report.
    """
    its = row.training
    if its is None:
        return ""
    return f"{number(its.value)} [{number(its.low)}, {number(its.high)}], {row.training_verdict} ({its.models} models)"


def probability(value: float) -> str:
    """Return a p-value as text.

    Args:
        value: from 0 to 1.
    """
    return "< 0.001" if value < 0.001 else f"{value:.3g}"


def shown(estimate: Estimate | None) -> str:
    """Return an estimate as text, with its interval if it has one."""
    if estimate is None:
        return ""
    if estimate.low is None:
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def number(value: float | None) -> str:
    """Return a number as text: three digits, never "-0"; nothing for None."""
    return "" if value is None else f"{round(value, 12) + 0.0:.3g}" if abs(value) >= 0.0005 else "0"


def _three(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def finite(value: object) -> object:
    """Replace NaN, which JSON does not have, by None.

    Args:
        value: nested dicts, lists and numbers.
    """
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
