"""The comparison's figures as the tables and sentences of docs/comparing.md: ``python benchmarks/comparison_table.py``.

The leads among the figures of results/compare.json are derived again before.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

from benchmarks.cases import EXPLAINED, TARGETS
from benchmarks.comparison import OURS
from benchmarks.comparison_leads import FIGURES, derive, difference
from benchmarks.fills import order
from benchmarks.marked_pages import filled
from benchmarks.report import written
from mamba_attn.evaluation.metrics import METRICS
from mamba_attn.evaluation.summary import FEW

PAGE = Path(__file__).parents[1] / "docs" / "comparing.md"
RESULTS = Path(__file__).parent / "results" / "compare.json"
OTHERS = {name: RESULTS.with_name(f"{name}.json") for name in ("fills", "two_digits")}
COLUMNS = {  # part, half, metric
    "positive AUC": ("perturbation", None, "positive_auc_top"),
    "negative AUC": ("perturbation", None, "negative_auc_top"),
    "mIoU of boxes": ("boxes", None, "miou"),
    "own object": ("boxes", None, "shuffled_auc"),
    "mIoU of digits": ("digits", "report", "miou"),
}
FAMILIES = ("vim", "vmamba", "vit")
FEWER = ", too few to order methods that differ little"
OWN = {  # our own methods of the table of fills, and what they do
    "mask_refinement": "refines relevance as a mask, by gradients of what the model answers to parts of the image "
    "(under fills of its own: drop and road are not among them)",
    "keep_and_remove_lrp": "repeats relevance while parts of the image are kept or removed",
}
LEAST = 3  # fills on which a method of ours must be ahead, on both families
SANITY = 8  # images that are asked
Cells = dict[str, dict[tuple[str, str], str]]


def methods_table(results: Mapping[str, Any]) -> str:
    """Return a table of methods by model family, sorted by the first figure that each has.

    Args:
        results: contents of compare.json.
    """
    cells: Cells = {}
    order: dict[str, tuple[int, float]] = {}
    for column, where in COLUMNS.items():
        for table in _tables(results, *where):
            family = _family(table)
            for method, (value, _, _, images, _) in table[FIGURES][where[2]].items():
                fewer = f" ({images})" if images < table["images"] else ""
                name = _short(method)
                cells.setdefault(name, {})[family, column] = f"{value:.1f}{fewer}"
                order.setdefault(name, (FAMILIES.index(family), value))
    lines = [f"| method | {' | '.join(FAMILIES)} |", f"|---|{'---|' * len(FAMILIES)}"]
    for name in sorted(order, key=lambda each: order[each]):
        lines.append(f"| `{name}` | {' | '.join(_cell(cells[name], family) for family in FAMILIES)} |")
    return "\n".join(lines)


def standing_table(results: Mapping[str, Any]) -> str:
    """Return where our combination stands: its lead over the best other method, what it is ahead of and what it is not.

    Args:
        results: contents of compare.json.
    """
    lines = ["| | lead over the best other method | ahead of | not ahead of |", "|---|---|---|---|"]
    for what, where in COLUMNS.items():
        for table in _tables(results, *where):
            if f"{table['model']} {where[2]}" not in TARGETS:
                continue
            found, ahead = table[FIGURES][where[2]], table["ours is ahead of"].get(where[2], [])
            if OURS not in found:
                continue
            others = {name: difference(found[OURS], its, METRICS[where[2]].better) for name, its in found.items()
                      if name != OURS}  # fmt: skip
            # a method of fewer images has no paired interval here
            missed = [
                f"**{_name(name)}**" if value < 0 else _name(name)
                for name, (value, low, _) in others.items() if name not in ahead and low <= 0
            ]  # fmt: skip
            lead = _lead(results, table["model"], where[2])
            lines.append(
                f"| {table['model']}, {what} | {lead} | {len(others) - len(missed)} of {len(others)} | "
                f"{', '.join(missed) or 'none'} |"
            )
    return "\n".join(lines)


def rival(results: Mapping[str, Any]) -> str:
    """Return a sentence on how far our combination is from MambaLRP when cells are removed.

    Args:
        results: contents of compare.json.
    """
    tables = _tables(results, "perturbation", None, "")
    gaps = []
    for aim, what in (("positive_auc_top", "positive"), ("negative_auc_top", "negative")):
        found = [table[FIGURES][aim] for table in tables if table["model"] in EXPLAINED]
        gaps.append(f"{' / '.join(_difference(each, 'mamba_lrp', OURS, aim) for each in found)} ({what} AUC)")
    return (
        f"When cells are removed, `{OURS}`, our own combination, is behind MambaLRP, a published method, by "
        f"{' and '.join(gaps)} AUC points on {' / '.join(EXPLAINED)}."
    )


def raw(results: Mapping[str, Any]) -> str:
    """Return a sentence on raw attention, on every model of scans, when cells are removed.

    Args:
        results: contents of compare.json.
    """
    parts = []
    for table in (each for each in _tables(results, "perturbation", None, "") if each["model"] in EXPLAINED):
        (own, chance), (kept, by_chance) = (
            [table[FIGURES][aim][name] for name in ("raw_attention", "random")]
            for aim in ("positive_auc_top", "negative_auc_top")
        )
        parts.append(
            f"on {table['model']}, blackening the cells that it ranks highest costs {_side(own, chance, -1)} "
            f"blackening random ones (positive AUC {_three(own)} compared with {_three(chance)}, lower is better), and "
            f"keeping them to the end saves {_side(kept, by_chance, 1)} keeping random ones (negative AUC "
            f"{_three(kept)} compared with {_three(by_chance)})"
        )
    return f"Raw attention shows what is read, not what drives the prediction: {'; '.join(parts)}."


def _side(own: Sequence[float], other: Sequence[float], better: int) -> str:
    """Whether a figure is better than another by their intervals."""
    low, high = difference(own, other, better)[1:]
    return "more than" if low > 0 else "less than" if high < 0 else "about as much as"


def _three(figures: Sequence[float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*figures[:3])


def first_by_removal(results: Mapping[str, Any]) -> str:
    """Return which method is first when cells are removed, in the mean over the fills, and what it is not ahead of.

    Args:
        results: contents of compare.json, and of fills.json under "fills".
    """
    parts = []
    for model, tables in results["fills"]["details"]["models"].items():
        (first, *_), rival = order(tables), tables["rival"]
        images = max(aims["gap_top"][first][3] for aims in tables["figures"].values())
        ahead = [aims["gap_top"][first][1] > 0 for aims in tables["ahead of the rival"].values() if first != rival]
        certain = first == rival or sum(ahead) >= LEAST
        names = f"`{first}`" if certain else f"`{rival}` and `{first}`, neither certainly ahead"
        parts.append(f"on {model} ({images} images) {names}")
    return f"Best when cells are removed, in the mean over {len(tables['figures'])} fills: {'; '.join(parts)}."


def localised(results: Mapping[str, Any]) -> str:
    """Return which methods find an image's own object best, free of the centre, and where mIoU has them.

    Args:
        results: contents of compare.json.
    """
    parts = []
    for table in _tables(results, "boxes", None, ""):
        found, boxes = table[FIGURES]["shuffled_auc"], table[FIGURES]["miou"]
        most = max(its[3] for its in found.values())
        first = next(name for name, its in found.items() if its[3] == most)
        place = [name for name in boxes if boxes[name][3] == most].index(first) + 1
        parts.append(
            f"{_name(first)} on {table['model']} (+{_three(found[first])} points; by mIoU of boxes no. {place})"
        )
    return (
        f"Best at finding the image's own object rather than any object's usual place: {', '.join(parts)}. `centre`, "
        "a blob in the middle, is worth nothing here, and among the first by mIoU."
    )


def sanity_table(results: Mapping[str, Any]) -> str:
    """Return a table of how little maps depend on the weights and on the class, by method and model.

    Args:
        results: contents of compare.json.
    """
    tables = {_family(table): table for table in _tables(results, "sanity and cost", None, "")}
    names = list(dict.fromkeys(name for table in tables.values() for name in table[FIGURES]["randomised_all"]))
    size = {
        name: next(
            abs(its[FIGURES]["randomised_all"][name][0])
            for its in tables.values()
            if name in its[FIGURES]["randomised_all"]
        )
        for name in names
    }
    lines = [f"| method | {' | '.join(FAMILIES)} |", f"|---|{'---|' * len(FAMILIES)}"]
    for name in sorted(names, key=lambda each: size[each]):
        cells = (_sanity(tables[family][FIGURES], name) for family in FAMILIES)
        lines.append(f"| {_name(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sanity_words(results: Mapping[str, Any]) -> str:
    """Return a paragraph on the sanity check of our combination.

    Args:
        results: contents of compare.json.
    """
    tables = [table for table in _tables(results, "sanity and cost", None, "") if table["model"] in EXPLAINED]
    ours, theirs = (
        [
            " / ".join(_hundredths(table[FIGURES][metric][name][0]) for table in tables)
            for metric in ("randomised_all", "other_class")
        ]
        for name in (OURS, "mamba_lrp")
    )
    return (
        f"On {' / '.join(EXPLAINED)}, the correlation of the map of `{OURS}` with that of the fully randomised model "
        f"is {ours[0]}, and with that of the second class {ours[1]}; for MambaLRP it is {theirs[0]} and {theirs[1]}. "
        "So our combination depends much less on class and weights than the method it is built on; raw attention, "
        "which contributes to its order, is the same for every class."
    )


def ablation_table(results: Mapping[str, Any]) -> str:
    """Return a table of the options of our combination, on the half of the images that chose them.

    Args:
        results: contents of compare.json.
    """
    removed = {table["model"]: table[FIGURES] for table in _tables(results, "ablation", None, "")}
    boxes = {table["model"]: table[FIGURES] for table in _tables(results, "ablation, boxes", None, "")}
    lines = [f"| method | {' | '.join(EXPLAINED)} |", f"|---|{'---|' * len(EXPLAINED)}"]
    for name in removed[EXPLAINED[0]]["positive_auc_top"]:
        cells = []
        for model in EXPLAINED:
            found = [removed[model][aim][name] for aim in ("positive_auc_top", "negative_auc_top")]
            found.append(boxes[model]["miou"][name])
            cells.append(" / ".join(_with_interval(its) for its in found))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_words(results: Mapping[str, Any]) -> str:
    """Return a paragraph on the gains of ``power=1``, and of the default over it.

    Args:
        results: contents of compare.json.
    """
    other = f"{OURS}:power=1.0"
    removed, boxes = (
        [table for table in _tables(results, part, None, "") if table["model"] in EXPLAINED]
        for part in ("ablation", "ablation, boxes")
    )
    positive, negative = (
        " / ".join(_difference(table[FIGURES][aim], other, OURS, aim) for table in removed)
        for aim in ("positive_auc_top", "negative_auc_top")
    )
    gained = " / ".join(_difference(table[FIGURES]["miou"], OURS, other, "miou") for table in boxes)
    clear = all(other in table["ours is ahead of"]["miou"] for table in boxes)
    surely = "ahead by the paired interval" if clear else "not ahead by the paired interval on both"
    return (
        f"`power=1` perturbs better than the default, `power=6`, by {positive} (positive AUC) and {negative} (negative "
        f"AUC) on {' / '.join(EXPLAINED)}. Over {removed[0]['images']} images, with intervals as above, that is not "
        f"certain. The default is better on boxes: mIoU by {gained} over {boxes[0]['images']} images, {surely}. It "
        "trades perturbation for boxes."
    )


def fills_table(results: Mapping[str, Any]) -> str:
    """Return tables of methods by fill, one per model, best first over the fills.

    Args:
        results: contents of compare.json, and of fills.json under "fills".
    """
    found, lines = results["fills"]["details"], []
    for model, tables in found["models"].items():
        names = order(tables)
        if not names:
            continue
        counts = {name: min(aims["gap_top"][name][3] for aims in tables["figures"].values() if name in aims["gap_top"])
                  for name in names}  # fmt: skip
        most = max(counts.values())
        few = FEWER if most < FEW else ""
        lines += [
            f"**{model}**, {most} images{few} (methods with fewer have their number in brackets):",
            "",
            f"| method | {' | '.join(tables['figures'])} | ahead of `{tables['rival']}` |",
            f"|---|{'---|' * (len(tables['figures']) + 1)}",
        ]
        for name in names:
            cells = []
            for aims in tables["figures"].values():
                both = [aims[aim].get(name) for aim in ("positive_auc_top", "negative_auc_top")]
                cells.append("" if None in both else " / ".join(f"{each[0]:.1f}" for each in both))
            fewer = f" ({counts[name]})" if counts[name] < most else ""
            lines.append(f"| `{name}`{fewer} | {' | '.join(cells)} | {_ahead_on(tables, name)} |")
        lines.append("")
    return "\n".join(lines)


def _ahead_on(tables: Mapping[str, Any], name: str) -> str:
    """By how much negative less positive AUC is better than the rival's, by fill, in points."""
    if name == tables["rival"]:
        return ""
    found = {fill: aims["gap_top"].get(name) for fill, aims in tables["ahead of the rival"].items()}
    return "; ".join(
        f"{fill} {80 * its[0]:+.1f} [{80 * its[1]:+.1f}, {80 * its[2]:+.1f}]" for fill, its in found.items() if its
    )


