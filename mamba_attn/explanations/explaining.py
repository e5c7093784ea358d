"""Explains images with a model and writes a page, a picture and arrays of each: the work of ``mamba-attn explain``."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
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


_PER_INDEX = 200  # pictures on one page of the index
_RECORDS = "explained.jsonl"
_VERSION = 1  # of what is written; increase it when that changes, and older files are written anew
_RESERVED = re.compile(r"index(-page-\d+)?")  # names of the index
_SUFFIXES = (".html", ".png", ".npz")


@dataclass(frozen=True)
class Explained:
    """What is said of an image whose files are written.

    Args:
        title: the name of its file, or the end of its path.
        name: of the files that are written, without suffix.
        predictions: what each model predicts, in words.
        best: per model, the likeliest classes and their probabilities, in words.
        truth: name of the image's class, where it is known.
        verdict: whether the first model is right; "" where that is not known.
        left_out: the share of the picture that the first model was not shown.

    Example:
        >>> Explained("hat/1.jpg", "hat/1", "vim_micro: hat 86%", best=[[("hat", "86.1%")]]).truth is None
        True
    """

    title: str
    name: str
    predictions: str
    best: list[list[tuple[str, str]]]
    truth: str | None = None
    verdict: str = ""
    left_out: float = 0.0


class Pages:
    """The pages of a run in one folder: NAME.html, NAME.png and NAME.npz of every image, and index.html.

    Args:
        folder: for them.
        command: how to make them again, for the pages.
    """

    def __init__(self, folder: Path, command: str = "") -> None:
        self.folder, self.command = folder, command
        self.names = Names()
        self.all: list[Explained] = []

    def add(self, title: str, answers: Sequence[Answer]) -> Explained:
        """Write the files of one image; images of the same title are numbered.

        Args:
            title: the name of its file, or the end of its path, whose folders become folders.
            answers: one per model.
        """
        name = self.names.free(title)
        if (self.folder / _RECORDS).is_file():  # what stood there until now is no longer what was noted of it
            with (self.folder / _RECORDS).open("ab") as file:
                file.write(b"\n" + json.dumps({"name": name, "of": ""}).encode() + b"\n")  # a kill may have cut a line
        first, *others = answers
        arrays = first.arrays()
        for other in others:
            arrays |= other.arrays(f"{other.name}.")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.html").write_text(page(title, answers, self.command), encoding="utf-8")
        save_png(path.with_name(f"{path.name}.png"), sheet(answers))
        np.savez_compressed(path.with_name(f"{path.name}.npz"), **arrays)  # type: ignore[arg-type]
        best = [[(label, each.spelt(value)) for label, value in each.best()] for each in answers]
        found = Explained(title, name, predictions(answers), best, first.truth, first.verdict, first.left_out)
        self.all.append(found)
        return found

    def finish(self, others: Sequence[Explained] = ()) -> None:
        """Write the index, in pages of so many pictures, and remove pages of a longer one.

        Args:
            others: images whose files are there too, listed behind the others.
        """
        found = [*self.all, *others]
        count = -(-len(found) // _PER_INDEX)
        files = [_index_name(number) for number in range(count)]
        for number, file in enumerate(files):
            its = found[number * _PER_INDEX : (number + 1) * _PER_INDEX]
            listed = [each.title for each in its], [each.name for each in its], [each.predictions for each in its]
            text = index(*listed, pages=files if count > 1 else (), current=file)
            (self.folder / file).write_text(text, encoding="utf-8")
        for path in self.folder.glob("index-page-*.html") if files else ():
            if _RESERVED.fullmatch(path.stem) and path.name not in files:
                path.unlink()


class Kept:
    """Which images have their files in a folder already, of the same question; a run that was stopped goes on there.

    Args:
        folder: of the files.
        question: everything that the files depend on beside the image, JSON values.
    """

    def __init__(self, folder: Path, question: Any) -> None:
        self._folder, self._path = folder, folder / _RECORDS
        self._question = json.dumps([_VERSION, question], sort_keys=True, default=str)
        written: dict[str, dict[str, Any]] = {}  # by name: a later image or question has taken the files
        for line in self._path.read_bytes().split(b"\n") if self._path.is_file() else ():
            with suppress(ValueError, TypeError, KeyError):  # of a killed run
                record = json.loads(line)
                written[record["name"]] = record
        self._known = {record.pop("of", ""): record for record in written.values()}

    def get(self, path: Path, title: str) -> Explained | None:
        """Return what was said of an image; None where it is to be explained.

        Args:
            path: of the image.
            title: of its page.
        """
        record = self._known.get(self._key(path, title))
        if record is None or not all((self._folder / f"{record['name']}{each}").is_file() for each in _SUFFIXES):
            return None
        with suppress(TypeError, ValueError, KeyError):  # of a line that someone has changed
            best = [[(label, value) for label, value in classes] for classes in record["best"]]
            return Explained(**{**record, "best": best})
        return None

    def add(self, path: Path, found: Explained) -> None:
        """Note an image, once its files are written.

        Args:
            path: of the image.
            found: what was said of it.
        """
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"of": self._key(path, found.title), **asdict(found)}))

    def _key(self, path: Path, title: str) -> str:
        about = path.stat()
        text = json.dumps([self._question, title, str(path.resolve()), about.st_size, about.st_mtime_ns])
        return hashlib.sha256(text.encode()).hexdigest()[:20]


class Names:
    """Names of files, each given once: however many there are, one more takes the same time."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def take(self, name: str) -> None:
        """Give a name away.

        Args:
            name: of files, without suffix.
        """
        self._taken.add(name)

    def free(self, title: str) -> str:
        """Return a file's name without its suffix, numbered if another image or the index has it.

        Args:
            title: the name of a file, or the end of its path, whose folders stay folders.
        """
        path = Path(title)
        stem = "/".join(part for part in path.with_suffix("").parts if part not in (path.anchor, ".."))
        name, number = stem, self._next.get(stem, 2)
        while name in self._taken or _RESERVED.fullmatch(name):
            name, number = f"{stem}-{number}", number + 1
        self._next[stem] = number
        self._taken.add(name)
        return name


def about(question: Question) -> list[Any]:
    """Return everything that an answer depends on beside the image, JSON values.

    Args:
        question: to one model.
    """
    its = question.subject
    model = [
        str(its.name),
        its.fingerprint,
        its.code_fingerprint,
        dict(its.options),
        its.transform.as_dict(),
        list(its.classes),
        its.head,
    ]
    asked = [list(question.layers), question.target, question.query, question.by_default]
    return [model, [each.key for each in question.methods], asked]


def _index_name(number: int) -> str:
    return "index.html" if number == 0 else f"index-page-{number + 1}.html"


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
