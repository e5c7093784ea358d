"""The tables of docs/models.md: every bundled model, and every class of other people's code with its error."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.marked_pages import filled
from mamba_attn.models import registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
RESULTS = Path(__file__).parent / "results" / "dropin.json"


def bundled(results: dict[str, Any]) -> str:
    """One line per name of ``models.create``; ``results`` has no part in it."""
    trained = {name: registry.demo_card(name) for reads in ("images", "text") for name in registry.demos(reads)}
    lines = ["| name | reads | trained weights included |", "|---|---|---|"]
    for reads in ("images", "text"):
        for name in registry.names(reads):
            top = trained.get(name, {}).get("top1")
            said = f"top-1 {top:.1f} %" if isinstance(top, float | int) else "yes" if name in trained else ""
            lines.append(f"| `{name}` | {reads} | {said} |")
    return "\n".join(lines)


def classes(results: dict[str, Any]) -> str:
    """One line per repository and class: variants, layers, how its scans are seen, and the worst error."""
    lines = ["| code | class | variants | layers | seen at | law 1 | maps |", "|---|---|---|---|---|---|---|"]
    for (repository, name), rows in _by_class(results):
        worked = [row for row in rows if "law 1" in row]
        if not worked:
            continue
        link = f"[{repository}](https://github.com/{repository})" if "/" in repository else repository
        asked = [row["maps"] for row in worked if "maps" in row]
        maps = sum(all(said[:1].isdigit() for said in each.values()) for each in asked)
        cells = [
            link, f"`{name}`" if name else "", str(len(worked)), str(sum(row["layers"] for row in worked)),
            _seen(worked), f"{max(row['law 1'] for row in worked):.0e}", f"{maps} of {len(asked)}" if asked else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_class(results: dict[str, Any]) -> Iterable[tuple[tuple[str, str], list[dict[str, Any]]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key in ("rows", "never seen before"):
        for row in results["details"].get(key, []):
            found.setdefault((row["repository"], row["class"] or ""), []).append(row)
    return sorted(found.items(), key=lambda each: (each[0][0].lower(), each[0][1].lower()))


def _seen(rows: list[dict[str, Any]]) -> str:
    """Whether layers were computed by an adapter or seen at a door."""
    doors = sum(row["at doors"] for row in rows)
    layers = sum(row["layers"] for row in rows)
    return "adapter" if not doors else "door" if doors >= layers else "both"


PARTS = {"bundled": bundled, "classes": classes}


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), PARTS, json.loads(RESULTS.read_text())))
