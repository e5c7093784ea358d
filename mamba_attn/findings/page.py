"""The findings of some stores as one HTML page that needs no network."""

from collections.abc import Mapping, Sequence

from mamba_attn.analytics.store import AttentionStore
from mamba_attn.figures.document import document, safe
from mamba_attn.figures.picture import data_uri
from mamba_attn.findings import figures as figures
from mamba_attn.findings.accuracy import Orders
from mamba_attn.findings.controls import Report
from mamba_attn.findings.registry import FINDINGS
from mamba_attn.findings.tables import (
    CAUTION,
    TERMS,
    Texts,
    blocks_table,
    orders_sentence,
    orders_table,
    side_by_side,
    summary,
)

_STYLE = """
body{max-width:1680px}
.figures{font-size:12.5px;font-variant-numeric:tabular-nums;margin:0 0 18px}
.figures th{text-align:left;font-weight:600;border-bottom:1px solid #bbb;padding:2px 12px 2px 0}
.figures td{padding:1px 12px 1px 0;white-space:nowrap}.figures caption{text-align:left;font-size:14px;margin-bottom:3px}
.figures.wrapped td{white-space:normal;vertical-align:top;padding-bottom:4px}
.figures.wrapped td:nth-child(2){min-width:11em}.figures.wrapped td:nth-child(3){min-width:13em}
.figures.wrapped td:nth-child(4){white-space:nowrap}.figures.wrapped td:nth-child(5){min-width:16em;max-width:80ch}
.terms{display:grid;grid-template-columns:max-content 1fr;gap:1px 14px;font-size:13px;max-width:120ch;margin:10px 0}
.terms dt{font-weight:600}.terms dd{margin:0;color:#555}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:10px 14px}
.scroll{overflow-x:auto}.plot{width:100%;max-width:400px}.plot text{font:11px system-ui,sans-serif;fill:#333}
.legend{font-size:12px;margin:0 0 6px}.key{margin-right:14px;white-space:nowrap}.key svg{margin-right:4px}
.matrices{max-width:100%;image-rendering:auto}
"""


def page(
    reports: Sequence[Report], orders: Sequence[Orders], stores: Mapping[str, AttentionStore], command: str
) -> str:
    """Return the page.

    Args:
        reports: of the stores.
        orders: what goes with accuracy.
        stores: by name, for the pictures.
        command: how to make it again.
    """
    blocks = [name for name, finding in FINDINGS.items() if finding.level == "block"]
    plots = "".join(figures.by_depth(reports, name) for name in blocks if any(r.row(name) for r in reports))
    picture = data_uri(figures.matrices_rgb(stores))
    several = _table(side_by_side(reports)) if len(reports) > 1 else ""
    notes = "".join(f"<li>{safe(f'{r.name}: {note}')}</li>" for r in reports for note in r.notes)
    body = (
        f"<h1>mamba-attn findings</h1>{_terms()}{several}"
        f"{''.join(_table(summary(report)) for report in reports)}"
        f"{_accuracy(orders)}"
        "<h2>Matrices at 25, 50 and 75 % of the depth</h2><p class=note>Mean attention of patches in raster "
        "order: a row is what a patch reads. Beside each, the row of the patch in the middle, over the grid. Every "
        f'panel has its own colours.</p><img class=matrices src="{picture}" alt="mean attention matrices">'
        "<h2>By depth</h2><p class=note>Trained drawn through, random weights (mean over seeds) dashed.</p>"
        f"{figures.legend(reports)}<div class=plots>{plots}</div>"
        f"<h2>What is measured</h2>{_questions()}"
        f"<h2>By block</h2>{''.join(_folded(blocks_table(report)) for report in reports)}"
        + (f"<h2>Notes</h2><ul class=note>{notes}</ul>" if notes else "")
        + f"<h2>Again</h2><p><code>{safe(command)}</code></p>"
    )
    return document("mamba-attn findings", body, _STYLE)


def _accuracy(orders: Sequence[Orders]) -> str:
    if not orders:
        return ""
    each = "".join(f"<p class=note>{safe(orders_sentence(its))}</p>{_table(orders_table(its))}" for its in orders)
    return f"<h2>What goes with accuracy over orders</h2>{each}"


def _questions() -> str:
    rows = [
        [each.of, each.title, each.question, "" if each.claim is None else "{} {:g}".format(*each.claim),
         (each.function.__doc__ or "").partition("\n")[0]]
        for each in FINDINGS.values()
    ]  # fmt: skip
    return _table(("", ["", "finding", "question", "paper says", "formula"], rows), " wrapped")


def _terms() -> str:
    """What the columns of the tables mean."""
    each = "".join(f"<dt>{safe(term)}</dt><dd>{safe(what)}</dd>" for term, what in TERMS.items())
    return f"<dl class=terms>{each}</dl><p class=note>{CAUTION}</p>"


def _folded(table: Texts) -> str:
    title, header, rows = table
    return f"<details><summary>{safe(title)}</summary>{_table(('', header, rows))}</details>"


def _table(table: Texts, kind: str = "") -> str:
    title, header, rows = table
    head = "".join(f'<th title="{safe(TERMS.get(each, ""))}">{safe(each)}</th>' for each in header)
    body = "".join("<tr>" + "".join(f"<td>{safe(each)}</td>" for each in row) + "</tr>" for row in rows)
    caption = f"<caption>{safe(title)}</caption>" if title else ""
    return f'<div class=scroll><table class="figures{kind}">{caption}<tr>{head}</tr>{body}</table></div>'
