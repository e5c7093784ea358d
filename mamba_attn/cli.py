"""The command line: ``mamba-attn explain``.

Exit codes: 0 all done, 1 some images could not be explained, 2 nothing was done because of how it was called.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from mamba_attn import _torchvision, images, models
from mamba_attn.errors import MambaAttnError
from mamba_attn.models import registry
from mamba_attn.models.transforms import EvaluationTransform

if TYPE_CHECKING:
    from rich.table import Table

_NEEDED = {"captum": "captum", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}
_PARAMETERS_PER_THREAD = 5_000_000  # threads that share less wait for each other longer than they work
_EPILOG = """\
For every image FOLDER receives NAME.png (what the model saw, raw hidden attention and attention rollout laid over it)
and NAME.npz (the same maps in pixels, the query's row in every layer, all probabilities).
"""


class Subject(NamedTuple):
    """The model to explain, the names of its classes, what it is shown of an image."""

    name: str
    model: nn.Module
    classes: list[str]
    transform: EvaluationTransform


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default the process's own, and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        _require_extras()
        paths = images.find(args.image) if args.image else images.samples()
        subject = load(args.model, args.weights, args.device)
        folder = _writable(args.out)
    except (ValueError, TypeError, OSError, ImportError, MambaAttnError) as error:
        print(f"mamba-attn explain: {error}", file=sys.stderr)
        return 2
    size = sum(parameter.numel() for parameter in subject.model.parameters())
    torch.set_num_threads(max(1, min(torch.get_num_threads(), size // _PARAMETERS_PER_THREAD)))
    return explain(subject, paths, folder)


def load(name: str, weights: str, device: str = "cpu") -> Subject:
    """Build the model that the command line names.

    Args:
        name: see ``mamba_attn.models.create``.
        weights: "demo", "official" or a file; a .json card beside the file, as ``benchmarks/train.py`` writes it, gives
            the model's options and the names of the classes.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an unknown name, a device that is not there, a card that is not one.
        WeightsError: weights that are absent or do not fit.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu.")
    card: dict[str, Any] = {}
    if weights == "demo" and name in registry.demos():
        card = registry.demo_card(name)
    beside = Path(weights).with_suffix(".json")
    if weights not in ("demo", "official") and beside.is_file():
        card = _card(beside)
    model = models.create(name, weights=weights, **({} if weights == "demo" else card.get("options", {})))
    transform = models.transform(name, cast(tuple[int, int], model.image_size))
    return Subject(name, model.to(device), _class_names(model, card), transform)


def explain(subject: Subject, paths: Sequence[Path], folder: Path) -> int:
    """Explain images one by one into a folder; print the table of classes and where the pictures are.

    Returns:
        The exit code: 1 if an image could not be explained; each such image is named on stderr.
    """
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True))
    table, failed = _table(subject), 0
    with progress:
        for path, name in progress.track(list(zip(paths, _names(paths), strict=True)), description="explaining"):
            try:
                arrays = explain_image(subject, path)
                _write(folder / name, subject, arrays)
            except (MambaAttnError, OSError) as error:
                progress.console.print(f"skipped: {error}", markup=False, highlight=False, soft_wrap=True)
                failed += 1
                continue
            _add_rows(table, path.name, subject, arrays["probabilities"])
    console = Console()
    if table.row_count:
        console.print(table)
    done = f"{len(paths) - failed} of {len(paths)} images explained"
    console.print(f"{done}; pictures and arrays are in {folder}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


@torch.no_grad()
def explain_image(subject: Subject, path: Path) -> dict[str, np.ndarray]:
    """Return everything that is written about one image, as arrays by name.

    Returns:
        "image" (rows, columns, 3) uint8, "raw_attention" and "rollout" (rows, columns), "probabilities" (classes),
        "classes", "layers", and "row.NAME" (tokens) for every layer: what the class token reads, or the mean patch of a
        model without one.

    Raises:
        ImageError: the file cannot be used.
        NonFiniteError: a layer met NaN or Inf.
    """
    from mamba_attn.attribution import AttentionRollout, RawAttention

    picture = subject.transform.pixels(path)
    inputs = images.normalise(picture[None]).to(next(subject.model.parameters()).device)
    raw = RawAttention(subject.model)
    rows = raw.rows(inputs)
    arrays: dict[str, Tensor] = {
        "raw_attention": raw.attribute(inputs)[0, 0],
        "rollout": AttentionRollout(subject.model).attribute(inputs)[0, 0],
        "probabilities": subject.model(inputs).softmax(1)[0],
        **{f"row.{name}": row[0] for name, row in rows.items()},
    }
    names = {"classes": np.array(subject.classes), "layers": np.array(list(rows))}
    return {"image": picture, **{key: value.cpu().numpy() for key, value in arrays.items()}, **names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mamba-attn", description="Hidden attention of vision Mamba models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    what = "classes, hidden attention and rollout of images"
    command = commands.add_parser("explain", help=what, description=what.capitalize() + ".", epilog=_EPILOG)
    add = command.add_argument
    add("image", nargs="*", metavar="IMAGE", help="files, folders or patterns; default: images of this package")
    add("--model", default="vim_micro", metavar="NAME", help="default: vim_micro")
    add("--weights", default="demo", metavar="demo|FILE|official", help="default: demo, those of this package")
    add("--out", default="mamba_attn_explain", metavar="FOLDER", help="default: ./mamba_attn_explain")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    return parser


def _require_extras() -> None:
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install 'mamba_attn[explain]'")


def _writable(out: str) -> Path:
    """The folder, made and tried."""
    folder = Path(out).expanduser()
    probe = folder / ".mamba_attn_probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {out}: this folder cannot be written ({error.strerror}); name another.") from error
    return folder


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this card beside the weights is not JSON ({error}).") from error
    card = card if isinstance(card, dict) else {"options": None}
    found = {"options": card.get("options", {}), "classes": card.get("classes", [])}
    fits = isinstance(found["options"], dict) and isinstance(found["classes"], list)
    if not fits:
        raise ValueError(f"{path}: expected a card with 'options' (an object) and 'classes' (a list of names).")
    return found


def _class_names(model: nn.Module, card: dict[str, Any]) -> list[str]:
    """The card's names; ImageNet's for 1000 classes, if timm is there; else numbers."""
    count = int(getattr(model, "num_classes", 0))
    names = [str(name) for name in card.get("classes", [])]
    if len(names) == count:
        return names
    if count == 1000 and importlib.util.find_spec("timm") is not None:
        _torchvision.prepare()
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo()
        return [str(info.index_to_description(index)).partition(",")[0] for index in range(count)]
    return [f"class {index}" for index in range(count)]


def _names(paths: Sequence[Path]) -> list[str]:
    """A name per image: its stem, numbered where another image has the same."""
    names: dict[str, None] = {}
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names[name] = None
    return list(names)


def _write(stem: Path, subject: Subject, arrays: dict[str, np.ndarray]) -> None:
    """<stem>.png and <stem>.npz."""
    from mamba_attn.figures import png

    best = int(arrays["probabilities"].argmax())
    maps = [png.overlay_rgb(arrays["image"], arrays[key]) for key in ("raw_attention", "rollout")]
    first = f"{subject.classes[best]} {arrays['probabilities'][best]:.0%}"
    sheet = png.side_by_side([arrays["image"], *maps], [first, "raw attention", "rollout"])
    png.save_png(stem.with_name(f"{stem.name}.png"), sheet)
    np.savez_compressed(stem.with_name(f"{stem.name}.npz"), **arrays)  # type: ignore[arg-type]


def _table(subject: Subject) -> "Table":
    from rich.table import Table

    table = Table(title=f"{subject.name}: five likeliest classes")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    return table


def _add_rows(table: "Table", name: str, subject: Subject, probabilities: np.ndarray) -> None:
    from rich.text import Text

    best = probabilities.argsort()[::-1][:5]
    for place, index in enumerate(best):
        cells = Text(name if place == 0 else ""), Text(subject.classes[index]), f"{probabilities[index]:.1%}"
        table.add_row(*cells, end_section=place + 1 == len(best))


if __name__ == "__main__":
    sys.exit(main())
