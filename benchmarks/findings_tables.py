"""The findings as tables of docs/findings.md: per model, per order, per block, and compared with the paper."""

import json
from typing import Any

from mamba_attn.findings.tables import OUTSIDE, finite, in_words, over_pairs, probability

NOTHING = "Not measured yet.\n"


def models(details: dict[str, Any]) -> str:
    """Every finding of the demo models: trained, untrained, p, verdict."""
    return _findings_table(details["models"])


def untrained(details: dict[str, Any]) -> str:
    """Per demo model, which findings are outside the range expected of untrained models and which are inside."""
    lines = []
    for store in details["models"]["stores"]:
        rows = summary_rows(details["models"], store)
        by_verdict = {
            verdict: [
                details["models"]["findings"][row["finding"]]["title"] for row in rows if row["verdict"] == verdict
            ]
            for verdict in (*OUTSIDE, "inside")
        }
        found = [f"*{in_words(verdict)}*: {'; '.join(names)}" for verdict, names in by_verdict.items() if names]
        lines.append(f"- **{store['name']}**. {'. '.join(found)}.")
    return "\n".join(lines) + "\n"


def paper(details: dict[str, Any]) -> str:
    """What the paper says of trained models, and whether it holds here, with training or without."""
    lines = ["| | finding | the paper says | " + " | ".join(s["name"] for s in details["models"]["stores"]) + " |"]
    lines.append("|" + "---|" * (3 + len(details["models"]["stores"])))
    about = details["models"]["findings"]
    for name in about:
        if about[name]["claim"] is None:
            continue
        cells = []
        for store in details["models"]["stores"]:
            row = row_of(details["models"], store, name)
            over = over_pairs(name, store["pairs"])
            cells.append("" if row is None else f"{holds(row, about[name]['claim'])}{over}")
        if not any(cells):
            continue  # of other models alone
        sign, number = about[name]["claim"]
        lines.append(f"| {about[name]['of']} | {about[name]['title']} | {sign} {number:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def order_findings(details: dict[str, Any]) -> str:
    """Every finding of the models trained in other orders."""
    return _short_table(details["orders"], [store["order"] for store in details["orders"]["stores"]])


def depths(details: dict[str, Any]) -> str:
    """Every finding of VMambas of several depths."""
    part = details.get("depths", {"stores": []})
    heads = []
    for store in part["stores"]:
        top1 = "" if store["accuracy"] is None else f" ({store['accuracy']:.1f} %)"
        heads.append(f"{store['name'].removeprefix('depths ')}{top1}")
    return _short_table(part, heads)


def seeds(details: dict[str, Any]) -> str:
    """What training does to every finding: trained models of several seeds less untrained ones."""
    part = details.get("trained seeds", {"stores": []})
    names = [store["name"].removeprefix("seeds ") for store in part["stores"]]
    lines = [f"| | finding | {' | '.join(names)} |", "|" + "---|" * (2 + len(names))]
    for name in part.get("findings", ()):
        rows = [row_of(part, store, name) for store in part["stores"]]
        if any(row and "training" in row for row in rows):
            about = part["findings"][name]
            lines.append(f"| {about['of']} | {about['title']} | {' | '.join(_trained(row) for row in rows)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else NOTHING


def _trained(row: dict[str, Any] | None) -> str:
    if row is None or "training" not in row:
        return ""
    marked = "!" if _differs(row) else ""
    return f"{shown(row['training'])}{marked}"


def by_layer(details: dict[str, Any]) -> str:
    """Neighbourhood and distance of every block of the demo models, for F3."""
    lines = [
        "| model | block | self, neighbours | mean distance, px | read just before / uniform | differs by image |",
        "|---|---|---|---|---|---|",
    ]
    names = ("neighbour_share", "distance", "preceding_lift", "image_share")
    for store in details["models"]["stores"]:
        for place in store["depths"]:
            rows = [row_of(details["models"], store, name, place) for name in names]
            cells = " | ".join("" if row is None else short(row["trained"]["value"]) for row in rows)
            lines.append(f"| {store['name']} | {place} | {cells} |")
    return "\n".join(lines) + "\n"


def _findings_table(part: dict[str, Any]) -> str:
    lines = []
    for store in part["stores"]:
        known = "" if store["accuracy"] is None else f", top-1 {store['accuracy']:.2f} %"
        lines += [
            f"**{store['name']}** ({store['images']} images{known}):",
            "",
            "| | finding | trained | untrained | p | range of untrained | reordered | chance |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in summary_rows(part, store):
            about = part["findings"][row["finding"]]
            its = row.get("untrained")
            lines.append(
                f"| {about['of']} | {about['title']}{over_pairs(row['finding'], store['pairs'])} | "
                f"{shown(row['trained'])} | {shown(None if its is None else {'value': row['random'], **its})} | "
                f"{'' if its is None else probability(its['corrected'])} | {in_words(row['verdict'])} | "
                f"{short(row.get('reordered'))} | {short(row.get('shuffled'))} |"
            )
        lines.append("")
    return "\n".join(lines) + "\n" if lines else NOTHING


def _short_table(part: dict[str, Any], heads: list[str]) -> str:
    if not part["stores"]:
        return NOTHING
    lines = ["| | finding | " + " | ".join(heads) + " |"]
    lines.append("|" + "---|" * (2 + len(part["stores"])))
    for name in part["findings"]:
        rows = [row_of(part, store, name) for store in part["stores"]]
        if not any(rows):
            continue
        cells = [
            ""
            if row is None
            else f"{short(_over_models(row))} ({short(row.get('random'))})"
            + ("!" if _differs(row) else "")
            + over_pairs(name, store["pairs"])
            for row, store in zip(rows, part["stores"], strict=True)
        ]
        lines.append(f"| {part['findings'][name]['of']} | {part['findings'][name]['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _over_models(row: dict[str, Any]) -> float:
    """The mean of a number over the trained models."""
    values = [row["trained"]["value"], *row.get("others", ())]
    return float(sum(values)) / len(values)


def _differs(row: dict[str, Any]) -> bool:
    """Whether training changes a number, by several trained models; of one, whether it lies outside the range."""
    return row["training_verdict"] in ("more", "less") if "training" in row else row["verdict"] in OUTSIDE


def summary_rows(part: dict[str, Any], store: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands for the whole model, a row per finding."""
    return [row for name in part["findings"] if (row := row_of(part, store, name)) is not None]


def row_of(part: dict[str, Any], store: dict[str, Any], name: str, place: str = "") -> dict[str, Any] | None:
    """A finding at a place; at none: of the whole model."""
    where = place or ("model" if part["findings"][name]["level"] == "model" else "all")
    return next((row for row in store["rows"] if (row["finding"], row["place"]) == (name, where)), None)


def holds(row: dict[str, Any], claim: list[Any]) -> str:
    """The verdict, and whether random weights do it too."""
    sign, number = claim
    random = row.get("random")
    too = random is not None and (random > number if sign == ">" else random < number)
    without = "" if row["paper"] != "holds" else ", random weights too" if too else ", random weights do not"
    return f"{row['paper']}{without}: {short(row['trained']['value'])}"


def shown(estimate: dict[str, Any] | None) -> str:
    """An estimate with its interval."""
    if estimate is None:
        return ""
    value = short(estimate["value"])
    return value if estimate["low"] is None else f"{value} [{short(estimate['low'])}, {short(estimate['high'])}]"


def short(value: float | None) -> str:
    """Format a number with three digits."""
    return "" if value is None else f"{value:.3g}" if abs(value) >= 0.0005 else "0"


def digits(results: dict[str, Any]) -> dict[str, Any]:
    """Return results in five digits, without NaN.

    Args:
        results: of dicts, lists and numbers.
    """
    found: dict[str, Any] = json.loads(
        json.dumps(finite(results)), parse_float=lambda text: float(f"{float(text):.5g}")
    )
    return found
