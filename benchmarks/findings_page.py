"""The parts of docs/findings.md that depend on numbers: tables and sentences between markers, from findings.json."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import content_page
from benchmarks import findings_tables as tables
from benchmarks.findings_verdicts import PARTS as PARTS_MEASURED
from benchmarks.findings_verdicts import called_outside, untrained_in_place
from benchmarks.marked_pages import filled
from mamba_attn.findings.intervals import LEVEL, mean
from mamba_attn.findings.registry import VERSION

PAGE = Path(__file__).resolve().parents[1] / "docs" / "findings.md"
PICTURES = PAGE.parent
_NAMES = {"models": "models that come with the package", "orders": "trained in other orders"}
_OLDER = (
    "\nEarlier formulas: numbers whose formula has changed since are left out (silhouette, nearest point, correlation "
    "of blocks, part that differs); the correlations with accuracy are as they were measured.\n"
)


def update(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the tables and sentences of the page.

    Args:
        results: what findings.json holds.
        page: the file.

    Raises:
        ValueError: the page has an unknown mark, or lacks one of ours.
    """
    page.write_text(written(page.read_text(encoding="utf-8"), results["details"]), encoding="utf-8")


def written(text: str, details: dict[str, Any]) -> str:
    """Return the page with its marked parts from the numbers.

    Args:
        text: of the page.
        details: of the results; empty before the first run.

    Raises:
        ValueError: the page has an unknown mark, or lacks one of ours.
    """
    return filled(text, PARTS if details else dict.fromkeys(PARTS, lambda _: tables.NOTHING), details)


def in_short(details: dict[str, Any]) -> str:
    """What of the paper holds, with training or without; how many findings are outside the range; the orders."""
    lines, part = [], details["models"]
    for store in part["stores"]:
        rows = tables.summary_rows(part, store)
        known = [row for row in rows if row["verdict"]]
        outside = sum(row["verdict"] in tables.OUTSIDE for row in known)
        alone = sum(row["untrained"]["chance"] <= LEVEL for row in known)
        claims = [(part["findings"][row["finding"]], row) for row in rows if part["findings"][row["finding"]]["claim"]]
        said: dict[str, list[str]] = {}
        for about, row in claims:
            verdict = tables.holds(row, about["claim"]).partition(":")[0]
            said.setdefault(verdict, []).append(f"{about['of']} {about['title']}")
        names = {verdict: f"{len(its)} ({'; '.join(its)})" for verdict, its in said.items()}
        lines.append(
            f"- **{store['name']}**, {len(claims)} claims of the paper. Holds, and not with random weights: "
            f"{names.get('holds, random weights do not', 'none')}. Holds with random weights too, so that it says "
            f"nothing about training: {names.get('holds, random weights too', 'none')}. Does not hold: "
            f"{names.get('fails', 'none')}. Undecided: {names.get('open', 'none')}. Of {len(known)} numbers, {outside} "
            f"lie outside the range expected of untrained models ({alone} before Holm's correction)."
        )
    for its in details["orders"]["orders"]:
        means = [(sum(values) / len(values), order) for order, values in its["accuracy"].items()]
        (low, worst), (high, best), seeds = min(means), max(means), max(map(len, its["accuracy"].values()))
        differ = "" if its["chance"] is None else (
            f"; orders differ {'more' if its['chance'] < 0.05 else 'no more'} than by chance (p = {its['chance']:.3f})"
        )  # fmt: skip
        lines.append(
            f"- {len(means)} orders of one model, {seeds} seed{'' if seeds == 1 else 's'} each: top-1 from {low:.1f} % "
            f"({worst}) to {high:.1f} % ({best}){differ}."
        )
    return "\n".join(lines) + "\n"


