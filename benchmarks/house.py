"""Draws the house of docs/architecture.md from the imports as they are: ``python -m benchmarks.house``.

An arrow leads from a room to one that it imports, unless a longer way leads there too; the table lists every import.
"""

import re
from pathlib import Path

from tests.test_imports import ANY_ROOM, HOUSE, MODULES, imports, room

ROOT = Path(__file__).resolve().parents[1]
PAGE, DRAWING = ROOT / "docs" / "architecture.md", ROOT / "docs" / "house.svg"
WIDTH, FLOOR, BOX = 860, 62, (150, 34)
MARK = re.compile(r"(<!-- rooms: by benchmarks/house.py -->\n).*?(<!-- end -->)", re.DOTALL)


def imported() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    found: dict[str, set[str]] = {name: set() for floor in HOUSE for name in floor}
    for module, path in MODULES.items():
        here = room(module)
        if here not in ANY_ROOM:
            there = {room(name) for name in imports(path.read_text(), module)}
            found[here] |= {name for name in there if name in found and name != here}
    return found


def direct(rooms: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that no longer way implies."""
    below: dict[str, set[str]] = {}

    def all_below(name: str) -> set[str]:
        if name not in below:
            below[name] = rooms[name].union(*(all_below(each) for each in rooms[name]), set())
        return below[name]

    return [
        (here, there)
        for here in rooms
        for there in sorted(rooms[here])
        if not any(there in all_below(other) for other in rooms[here] - {there})
    ]


def drawing(rooms: dict[str, set[str]]) -> str:
    """Return the SVG."""
    place = {}
    for row, floor in enumerate(HOUSE):
        step = WIDTH / len(floor)
        place.update({name: (step * (column + 0.5), FLOOR * row + 40) for column, name in enumerate(floor)})
    height = FLOOR * len(HOUSE) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14">',
        "<title>The rooms of mamba_attn; each imports only rooms below it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#7a8794"/></marker></defs>',
    ]
    for here, there in direct(rooms):
        (x, y), (u, v) = place[here], place[there]
        y, v = y + BOX[1] / 2, v - BOX[1] / 2
        bend = 40 if v - y > FLOOR and abs(x - u) < BOX[0] else 0
        parts.append(
            f'<path d="M{x:.0f} {y:.0f}C{x + 2.6 * bend:.0f} {y + 24:.0f} {u + 2.6 * bend:.0f} {v - 24:.0f} '
            f'{u:.0f} {v:.0f}" fill="none" stroke="#7a8794" marker-end="url(#tip)"/>'
        )
    for name, (x, y) in place.items():
        parts.append(
            f'<rect x="{x - BOX[0] / 2:.0f}" y="{y - BOX[1] / 2:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="5" '
            f'fill="#eef3f8" stroke="#33475b"/><text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" '
            f'fill="#16222e">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def page(rooms: dict[str, set[str]], text: str) -> str:
    """Return the page with the table of every import."""
    lines = ["| room | imports |", "|---|---|"]
    order = [name for floor in HOUSE for name in floor]
    for name in order:
        lines.append(
            f"| `{name}` | {', '.join(f'`{each}`' for each in order if each in rooms[name]) or 'nothing of ours'} |"
        )
    return MARK.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text)


if __name__ == "__main__":
    found = imported()
    DRAWING.write_text(drawing(found))
    PAGE.write_text(page(found, PAGE.read_text()))
