"""The tables of docs/existing_code.md, from dropin.json: what ran of every repository, how exactly, with which maps."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.marked_pages import filled

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "existing_code.md"
RESULTS = Path(__file__).parent / "results" / "dropin.json"
SHOWN = 5  # classes of a repository
METHODS = {"RawAttention": "raw attention", "AttentionRollout": "rollout"}


def update(results: dict[str, Any], page: Path = PAGE) -> None:
    """Write the page's marked parts.

    Args:
        results: what dropin.json holds.
        page: the file.
    """
    page.write_text(filled(page.read_text(), PARTS, results))


def ran(results: dict[str, Any], key: str = "rows") -> str:
    """One line per repository."""
    lines = ["| code | run | layers | tokens | law 1 | raw attention | rollout |", "|---|---|---|---|---|---|---|"]
    for name, rows in _by_repository(results, key):
        worked = [row for row in rows if "law 1" in row]
        first = f"[{name}](https://github.com/{name})" if "/" in name else f"{name} {rows[0]['commit']}"
        classes = list(dict.fromkeys(row["class"] for row in rows if row["class"]))
        shown = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
        cells = [first, f"{shown} ({_many(rows)})", *_numbers(worked), *_maps(worked)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def never_seen(results: dict[str, Any]) -> str:
    """The same of code that nobody had looked at, and what was not traced of it."""
    said = sentences(results, "never seen before")
    return ran(results, "never seen before") + ("" if said == "Nothing." else f"\n\n{said}")


def sentences(results: dict[str, Any], key: str = "rows") -> str:
    """What is refused, and what failed, in the words of the error."""
    lines = []
    for name, rows in _by_repository(results, key):
        for row in rows:
            why = row.get("refused") or row.get("failed")
            if why:
                what = f"{row['class']} {row['variant']}".strip()
                lines.append(f"- {name}, {what}: {' '.join(str(why).split())}" if what else f"- {name}: {why}")
    return "\n".join(dict.fromkeys(lines)) or "Nothing."


def _by_repository(results: dict[str, Any], key: str) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["details"].get(key, []):
        rows.setdefault(row["repository"], []).append(row)
    return rows.items()


def _many(rows: list[dict[str, Any]]) -> str:
    counts = {
        "traced": sum("law 1" in row for row in rows), "refused": sum("refused" in row for row in rows),
        "failed": sum("failed" in row for row in rows),
    }  # fmt: skip
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _numbers(rows: list[dict[str, Any]]) -> list[str]:
    """Layers, tokens, and the worst error."""
    if not rows:
        return ["", "", ""]
    tokens = [number for row in rows for number in row.get("tokens", [])]
    span = f"{min(tokens)} to {max(tokens)}" if len(set(tokens)) > 1 else "".join(map(str, tokens[:1]))
    return [str(sum(row["layers"] for row in rows)), span, f"{max(row['law 1'] for row in rows):.0e}"]


def _maps(rows: list[dict[str, Any]]) -> list[str]:
    """Of every method, how many of the models that were asked for maps gave one."""
    asked = [row["maps"] for row in rows if "maps" in row]
    given = [sum(_is_map(maps[method]) for maps in asked) for method in METHODS]
    return [f"{count} of {len(asked)}" if asked else "" for count in given]


def _is_map(said: str) -> bool:
    """Whether what is kept of a map is its shape, and no sentence."""
    return said[:1].isdigit()


def without_maps(results: dict[str, Any]) -> str:
    """The sentences with which a model that is traced has no map, each once for a repository."""
    lines = []
    for name, rows in [*_by_repository(results, "rows"), *_by_repository(results, "never seen before")]:
        for row in rows:
            for method, said in row.get("maps", {}).items():
                if not _is_map(said):
                    what = f"{row['class']} {row['variant']}".strip()
                    lines.append((f"{name}, {METHODS[method]}", f"{what}: {' '.join(said.partition(': ')[2].split())}"))
    first = dict(reversed(lines))
    return "\n".join(f"- {which}, {first[which]}" for which in dict.fromkeys(which for which, _ in lines)) or "None."


PARTS = {"what ran": ran, "sentences": sentences, "without maps": without_maps, "never seen": never_seen}


if __name__ == "__main__":
    update(json.loads(RESULTS.read_text()))