def rule(details: dict[str, Any]) -> str:
    """How often the rule calls an untrained model's number outside."""
    alone, corrected = called_outside(details)
    if not alone:
        return tables.NOTHING
    erring = [any(row.verdict != "inside" for row in rows) for rows in untrained_in_place(details)]
    return (
        "A test of the rule: each untrained model on this page took the trained one's place, compared with the other "
        f"seeds. Of their {len(alone):,} numbers, {100 * sum(alone) / len(alone):.1f} % are called outside by p alone, "
        f"{100 * sum(corrected) / len(corrected):.1f} % after Holm's correction. Of {len(erring)} models, "
        f"{100 * sum(erring) / len(erring):.1f} % have at least one number outside.\n"
    )


def setting(details: dict[str, Any]) -> str:
    """Which models, how many images and seeds, and by which formulas; what is missing."""
    lines = []
    for name in PARTS_MEASURED:
        part = details.get(name)
        if not part or not part["stores"]:
            continue
        known = ", ".join(sorted({store["model"] for store in part["stores"]}))
        older = "" if part["formulas"] == VERSION else ", earlier formulas"
        count = len(part["stores"])
        lines.append(
            f"- {_NAMES.get(name, name)}: {count} model{'' if count == 1 else 's'} ({known}), {part['images']} images "
            f"each, {part['seeds']} seeds of random weights for each{older}."
        )
    return "\n".join(lines) + "\n" + (_OLDER if any("earlier formulas" in line for line in lines) else "")


def matrices(_: dict[str, Any]) -> str:
    """The picture of mean matrices."""
    text = "Mean attention of the models at three depths: matrices, and the row of the patch in the middle"
    return f"![{text}](findings_matrices.png)\n"


def class_token_maps(details: dict[str, Any]) -> str:
    """The picture of what class tokens read, where it was drawn with the rest of these results."""
    if details["class tokens"]["formulas"] != VERSION:
        return ""
    return "![What the class token reads, first above, in the middle below](findings_class_token.png)\n"


def training(details: dict[str, Any]) -> str:
    """How the models that do not come with the package were trained."""
    lines = []
    kinds = {
        "order ": "each order",
        "older order": "each order, older models",
        "class_token": "both class tokens",
        "digits": "digits",
        "seeds": "seeds",
        "depths": "depths",
    }
    for kind, name in kinds.items():
        found = [its for model, its in details["training"].items() if model.startswith(kind) and "epochs" in its]
        if found:
            sets = {key: sorted({its[key] for its in found}) for key in ("epochs", "pixels", "training_images", "seed")}
            epochs, pixels, images, seeds = (" or ".join(map(str, values)) for values in sets.values())
            lines.append(f"- {name}: {epochs} epochs of {images} images, {pixels} pixels, seed {seeds}.")
    return "\n".join(lines) + "\n" if lines else tables.NOTHING


def averaging(details: dict[str, Any]) -> str:
    """How much of the matrices a mean over images leaves out."""
    lines = []
    for store in details["models"]["stores"]:
        row = tables.row_of(details["models"], store, "image_share")
        if row is not None:
            lines.append(
                f"- {store['name']}: {tables.shown(row['trained'])}, with random weights "
                f"{tables.short(row.get('random'))}."
            )
    return "\n".join(lines) + "\n"


def order_pattern(details: dict[str, Any]) -> str:
    """Whether the pattern follows the order, in words."""
    lines = []
    for store in details["orders"]["stores"]:
        row = tables.row_of(details["orders"], store, "order_over_raster")
        if row is None:
            continue
        its = row["trained"]
        if row.get("others"):  # over models
            its = asdict(mean(np.array([its["value"], *row["others"]])))
        low, high = its["low"], its["high"]
        open_ = low is None or low <= 0 <= high
        says = "which rows follow is open" if open_ else f"rows follow the {'order' if low > 0 else 'raster'}"
        lines.append(
            f"- {store['order']}: {tables.shown(its)}, so {says}; untrained models {tables.short(row.get('random'))}."
        )
    return "\n".join(lines) + "\n" if lines else tables.NOTHING


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
    return "\n".join(found) + "\n" if found else tables.NOTHING


