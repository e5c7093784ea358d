"""The findings as tables of docs/findings.md: per model, per order, per block, and beside what the paper says."""

from typing import Any

_MODEL_FINDINGS = ("block_silhouette", "block_neighbours", "preceding_lift", "block_correlation", "distance_range",
                   "column_similarity", "row_similarity", "column_purity", "row_purity", "block_purity",
                   "grid_locality", "sequence_locality", "order_over_raster", "image_share", "entropy", "distance",
                   "image_share_by_depth", "grid_locality_by_depth")  # fmt: skip
NOTHING = "Not measured yet.\n"


def models(details: dict[str, Any]) -> str:
    """Every finding of the demo models: trained, random, difference, verdict."""
    return _findings_table(details["models"])


def training(details: dict[str, Any]) -> str:
    """Per demo model, what training changed and what it did not."""
    lines = []
    for store in details["models"]["stores"]:
        rows = summary_rows(details["models"], store)
        by_verdict = {
            verdict: [
                details["models"]["findings"][row["finding"]]["title"] for row in rows if row["verdict"] == verdict
            ]
            for verdict in ("more", "less", "no difference")
        }
        said = [f"*{verdict}*: {'; '.join(names)}" for verdict, names in by_verdict.items() if names]
        lines.append(f"- **{store['name']}**, trained against random weights. {'. '.join(said)}.")
    return "\n".join(lines) + "\n"


def paper(details: dict[str, Any]) -> str:
    """What the paper says of trained models, and whether it holds here, with training or without."""
    lines = ["| | finding | the paper says | " + " | ".join(s["name"] for s in details["models"]["stores"]) + " |"]
    lines.append("|" + "---|" * (3 + len(details["models"]["stores"])))
    about = details["models"]["findings"]
    for name in _MODEL_FINDINGS:
        if about[name]["claim"] is None:
            continue
        cells = []
        for store in details["models"]["stores"]:
            row = row_of(details["models"], store, name)
            cells.append("" if row is None else holds(row, about[name]["claim"]))
        if not any(cells):
            continue  # of other models alone
        sign, number = about[name]["claim"]
        lines.append(f"| {about[name]['of']} | {about[name]['title']} | {sign} {number:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def order_findings(details: dict[str, Any]) -> str:
    """Every finding of the models trained in other orders."""
    return _short_table(details["orders"])


def by_layer(details: dict[str, Any]) -> str:
    """Neighbourhood and distance of every block of the demo models, for F3."""
    lines = ["| model | block | self, neighbours | mean distance, px | read just before / uniform | differs by image |",
             "|---|---|---|---|---|---|"]  # fmt: skip
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
        lines += [f"**{store['name']}** ({store['images']} images{known}):", "",
                  "| | finding | trained | random | trained - random | training | reordered | chance |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in summary_rows(part, store):
            about = part["findings"][row["finding"]]
            lines.append(
                f"| {about['of']} | {about['title']} | {shown(row['trained'])} | {short(row.get('random'))} | "
                f"{shown(row.get('training'))} | {row['verdict']} | {short(row.get('reordered'))} | "
                f"{short(row.get('shuffled'))} |"
            )
        lines.append("")
    return "\n".join(lines) + "\n" if lines else NOTHING


def _short_table(part: dict[str, Any]) -> str:
    if not part["stores"]:
        return NOTHING
    lines = ["| | finding | " + " | ".join(store["order"] for store in part["stores"]) + " |"]
    lines.append("|" + "---|" * (2 + len(part["stores"])))
    for name in _MODEL_FINDINGS:
        rows = [row_of(part, store, name) for store in part["stores"]]
        if not any(rows):
            continue
        cells = [
            "" if row is None else f"{short(row['trained']['value'])} ({short(row.get('random'))})"
            + ("!" if row["verdict"] in ("more", "less") else "")
            for row in rows
        ]  # fmt: skip
        lines.append(f"| {part['findings'][name]['of']} | {part['findings'][name]['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary_rows(part: dict[str, Any], store: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands for the whole model, a row per finding."""
    return [row for name in _MODEL_FINDINGS if (row := row_of(part, store, name)) is not None]


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
    """Three digits."""
    return "" if value is None else f"{value:.3g}" if abs(value) >= 0.0005 else "0"
