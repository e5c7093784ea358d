"""The findings of some stores as one HTML page that needs no network."""

from collections.abc import Mapping, Sequence

from mamba_attn.analytics.store import AttentionStore
from mamba_attn.core.document import render
from mamba_attn.figures.picture import data_uri
from mamba_attn.findings import figures
from mamba_attn.findings.accuracy import Orders
from mamba_attn.findings.controls import Report
from mamba_attn.findings.registry import FINDINGS
from mamba_attn.findings.tables import (
    CAUTION,
    TERMS,
    blocks_table,
    orders_sentence,
    orders_table,
    side_by_side,
    summary,
)


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
    several = [side_by_side(reports)] if len(reports) > 1 else []
    return render(
        "findings.html",
        title="mamba-attn findings",
        command=command,
        terms=TERMS,
        caution=CAUTION,
        summaries=[*several, *map(summary, reports)],
        orders=[(orders_sentence(its), orders_table(its)) for its in orders],
        matrices=data_uri(figures.matrices_rgb(stores)),
        looks=figures.looks(reports),
        plots=[figures.by_depth(reports, name) for name in blocks if any(each.row(name) for each in reports)],
        questions=_questions(),
        blocks=list(map(blocks_table, reports)),
        notes=[f"{each.name}: {note}" for each in reports for note in each.notes],
    )


def _questions() -> list[list[str]]:
    return [
        [each.of, each.title, each.question, "" if each.claim is None else "{} {:g}".format(*each.claim),
         (each.function.__doc__ or "").partition("\n")[0]]
        for each in FINDINGS.values()
    ]  # fmt: skip
