"""Explains images with a model and writes a page, a picture and arrays of each: the work of ``mamba-attn explain``."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from mamba_attn import images as image_files
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.requirements import require_extras, writable
from mamba_attn.datasets.class_names import parse_target
from mamba_attn.datasets.loading import complete
from mamba_attn.explanations.answer import Answer, answer
from mamba_attn.explanations.choices import Question, parse_layers, parse_methods, parse_query
from mamba_attn.explanations.page import index, page, predictions, sheet
from mamba_attn.figures.png import save_png

if TYPE_CHECKING:
    from PIL.Image import Image

NEEDED = {"captum": "captum", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}


class Pages:
    """The pages of a run in one folder: NAME.html, NAME.png and NAME.npz of every image, and index.html.

    Args:
        folder: for them.
        command: how to make them again, for the pages.
    """

    def __init__(self, folder: Path, command: str = "") -> None:
        self.folder, self.command = folder, command
        self._titles: list[str] = []
        self._names: list[str] = []
        self._verdicts: list[str] = []

    def add(self, title: str, answers: Sequence[Answer]) -> None:
        """Write the files of one image; images of the same title are numbered.

        Args:
            title: the name of its file, or the end of its path.
            answers: one per model.
        """
        name = free_name(title, self._names)
        first, *others = answers
        arrays = first.arrays()
        for other in others:
            arrays |= other.arrays(f"{other.name}.")
        (self.folder / f"{name}.html").write_text(page(title, answers, self.command), encoding="utf-8")
        save_png(self.folder / f"{name}.png", sheet(answers))
        np.savez_compressed(self.folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        self._titles.append(title)
        self._names.append(name)
        self._verdicts.append(predictions(answers))

    def finish(self) -> None:
        """Write the index."""
        if self._names:
            (self.folder / "index.html").write_text(index(self._titles, self._names, self._verdicts), encoding="utf-8")


def free_name(title: str, taken: Sequence[str]) -> str:
    """Return a file's name without its suffix, numbered if another image or the index has it.

    Args:
        title: the name of a file, or the end of its path, whose folders become part of the name.
        taken: names of the images before.
    """
    stem = "-".join(Path(title).with_suffix("").parts)
    name, number = stem, 2
    while name in ("index", *taken):
        name, number = f"{stem}-{number}", number + 1
    return name


def titles(paths: Sequence[Path]) -> list[str]:
    """Return the names of files, with as many of their folders as keep them apart; with one if there are several.

    Args:
        paths: of the images.
    """
    parts = [path.absolute().parts for path in paths]
    count = 1 if len({path.parent for path in paths}) == 1 else 2
    while len({each[-count:] for each in parts}) < len(parts):
        count += 1
    return ["/".join(each[-count:]) for each in parts]


def explain(
    model: nn.Module | LoadedModel,
    images: Any,
    out: str | Path | None = None,
    *,
    methods: Sequence[str] | str = (),
    layers: Sequence[str | int] | str | int = (),
    target: int | str | None = None,
    query: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
) -> list[Answer]:
    """Explain images with a model: attention maps, matrices, and the rows of a token; as ``mamba-attn explain`` does.

    Args:
        model: your network, or a ``LoadedModel`` with its transform and classes.
        images: a file, a pattern, a folder (see ``mamba_attn.images.find``), a Pillow image, a tensor of the model's
            input (batch, colours, rows, columns), or several of them in a list.
        out: folder for the pages. Default: nothing is written.
        methods: names of attribution methods, with options after a colon. Default: the relevance of the predicted
            class (MambaLRP, or its counterpart), raw attention, attention rollout and the attribution of the class.
        layers: names, patterns or numbers. Default: those of each method.
        target: the class, by name or number. Default: the predicted one.
        query: (row, column) of the pixel whose attention is shown. Default: the class token, or the mean patch.
        box: (x0, y0, x1, y1) of a region instead.

    Returns:
        What was found of every image, in order.

    Raises:
        FileNotFoundError: nothing of this name.
        ImageError: a file that cannot be read.
        UnsupportedModelError: a model that cannot be traced.
        ValueError: a question that does not fit the model.
        OSError: the folder cannot be written.

    Example:
        >>> explain(model, "photos", out="maps")[0].best(1)  # doctest: +SKIP
        [('hat', 0.93)]
    """
    require_extras(NEEDED)
    loaded = complete(model)
    named = [methods] if isinstance(methods, str) else methods
    chosen = parse_methods(named, loaded, place=query is not None or box is not None)
    place = [None if each is None else ",".join(f"{number:g}" for number in each) for each in (query, box)]
    question = Question(
        loaded,
        chosen,
        parse_layers([str(layer) for layer in ([layers] if isinstance(layers, str | int) else layers)], loaded),
        parse_target(None if target is None else str(target), loaded),
        parse_query(place[0], place[1], loaded, chosen),
        by_default=not methods,
    )
    pages = None if out is None else Pages(writable(str(out)), f"mamba_attn.explain({loaded.name}, ...)")
    found = []
    for number, (image, title) in enumerate(_listed(images)):
        found.append(answer(question, image))
        if pages is not None:
            pages.add(title or f"image-{number + 1}", found[-1:])
    if pages is not None:
        pages.finish()
    return found


def _listed(given: Any) -> "Iterable[tuple[Path | Image | Tensor, str]]":
    """Yield single images, and the titles of files."""
    files = [given] if isinstance(given, str | Path) else given
    if isinstance(files, list | tuple) and files and all(isinstance(each, str | Path) for each in files):
        paths = image_files.find(map(str, files))
        yield from zip(paths, titles(paths), strict=True)
    elif isinstance(given, Tensor):
        yield from ((each, "") for each in (given if given.ndim == 4 else [given]))
    elif isinstance(given, Iterable) and not hasattr(given, "convert"):  # a Pillow image is no list
        for each in given:
            yield from _listed(each)
    elif hasattr(given, "convert"):
        yield given, ""
    else:
        raise TypeError(f"explain(images={type(given).__name__}): expected files, Pillow images or tensors.")
