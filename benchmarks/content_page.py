"""The part of docs/findings.md about replaced matrices: tables and sentences from results/content.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results" / "content.json"
EVERY = "all layers"
_NOTHING = "Not measured yet.\n"
_SAID = {"mean": "the mean over training images", "another": "another image's", "none": "none (D u alone)"}


def worth(_: dict[str, Any]) -> str:
    """What matrices of no image, and of another, cost a model in accuracy."""
    lines = []
    for name, model in _models().items():
        of = model["changed"]
        mean, other, none = (of[what][EVERY]["change"] for what in ("mean", "another", "none"))
        lines += [
            f"**{name}**, {model['images']} images, top-1 {_interval(model['own'])} % with its own matrices. In all "
            f"layers at once: the mean over images changes top-1 by {_interval(mean)} points, another image's matrices "
            f"by {_interval(other)}, and none by {_interval(none)}. Of images of another class than the donor's, "
            f"{of['another'][EVERY]['as the donor']:.1f} % are taken for the donor's class, and "
            f"{of['another'][EVERY]['as the donor, own matrices']:.1f} % with their own matrices. (Control: a layer's "
            f"own matrices in its place change logits by at most {model['control']:.1g} of the largest.)",
            "",
            "| layer | " + " | ".join(_SAID.values()) + " |",
            "|---|" + "---|" * len(_SAID),
        ]
        for layer in of["mean"]:
            cells = (_interval(of[what][layer]["change"]) for what in _SAID)
            lines.append(f"| {layer} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines) or _NOTHING


def within(_: dict[str, Any]) -> str:
    """Accuracy of models whose steps read so many steps back at most."""
    models = _models()
    if not models:
        return _NOTHING
    kept = [what for what in next(iter(models.values()))["changed"] if what.startswith("within ")]
    lines = [
        f"| steps kept | {' | '.join(models)} |",
        "|---|" + "---|" * len(models),
        *(
            f"| {what.partition(' ')[2]} | "
            + " | ".join(_interval(model["changed"][what][EVERY]["change"]) for model in models.values())
            + " |"
            for what in kept
        ),
    ]
    lines += ["", *(_without_convolutions(name, model) for name, model in models.items())]
    return "\n".join(lines) + "\n"


def in_orders(_: dict[str, Any]) -> str:
    """What matrices and convolutions are worth to models of every order."""
    return _trained("orders")


def in_seeds(_: dict[str, Any]) -> str:
    """The same to models of several seeds."""
    return _trained("seeds")


def _trained(part: str) -> str:
    models = _details().get(part, {})
    if not models:
        return _NOTHING
    lines = [f"| in all layers | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    lines.append("| seeds | " + " | ".join(str(len(its["weights"])) for its in models.values()) + " |")
    lines.append("| top-1 with its own, % | " + " | ".join(_interval(its["own"]) for its in models.values()) + " |")
    for what in next(iter(models.values()))["changed"]:
        said = {"own tap": "each token's own tap alone", **_SAID}.get(what, f"{what} steps")
        lines.append(f"| {said} | {' | '.join(_interval(its['changed'][what]) for its in models.values())} |")
    return "\n".join(lines) + "\n"


def _without_convolutions(name: str, model: dict[str, Any]) -> str:
    change = model["changed"]["own tap"][EVERY]["change"]
    return f"- {name}, convolutions in front of the scans reading each token alone: {_interval(change)} points."


def _models() -> dict[str, Any]:
    found: dict[str, Any] = _details().get("models", {})
    return found


def _details() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())["details"] if FILE.is_file() else {}
    return found


def _interval(ends: list[float | None]) -> str:
    value, low, high = ends
    return f"{value:.1f}" if low is None else f"{value:.1f} [{low:.1f}, {high:.1f}]"


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "worth": worth,
    "within": within,
    "in orders": in_orders,
    "in seeds": in_seeds,
}
