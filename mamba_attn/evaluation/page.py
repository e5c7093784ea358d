"""The comparison as one HTML page that needs no network: pictures, curves, ranks, tables, published figures, notes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mamba_attn.datasets.samples import Sample
from mamba_attn.evaluation import plots
from mamba_attn.evaluation.contestants import FAILURES, Model
from mamba_attn.evaluation.localisation import HALF
from mamba_attn.evaluation.metrics import METRICS
from mamba_attn.evaluation.plan import Plan
from mamba_attn.evaluation.published import ABSENT, VIM, Published, beside
from mamba_attn.evaluation.store import Store
from mamba_attn.evaluation.summary import Table
from mamba_attn.evaluation.tables import LEGEND, mark, text_tables
from mamba_attn.figures import png
from mamba_attn.figures.colours import PERCENTILE, limits
from mamba_attn.figures.document import OPACITY, document, safe
from mamba_attn.figures.picture import data_uri

_EDGE = (0, 255, 255)
_STYLE = """
body{max-width:1500px}
.grid{overflow-x:auto}.grid td,.grid th{padding:2px 3px;vertical-align:top;font-size:11px;font-weight:400;color:#444}
.grid th{max-width:92px;overflow-wrap:anywhere;text-align:left;vertical-align:bottom}
.grid .stack,.grid .none{width:92px;height:92px}.grid .none{background:#f6f6f6}
.grid .stack{background:var(--photo) center/100% 100%}
.grid tr.next td{border-top:1px solid #ddd;padding-top:6px}
.plot text{font:11px system-ui,sans-serif;fill:#333}.plot{margin:0 14px 10px 0}
.legend{font-size:12px;margin:0 0 6px}.key{margin-right:14px;white-space:nowrap}.key svg{margin-right:4px}
.figures{font-size:12.5px;font-variant-numeric:tabular-nums;margin:0 0 18px}
.figures th{text-align:left;font-weight:600;border-bottom:1px solid #bbb;padding:2px 12px 2px 0}
.figures td{padding:1px 12px 1px 0;white-space:nowrap}.figures caption{text-align:left;font-size:14px;margin-bottom:3px}
"""
_RANKED = ("positive_auc_top", "negative_auc_top", "gap_target", "gap_top", "insertion", "deletion", "miou", "map",
           "energy_ratio", "not_trap")  # fmt: skip


def page(plan: Plan, store: Store, tables: Sequence[Table], about: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        plan: what was compared.
        store: what was measured, the maps that are shown among it.
        tables: the figures.
        about: of the run: "command", "notes" and what else is worth a line.
    """
    looks = plots.styles(plan.methods)  # the same for all models
    facts = "".join(f"<li>{safe(str(note))}</li>" for note in about.get("notes", []))
    body = (
        f"<h1>mamba-attn compare</h1><p class=note>{safe(_summary(tables))}</p>"
        f"<h2>Pictures</h2><p class=note>Every map has its own colours: positive ones run from dark (low) to bright "
        f"(high); signed ones are white at zero, blue below, red above. The largest {100 - PERCENTILE:g} % of the "
        f"values share the last colour. Beside each photo: what the model takes it for; its object, where known, is "
        f"outlined. An empty place: the method does not fit the model, or failed.</p>{OPACITY}"
        f"{''.join(_pictures(plan, store, selector) for selector in plan.data)}"
        f"<h2>Perturbation</h2>{_curves(tables, looks)}<h2>Ranking</h2><p class=note>Values with 95 % intervals of a "
        f"bootstrap over images; best first; * the first, = those it is not ahead of by the paired interval.</p>"
        f"{_rankings(tables, looks)}"
        f"<h2>Tables</h2><p class=note>{safe(LEGEND)}</p>{_tables(tables)}"
        f"<h2>Published figures</h2>{_published(tables)}<h2>Notes</h2><ul class=note>{facts}</ul>"
        f"<h2>Again</h2><p><code>{safe(str(about.get('command', '')))}</code></p>"
    )
    return document("mamba-attn compare", body, _STYLE)


def _summary(tables: Sequence[Table]) -> str:
    parts = [
        f"{table.model.name} on {table.data.name}, {table.images} images"
        + ("" if table.accuracy is None else f", {table.accuracy:.1%} right")
        for table in tables
    ]
    return "; ".join(parts) + "."


def _pictures(plan: Plan, store: Store, selector: str) -> str:
    """Images down, a row per model; methods across, so that a ViT stands below the Mambas."""
    data, models = plan.data[selector], [model for its, model in plan.pairs if its == selector]
    indices, methods = plan.indices(selector, "picture"), list(plan.methods)
    rows = []
    for index in indices:
        for place, model in enumerate(models):
            lines = {m: store.get(plan.key(data, index, model, m, "picture")) for m in methods}
            rows.append(_row(plan, selector, index, model, lines, first=place == 0))
    if not rows:
        return ""
    header = "".join(f"<th>{safe(method)}</th>" for method in methods)
    grid = f"<table><tr><th></th><th></th>{header}</tr>{''.join(rows)}</table>"
    return f"<h3>{safe(data.name)}</h3><div class=grid>{grid}</div>"


def _row(
    plan: Plan, selector: str, index: int, model: Model, lines: Mapping[str, dict[str, Any] | None], *, first: bool
) -> str:
    try:
        sample = plan.data[selector].load(index, model.subject.transform)
    except (*FAILURES, OSError) as error:
        return f'<tr><td colspan="{len(lines) + 2}">{safe(str(error))}</td></tr>'
    classes = model.subject.classes
    known = next((line for line in lines.values() if line and "map" in line), {})
    said = classes[known["predicted"]] if "predicted" in known else ""
    cells = "".join(_cell(method, line) for method, line in lines.items())
    photo = f"--photo:url({data_uri(_outlined(sample))})"  # once per row, not once per map
    return (
        f'<tr style="{photo}"{" class=next" if first else ""}><td>{safe(model.name)}<br>{safe(said)}</td>'
        f"<td><div class=stack></div></td>{cells}</tr>"
    )


def _outlined(sample: Sample) -> np.ndarray:
    """The image, the edge of its object drawn on it."""
    if sample.inside is None:
        return sample.pixels
    inside = np.pad(sample.inside.numpy() >= HALF, 1)
    around = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    edge = inside[1:-1, 1:-1] & ~around
    return np.where(edge[..., None], np.array(_EDGE, dtype=np.uint8), sample.pixels)


def _cell(method: str, line: dict[str, Any] | None) -> str:
    if line is None or "map" not in line:
        return (
            f'<td><div class=none title="{safe(str((line or {}).get("error", "does not fit this model")))}"></div></td>'
        )
    values = np.array(line["map"])
    heat = data_uri(png.matrix_rgb(values, **limits(values)))
    title = f"{method}: {values.min():.2g} to {values.max():.2g}"
    return f'<td><div class=stack title="{safe(title)}"><img class=heat src="{heat}" alt="{safe(method)}"></div></td>'


def _curves(tables: Sequence[Table], looks: Mapping[str, str]) -> str:
    shown = [table for table in tables if table.curves]
    if not shown:
        return "<p class=note>Not measured.</p>"
    parts = []
    for table in shown:
        drawn = [
            plots.curves(f"{name}, accuracy against the {against}", lines, looks)
            for of, against in (("top", "prediction"), ("target", "label"))
            for name in ("positive", "negative")
            if (lines := {m: its[f"{name}_{of}"] for m, its in table.curves.items() if f"{name}_{of}" in its})
        ]
        legend = plots.legend({method: looks[method] for method in table.curves})
        parts.append(f"<h3>{safe(_title(table))}</h3>{legend}<div>{''.join(drawn)}</div>")
    return "".join(parts)


def _rankings(tables: Sequence[Table], looks: Mapping[str, str]) -> str:
    parts = []
    for table in tables:
        drawn = [
            plots.intervals(
                f"{METRICS[name].title} ({'higher' if METRICS[name].better > 0 else 'lower'} is better)",
                {method: figure.interval for method, figure in table.figures[name].items()}, looks,
                {method: mark(figure) for method, figure in table.figures[name].items()},
            )
            for name in _RANKED if name in table.figures
        ]  # fmt: skip
        if drawn:
            parts.append(f"<h3>{safe(_title(table))}</h3><div>{''.join(drawn)}</div>")
    return "".join(parts) or "<p class=note>Not measured.</p>"


def _tables(tables: Sequence[Table]) -> str:
    found = text_tables(tables)
    return "".join(_html_table(title, header, rows) for title, header, rows in found)


def _published(tables: Sequence[Table]) -> str:
    parts = []
    for table in tables:
        rows = beside(table)
        if not rows:
            continue
        names = list(rows[0].figures)
        titles = (f"{METRICS[name].title}, {whose}" for name in names for whose in ("paper", "ours"))
        cells = [cells for row in rows for cells in _beside(table, row, names)]
        title = f"{_title(table)}, beside Ali et al., 2403.01590"
        parts.append(_html_table(title, ["model", "method", "ours", *titles], cells))
    return "".join(parts) or f"<p class=note>{safe(ABSENT)}</p>"


def _beside(table: Table, row: Published, names: Sequence[str]) -> list[list[str]]:
    """A published row, once for every variant of ours."""
    ours = [method for method in table.methods if method.partition(":")[0] == row.ours and row.model == VIM]
    found = []
    for method in ours or [""]:
        shown = [table.figures.get(name, {}).get(method) for name in names]
        texts = ["" if its is None else f"{its.interval.value:.2f}" for its in shown]
        pairs = zip((f"{row.figures[name]:g}" for name in names), texts, strict=True)
        found.append([row.model, row.paper, method, *(text for pair in pairs for text in pair)])
    return found


def _html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{safe(each)}</th>" for each in header)
    body = "".join("<tr>" + "".join(f"<td>{safe(each)}</td>" for each in row) + "</tr>" for row in rows)
    return f"<table class=figures><caption>{safe(title)}</caption><tr>{head}</tr>{body}</table>"


def _title(table: Table) -> str:
    return f"{table.model.name} on {table.data.name}"