def goes_with_accuracy(details: dict[str, Any]) -> str:
    """The rank correlations of the findings with accuracy over orders."""
    found = []
    for part in ("orders", "digits"):
        for each in details[part]["orders"]:
            if not each["correlations"]:
                continue
            found += [
                f"{each['model']}:",
                "",
                "| | finding | rank correlation | 95 % of chance below | p |",
                "|---|---|---|---|---|",
            ]
            ranked = sorted(each["correlations"].items(), key=lambda pair: -abs(pair[1]["correlation"] or 0))
            for name, its in ranked:
                about = details[part]["findings"][name]
                correlation = "" if its["correlation"] is None else f"{its['correlation']:+.2f}"
                found.append(
                    f"| {about['of']} | {about['title']} | {correlation} | {its['border']:.2f} | {its['chance']:.3f} |"
                )
            found.append("")
    return "\n".join(found) + "\n" if found else tables.NOTHING


def reordered(details: dict[str, Any]) -> str:
    """Accuracy of models whose scans follow another order than they were trained in."""
    return _reordered(details["reordered"])


def older_orders(details: dict[str, Any]) -> str:
    """The same of models of one seed each, trained for longer; their matrices were not kept."""
    return _reordered(details["older orders"])


def _reordered(measured: dict[str, Any]) -> str:
    names, table = measured["orders"], measured["top1"]
    if not names:
        return tables.NOTHING
    lines = ["| trained in \\ scanned in | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for at, (name, row) in enumerate(zip(names, table, strict=True)):
        gained = measured.get("gained")
        cells = (
            f"**{value:.1f}**" if place == at else f"{value:.1f}{_gained(gained[at][place] if gained else None)}"
            for place, value in enumerate(row)
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if len(names) > 1:
        own = sum(row[at] for at, row in enumerate(table)) / len(names)
        other = [value for at, row in enumerate(table) for place, value in enumerate(row) if place != at]
        lines += [
            "",
            f"Over {measured['images']} images: {own:.1f} % in the order of training, "
            f"{sum(other) / len(other):.1f} % in another, at best {max(other):.1f} %.",
        ]
    return "\n".join(lines) + "\n"


def _gained(points: list[float | None] | None) -> str:
    """A difference to the model's own order with its interval, as text."""
    if points is None or None in points:
        return ""
    return " ({:+.1f} [{:+.1f}, {:+.1f}])".format(*points)


def blocks_together(details: dict[str, Any]) -> str:
    """How the findings about several blocks were measured in these results."""
    about = details["models"]["findings"]["block_correlation"]
    return f"*{about['title'].capitalize()}*: {about['formula']} The tables give the number of pairs.\n"


def class_tokens(details: dict[str, Any]) -> str:
    """Where the class token reads."""
    found = details["class token rows"]
    if not found:
        return tables.NOTHING
    lines = ["| vim_micro | upper third | middle | lower third | entropy | top-1, % |", "|---|---|---|---|---|---|"]
    accuracies = {store["name"]: store["accuracy"] for store in details["class tokens"]["stores"]}
    for name, row in found.items():
        top1 = "" if accuracies.get(name) is None else f"{accuracies[name]:.2f}"
        cells = " | ".join(f"{row[key]:.2f}" for key in ("upper third", "middle", "lower third", "entropy"))
        lines.append(f"| {name} | {cells} | {top1} |")
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "in short": in_short,
    "setting": setting,
    "rule": rule,
    "models": tables.models,
    "untrained": tables.untrained,
    "paper": tables.paper,
    "recipes": training,
    "averaging": averaging,
    "seeds": tables.seeds,
    "depths": tables.depths,
    "order findings": tables.order_findings,
    "order pattern": order_pattern,
    "accuracy": accuracy,
    "goes with accuracy": goes_with_accuracy,
    "reordered": reordered,
    "older orders": older_orders,
    "blocks together": blocks_together,
    "class tokens": class_tokens,
    "by layer": tables.by_layer,
    "matrices": matrices,
    "class token maps": class_token_maps,
    **content_page.PARTS,
}
