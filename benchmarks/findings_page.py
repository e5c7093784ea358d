"""The parts of docs/findings.md that depend on numbers: tables and sentences between markers, from findings.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.marked_pages import filled

PAGE = Path(__file__).resolve().parents[1] / "docs" / "findings.md"
PICTURES = PAGE.parent
_MODEL_FINDINGS = ("block_silhouette", "block_neighbours", "preceding_lift", "block_correlation", "distance_range",
                   "column_similarity", "row_similarity", "column_purity", "row_purity", "block_purity",
                   "grid_locality", "sequence_locality", "order_over_raster", "image_share", "entropy", "distance",
                   "image_share_by_depth", "grid_locality_by_depth")  # fmt: skip
_NOTHING = "Not measured yet.\n"


def update(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the tables and sentences of the page.

    Args:
        results: what findings.json holds.
        page: the file.

    Raises:
        ValueError: a mark of the page is none of ours, or one of ours is missing.
    """
    page.write_text(written(page.read_text(encoding="utf-8"), results["details"]), encoding="utf-8")


def written(text: str, details: dict[str, Any]) -> str:
    """Return the page with its marked parts from the numbers.

    Args:
        text: of the page.
        details: of the results; empty before the first run.

    Raises:
        ValueError: a mark of the page is none of ours, or one of ours is missing.
    """
    return filled(text, PARTS if details else dict.fromkeys(PARTS, lambda _: _NOTHING), details)


def in_short(details: dict[str, Any]) -> str:
    """How many of the paper's claims hold, how many of these without training too, and what the order changes."""
    lines = []
    for store in details["models"]["stores"]:
        claims = [(row, details["models"]["findings"][row["finding"]]["claim"])
                  for row in _summary_rows(details["models"], store)]  # fmt: skip
        said = [_holds(row, claim) for row, claim in claims if claim is not None]
        held = [text for text in said if text.startswith("holds")]
        too = sum("random weights too" in text for text in held)
        lines.append(f"- {store['name']}: {len(held)} of {len(said)} claims of the paper hold; {too} of them with "
                     "random weights too.")  # fmt: skip
    known = [(store["accuracy"], store["order"]) for store in details["orders"]["stores"] if store["accuracy"]]
    if len(known) > 1:
        (low, worst), (high, best) = min(known), max(known)
        lines.append(f"- {len(known)} orders of one model: top-1 from {low:.1f} % ({worst}) to {high:.1f} % ({best}).")
    return "\n".join(lines) + "\n"


def setting(details: dict[str, Any]) -> str:
    """Which models, how many images and seeds; what is missing."""
    stores = [store for part in _FOUND for store in details[part]["stores"]]
    known = ", ".join(sorted({store["model"] for store in stores}))
    left = f" Not there when this was measured: {', '.join(details['missing'])}." if details["missing"] else ""
    return (
        f"{len(stores)} models ({known}), {details['images']} images each, {details['seeds']} seeds of random weights "
        f"beside each.{left}\n"
    )


def matrices(_: dict[str, Any]) -> str:
    """The picture of mean matrices."""
    text = "Mean attention of the models at three depths: matrices, and the row of the patch in the middle"
    return f"![{text}](findings_matrices.png)\n"


def class_token_maps(_: dict[str, Any]) -> str:
    """The picture of what class tokens read."""
    return "![What the class token reads, first above, in the middle below](findings_class_token.png)\n"


def models(details: dict[str, Any]) -> str:
    """Every finding of the demo models: trained, random, difference, verdict."""
    return _findings_table(details["models"])


