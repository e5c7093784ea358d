"""Computes maps, matrices, rows and probabilities of one image and one model."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mamba_attn import images
from mamba_attn.attribution import MapAttribution, attribute_together
from mamba_attn.attribution.queries import Query, read_rows
from mamba_attn.attribution.spec import Method
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.class_names import folder_class
from mamba_attn.datasets.made_of import traced_layers
from mamba_attn.errors import TraceError, UnsupportedModelError
from mamba_attn.explanations.choices import Question
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.tracing.tracer import Trace, trace

if TYPE_CHECKING:
    from PIL.Image import Image

DEPTHS = (0.25, 0.5, 0.75)
_CLASSES = 3  # likeliest ones, whose maps a page can switch between


@dataclass(frozen=True)
class Answer:
    """Results for one image and one model, to show and to store.

    Args:
        question: the request.
        image: (rows, columns, 3) uint8, as the model saw it.
        probabilities: (classes,), what the head makes of the scores; empty for a model without classes.
        explained: the class that class-dependent maps explain; None for a model without classes.
        left_out: the share of the picture that the model was not shown, 0..1.
        label: the image's class, where it is known: of a sample photo, or by the name of its folder.
        grids: what the query reads in every layer, on the patch grid, by layer.
        of_classes: maps of class-dependent methods for the likeliest classes, by method and class; empty where a class
            was asked for.
        reader: the token whose attention is shown, in words.
        maps: (rows, columns) by method.
        matrices: attention matrices, channels or heads averaged, (tokens, tokens) by layer.
        read: what the query reads in every layer, (tokens,) by layer.

    Example:
        >>> import mamba_attn
        >>> loaded = mamba_attn.load("vim_digits", weights="demo")
        >>> (found,) = mamba_attn.explain(loaded, torch.rand(1, 3, 64, 64), methods="raw_attention")
        >>> found.maps["raw_attention"].shape, len(found.best(3))
        ((64, 64), 3)
    """

    question: Question
    image: np.ndarray
    probabilities: np.ndarray
    explained: int | None
    reader: str
    maps: dict[str, np.ndarray]
    matrices: dict[str, np.ndarray]
    read: dict[str, np.ndarray]
    left_out: float = 0.0
    label: int | None = None
    grids: dict[str, np.ndarray] = field(default_factory=dict)
    of_classes: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the model in titles and files."""
        return str(self.question.subject.name)

    @property
    def methods(self) -> Sequence[Method]:
        """The methods of the maps, in order."""
        return [method for method in self.question.methods if method.key in self.maps]

    def class_name(self, index: int) -> str:
        """Return the name of a class."""
        return str(self.question.subject.classes[index])

    def best(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the most likely classes with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count].tolist()
        return [(self.class_name(index), float(self.probabilities[index])) for index in order]

    @property
    def truth(self) -> str | None:
        """Name of the image's class, where it is known."""
        return None if self.label is None else self.class_name(self.label)

    @property
    def verdict(self) -> str:
        """Whether the likeliest class is right: "correct", "wrong, label: hat"; "" where that is not known."""
        if self.truth is None or not self.probabilities.size:
            return ""
        return "correct" if self.best(1)[0][0] == self.truth else f"wrong, label: {self.truth}"

    def spelt(self, value: float, digits: int = 1) -> str:
        """Return a probability in per cent, or a score of a head without probabilities as a number."""
        return f"{100 * value:.{digits}f}%" if self.question.subject.gives_probabilities else f"{value:.4g}"

    @property
    def depths(self) -> int:
        """Number of the model's layers."""
        return len(traced_layers(self.question.subject))

    def depth(self, layer: str) -> str:
        """Return a layer's position, e.g. "layer 3 of 12"."""
        names = traced_layers(self.question.subject)
        return f"layer {names.index(layer) + 1} of {len(names)}"

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return all arrays by their names in the .npz file, with a prefix."""
        named = {
            "image": self.image,
            "probabilities": self.probabilities,
            "classes": np.array(self.question.subject.classes),
            "explained": np.array(-1 if self.explained is None else self.explained),
            "label": np.array(-1 if self.label is None else self.label),
            "layers": np.array(traced_layers(self.question.subject)),
            **self.maps,
            **{f"attention.{name}": matrix for name, matrix in self.matrices.items()},
            **{f"row.{name}": row for name, row in self.read.items()},
        }
        return {prefix + name: array for name, array in named.items()}


def answer(question: Question, image: "Path | Image | Tensor") -> Answer:
    """Explain one image.

    Args:
        question: what is asked of every image.
        image: a file, a Pillow image, or the model's own input, (colours, rows, columns).

    Raises:
        ImageError: the file cannot be read.
        NonFiniteError: a layer produced NaN or Inf.
        ValueError, MambaAttnError: the question does not fit the model.
    """
    subject, layers, query = question.subject, list(question.layers), question.query
    picture, left_out = _shown(subject, image)
    if isinstance(image, Tensor):
        inputs = image[None].detach().to(subject.device)
    else:
        inputs = subject.transform.normalise(picture[None]).to(subject.device)
    shown = layers or at_depths(traced_layers(subject))
    methods = {its.key: its.build(subject.model, layers or None, subject.layout) for its in question.methods}
    readers = {key: method for key, method in methods.items() if method.takes_trace}
    place = {} if query is None else query.argument
    with trace(subject.model, layout=subject.layout) as record:  # all that can be read of one pass is
        with torch.set_grad_enabled(any(method.reads_gradients for method in readers.values())):
            output = subject.model(inputs.requires_grad_())
        logits = subject.scores(output, len(inputs))
        chances = np.zeros(0) if logits is None else subject.probabilities(logits.detach())[0].cpu().numpy()
        explained = question.target if question.target is not None or logits is None else int(logits[0].argmax())
        for name in shown:
            if readers and isinstance(layer := record[name], ScanLayer):
                layer.expect("mean")
        found = _read(readers, question, inputs, explained, record)
        of_class = {its.key: methods[its.key] for its in question.methods if its.of_a_class and its.key in found}
        likeliest = np.argsort(-chances, kind="stable")[:_CLASSES].tolist() if question.target is None else []
        every = {each: _read(of_class, question, inputs, each, record) for each in likeliest} if of_class else {}
        with torch.no_grad():
            matrices = {name: record[name].attention()[0].cpu().numpy() for name in shown}
            rows = {name: read_rows(record[name], query)[0] for name in layers or record}
            layouts = {name: record[name].layout for name in rows if record[name].has_layout}
    for key, method in methods.items():
        if key in readers:
            continue
        try:
            found[key] = method.attribute(inputs.detach(), explained, **place)
        except (UnsupportedModelError, TraceError) as error:
            if not question.by_default:
                raise
            warnings.warn(f"{key} is left out: {error}", stacklevel=2)
    return Answer(
        question=question,
        image=picture,
        probabilities=chances,
        explained=explained,
        reader=_reader(query, bool(record.layers[-1].layout.class_tokens)),
        maps={key: found[key][0, 0].cpu().numpy() for key in methods if key in found},
        matrices=matrices,
        read={name: row.cpu().numpy() for name, row in rows.items()},
        left_out=left_out,
        label=_label(image, subject),
        grids={name: layouts[name].to_grid(rows[name]).cpu().numpy() for name in rows if name in layouts},
        of_classes={
            key: {each: maps[key][0, 0].detach().cpu().numpy() for each, maps in every.items()} for key in of_class
        },
    )


def _read(
    methods: dict[str, MapAttribution], question: Question, inputs: Tensor, target: int | None, record: Trace
) -> dict[str, Tensor]:
    """Return the maps of methods that read the pass; of methods that nobody named, those that its layers allow."""
    place: dict[str, Any] = {} if question.query is None else question.query.argument
    try:
        maps = attribute_together(list(methods.values()), inputs, target, trace=record, **place)
        return dict(zip(methods, maps, strict=True))
    except UnsupportedModelError:
        if not question.by_default:
            raise
    found = {}
    for key, method in methods.items():
        try:
            found[key] = method.attribute(inputs, target, trace=record, **place)
        except UnsupportedModelError as error:
            warnings.warn(f"{key} is left out: {error}", stacklevel=3)
    return found


def _shown(subject: LoadedModel, image: "Path | Image | Tensor") -> tuple[np.ndarray, float]:
    """Return the picture as the model sees it, and the share of it that it does not see."""
    if isinstance(image, Tensor):
        return subject.transform.pixels(image), 0.0
    picture = images.read(image, range=subject.transform.range) if isinstance(image, str | Path) else image
    return subject.transform.pixels(picture), 1 - subject.transform.shown_share(picture.height, picture.width)


def _label(image: Any, subject: LoadedModel) -> int | None:
    """Return the class that a file's place says: of a sample photo its name, else that of its folder."""
    if not isinstance(image, str | Path):
        return None
    path = Path(image).absolute()
    if path.parent != images.SAMPLES:
        return folder_class(path, subject)
    name, classes = path.stem.split("_")[1], list(subject.classes or [])
    return classes.index(name) if name in classes else None


def _reader(query: Query | None, class_token: bool) -> str:
    if query is not None:
        return "the marked patch" if query.kind == "pixel" else "the marked box"
    return "the class token" if class_token else "the mean patch"


def at_depths(layers: Sequence[str]) -> list[str]:
    """Return the layers at a quarter, half and three quarters of the depth.

    Args:
        layers: names, first to last.
    """
    last = len(layers) - 1
    return list(dict.fromkeys(layers[int(depth * last + 0.5)] for depth in DEPTHS))