def fills_words(results: Mapping[str, Any]) -> str:
    """Return on how many fills our own methods are ahead of the best published one, and what follows.

    Args:
        results: contents of compare.json, and of fills.json under "fills".
    """
    return "\n\n".join(_own_words(results, name, what) for name, what in OWN.items())


def _own_words(results: Mapping[str, Any], name: str, what: str) -> str:
    parts, fills = [], 0
    leads: dict[str, list[bool]] = {}  # by rival, model by model
    for model, tables in results["fills"]["details"]["models"].items():
        found = {fill: its for fill, aims in tables["ahead of the rival"].items() if (its := aims["gap_top"].get(name))}
        if not found:
            continue
        ahead = [fill for fill, its in found.items() if its[1] > 0]
        behind = [fill for fill, its in found.items() if its[2] < 0]
        images = min(aims["gap_top"][name][3] for aims in tables["figures"].values())
        fills = len(found)
        leads.setdefault(tables["rival"], []).append(len(ahead) >= LEAST)
        text = f"on {model} ({images} images) ahead of `{tables['rival']}` by the paired interval under "
        text += f"all {fills} fills" if len(ahead) == fills else " and ".join(ahead) or "no fill"
        parts.append(text + (f", and behind under {' and '.join(behind)}" if behind else ""))
    if not parts:
        return f"`{name}`, our own, {what}: not measured yet."
    won, lost = ([f"`{rival}`" for rival, its in leads.items() if all(its) is wins] for wins in (True, False))
    verdicts = []
    if won:
        verdicts.append(
            f"Use it in place of {' and '.join(won)} where removal is the question and its cost can be paid."
        )
    if lost:
        verdicts.append(
            f"It should lead {' and '.join(lost)} under {LEAST} of {fills} fills on every model, and does not: we "
            f"recommend {' and '.join(lost)}, at a fraction of its cost."
        )
    return f"`{name}`, our own, {what}: {'; '.join(parts)}. {' '.join(verdicts)}"