def training(details: dict[str, Any]) -> str:
    """Per demo model, what training changed and what it did not."""
    lines = []
    for store in details["models"]["stores"]:
        rows = _summary_rows(details["models"], store)
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
            row = _row(details["models"], store, name)
            cells.append("" if row is None else _holds(row, about[name]["claim"]))
        sign, number = about[name]["claim"]
        lines.append(f"| {about[name]['of']} | {about[name]['title']} | {sign} {number:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def order_findings(details: dict[str, Any]) -> str:
    """Every finding of the models trained in other orders."""
    return _short_table(details["orders"])


def order_pattern(details: dict[str, Any]) -> str:
    """Whether the pattern follows the order, in words."""
    lines = []
    for store in details["orders"]["stores"]:
        row = _row(details["orders"], store, "order_over_raster")
        if row is None:
            continue
        low, high = row["trained"]["low"], row["trained"]["high"]
        says = "undecided" if low is None or low <= 0 <= high else "the order" if low > 0 else "the raster"
        lines.append(f"- {store['order']}: {_shown(row['trained'])}, so rows follow {says}; without training "
                     f"{_number(row.get('random'))}.")  # fmt: skip
    return "\n".join(lines) + "\n" if lines else _NOTHING


def accuracy(details: dict[str, Any]) -> str:
    """Accuracy by order, from the cards."""
    found = []
    for part in ("orders", "digits"):
        for each in details[part]["orders"]:
            found += [f"{each['model']}:", "", "| order | top-1, % | seeds |", "|---|---|---|"]
            ranked = sorted(each["accuracy"].items(), key=lambda pair: -sum(pair[1]) / len(pair[1]))
            for order, values in ranked:
                spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
                found.append(f"| {order} | {sum(values) / len(values):.2f}{spread} | {len(values)} |")
            found += ["", each["sentence"], ""]
    return "\n".join(found) + "\n" if found else _NOTHING


def goes_with_accuracy(details: dict[str, Any]) -> str:
    """The rank correlations of the findings with accuracy over orders."""
    found = []
    for part in ("orders", "digits"):
        for each in details[part]["orders"]:
            if not each["correlations"]:
                continue
            found += [f"{each['model']}:", "", "| | finding | rank correlation | 95 % of chance below | p |",
                      "|---|---|---|---|---|"]  # fmt: skip
            ranked = sorted(each["correlations"].items(), key=lambda pair: -abs(pair[1]["correlation"] or 0))
            for name, its in ranked:
                about = details[part]["findings"][name]
                correlation = "" if its["correlation"] is None else f"{its['correlation']:+.2f}"
                found.append(f"| {about['of']} | {about['title']} | {correlation} | {its['border']:.2f} | "
                             f"{its['chance']:.3f} |")  # fmt: skip
            found.append("")
    return "\n".join(found) + "\n" if found else _NOTHING


def reordered(details: dict[str, Any]) -> str:
    """Accuracy of models whose scans follow another order than they were trained in."""
    names, table = details["reordered"]["orders"], details["reordered"]["top1"]
    if not names:
        return _NOTHING
    lines = ["| trained in \\ scanned in | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for at, (name, row) in enumerate(zip(names, table, strict=True)):
        cells = (f"**{value:.1f}**" if place == at else f"{value:.1f}" for place, value in enumerate(row))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if len(names) > 1:
        own = sum(row[at] for at, row in enumerate(table)) / len(names)
        other = [value for at, row in enumerate(table) for place, value in enumerate(row) if place != at]
        lines += ["", f"Over {details['reordered']['images']} images: {own:.1f} % in the order of training, "
                  f"{sum(other) / len(other):.1f} % in another, at best {max(other):.1f} %."]  # fmt: skip
    return "\n".join(lines) + "\n"


def class_tokens(details: dict[str, Any]) -> str:
    """Where the class token reads."""
    found = details["class token rows"]
    if not found:
        return _NOTHING
    lines = ["| vim_micro | upper third | middle | lower third | entropy | top-1, % |", "|---|---|---|---|---|---|"]
    accuracies = {store["name"]: store["accuracy"] for store in details["class tokens"]["stores"]}
    for name, row in found.items():
        top1 = "" if accuracies.get(name) is None else f"{accuracies[name]:.2f}"
        cells = " | ".join(f"{row[key]:.2f}" for key in ("upper third", "middle", "lower third", "entropy"))
        lines.append(f"| {name} | {cells} | {top1} |")
    return "\n".join(lines) + "\n"


def by_layer(details: dict[str, Any]) -> str:
    """Neighbourhood and distance of every block of the demo models, for F3."""
    lines = ["| model | block | self, neighbours | mean distance, px | read just before / uniform | differs by image |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    names = ("neighbour_share", "distance", "preceding_lift", "image_share")
    for store in details["models"]["stores"]:
        for place in store["depths"]:
            rows = [_row(details["models"], store, name, place) for name in names]
            cells = " | ".join("" if row is None else _number(row["trained"]["value"]) for row in rows)
            lines.append(f"| {store['name']} | {place} | {cells} |")
    return "\n".join(lines) + "\n"


def _findings_table(part: dict[str, Any]) -> str:
    lines = []
    for store in part["stores"]:
        known = "" if store["accuracy"] is None else f", top-1 {store['accuracy']:.2f} %"
        lines += [f"**{store['name']}** ({store['images']} images{known}):", "",
                  "| | finding | trained | random | trained - random | training | reordered | chance |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for row in _summary_rows(part, store):
            about = part["findings"][row["finding"]]
            lines.append(
                f"| {about['of']} | {about['title']} | {_shown(row['trained'])} | {_number(row.get('random'))} | "
                f"{_shown(row.get('training'))} | {row['verdict']} | {_number(row.get('reordered'))} | "
                f"{_number(row.get('shuffled'))} |"
            )
        lines.append("")
    return "\n".join(lines) + "\n" if lines else _NOTHING


def _short_table(part: dict[str, Any]) -> str:
    if not part["stores"]:
        return _NOTHING
    lines = ["| | finding | " + " | ".join(store["order"] for store in part["stores"]) + " |"]
    lines.append("|" + "---|" * (2 + len(part["stores"])))
    for name in _MODEL_FINDINGS:
        rows = [_row(part, store, name) for store in part["stores"]]
        if not any(rows):
            continue
        cells = [
            "" if row is None else f"{_number(row['trained']['value'])} ({_number(row.get('random'))})"
            + ("!" if row["verdict"] in ("more", "less") else "")
            for row in rows
        ]  # fmt: skip
        lines.append(f"| {part['findings'][name]['of']} | {part['findings'][name]['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _summary_rows(part: dict[str, Any], store: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for name in _MODEL_FINDINGS if (row := _row(part, store, name)) is not None]


def _row(part: dict[str, Any], store: dict[str, Any], name: str, place: str = "") -> dict[str, Any] | None:
    where = place or ("model" if part["findings"][name]["level"] == "model" else "all")
    return next((row for row in store["rows"] if (row["finding"], row["place"]) == (name, where)), None)


def _holds(row: dict[str, Any], claim: list[Any]) -> str:
    """The verdict, and whether random weights do it too."""
    sign, number = claim
    random = row.get("random")
    too = random is not None and (random > number if sign == ">" else random < number)
    without = "" if row["paper"] != "holds" else ", random weights too" if too else ", random weights do not"
    return f"{row['paper']}{without}: {_number(row['trained']['value'])}"


def _shown(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    value = _number(estimate["value"])
    return value if estimate["low"] is None else f"{value} [{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) >= 0.0005 else "0"


_FOUND = ("models", "orders", "class tokens", "digits")
PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "in short": in_short, "setting": setting, "models": models, "training": training, "paper": paper,
    "order findings": order_findings, "order pattern": order_pattern, "accuracy": accuracy,
    "goes with accuracy": goes_with_accuracy, "reordered": reordered, "class tokens": class_tokens,
    "by layer": by_layer, "matrices": matrices, "class token maps": class_token_maps,
}  # fmt: skip