def two_digits_table(results: Mapping[str, Any]) -> str:
    """Return the scores of methods asked about either of two digits, by model.

    Args:
        results: contents of compare.json, and of two_digits.json under "two_digits".
    """
    models = results["two_digits"]["details"]["models"]
    names = list(dict.fromkeys(name for its in models.values() for name in its["scores"]))
    best = {name: max(its["scores"][name][0] for its in models.values() if name in its["scores"]) for name in names}
    heads = (f"{name} ({its['images']} images)" for name, its in models.items())
    lines = [f"| method | {' | '.join(heads)} |", f"|---|{'---|' * len(models)}"]
    for name in sorted(names, key=lambda each: -best[each]):
        cells = (_with_interval(its["scores"][name]) if name in its["scores"] else "" for its in models.values())
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _tables(results: Mapping[str, Any], part: str, half: str | None, _: str) -> list[dict[str, Any]]:
    details = results["details"][part]
    found: list[dict[str, Any]] = details["tables"] if half is None else details["halves"][half]
    return found


def _short(method: str) -> str:
    """Without options that differ between collections."""
    return method.partition(":")[0] if method.startswith(("occlusion", "integrated")) else method


def _family(table: Mapping[str, Any]) -> str:
    return str(table["model"].partition("_")[0])


def _name(method: str) -> str:
    return f"`{_short(method)}`"


def _names(methods: Sequence[str]) -> str:
    return ", ".join(map(_name, methods)) or "none"


def _with_interval(its: Sequence[Any]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*its[:3])


def _difference(found: Mapping[str, Any], first: str, second: str, aim: str) -> str:
    return _with_interval(difference(found[first], found[second], METRICS[aim].better))


def _sanity(found: Mapping[str, Any], name: str) -> str:
    """Both correlations, and of how many images where these are fewer than eight."""
    if name not in found["randomised_all"]:
        return ""
    texts = []
    for metric in ("randomised_all", "other_class"):
        value, low, high, images, _ = found[metric][name]
        fewer = f" ({images})" if images < SANITY else ""
        texts.append(f"{_hundredths(value)} [{_hundredths(low)}, {_hundredths(high)}]{fewer}")
    return " / ".join(texts)


def _hundredths(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # never "-0.00"


def _lead(results: Mapping[str, Any], model: str, aim: str) -> str:
    """Of the best other method, by name, and by how much ours is ahead of it or behind."""
    what = TARGETS[f"{model} {aim}"].what
    row = next(row for row in results["figures"] if row["what"] == what)
    sign = 1 if row["value"] > 0 else -1
    ends = sorted(sign * end for end in row.get("interval", ()))
    interval = " [{:.1f}, {:.1f}]".format(*ends) if ends else ""
    return f"{_name(row['how'])}: {abs(row['value']):.1f} {'ahead' if sign > 0 else 'behind'}{interval}"


def _cell(found: Mapping[tuple[str, str], str], family: str) -> str:
    texts = [found.get((family, column), "") for column in COLUMNS]
    return " / ".join(text or "-" for text in texts) if any(texts) else ""


PARTS = {
    "methods": methods_table,
    "rival": rival,
    "standing": standing_table,
    "raw": raw,
    "removal": first_by_removal,
    "localised": localised,
    "sanity": sanity_table,
    "sanity words": sanity_words,
    "ablation": ablation_table,
    "ablation words": ablation_words,
    "fills": fills_table,
    "fills words": fills_words,
    "two digits": two_digits_table,
}


def stored() -> dict[str, Any]:
    """Return the contents of compare.json, and of the other results that the page shows, under their names."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found | {name: json.loads(path.read_text()) for name, path in OTHERS.items()}


if __name__ == "__main__":
    found = json.loads(RESULTS.read_text())
    derive(found)
    RESULTS.write_text(written(found))
    PAGE.write_text(filled(PAGE.read_text(), PARTS, stored()))
