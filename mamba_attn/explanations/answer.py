"""Computes maps, matrices, rows and probabilities of one image and one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mamba_attn import images
from mamba_attn.attribution import RawAttention
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.spec import Method
from mamba_attn.explanations.choices import Question
from mamba_attn.tracing.tracer import trace

DEPTHS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Answer:
    """Results for one image and one model, to show and to store.

    Args:
        question: the request.
        image: (rows, columns, 3) uint8, as the model saw it.
        probabilities: (classes,).
        explained: the class that class-dependent maps explain.
        reader: the token whose attention is shown, in words.
        maps: (rows, columns) by method.
        matrices: attention matrices, channels or heads averaged, (tokens, tokens) by layer.
        read: what the query reads in every layer, (tokens,) by layer.
    """

    question: Question
    image: np.ndarray
    probabilities: np.ndarray
    explained: int
    reader: str
    maps: dict[str, np.ndarray]
    matrices: dict[str, np.ndarray]
    read: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The name of the model in titles and files."""
        return self.question.subject.name

    @property
    def methods(self) -> Sequence[Method]:
        """The methods of the maps, in order."""
        return self.question.methods

    def class_name(self, index: int) -> str:
        """Return the name of a class."""
        return self.question.subject.classes[index]

    def best(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the most likely classes with their probabilities, best first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count].tolist()
        return [(self.class_name(index), float(self.probabilities[index])) for index in order]

    def depth(self, layer: str) -> str:
        """Return a layer's position, e.g. "layer 3 of 12"."""
        names = self.question.subject.layers
        return f"layer {names.index(layer) + 1} of {len(names)}"

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return all arrays by their names in the .npz file, with a prefix."""
        named = {
            "image": self.image,
            "probabilities": self.probabilities,
            "classes": np.array(self.question.subject.classes),
            "explained": np.array(self.explained),
            "layers": np.array(self.question.subject.layers),
            **self.maps,
            **{f"attention.{name}": matrix for name, matrix in self.matrices.items()},
            **{f"row.{name}": row for name, row in self.read.items()},
        }
        return {prefix + name: array for name, array in named.items()}


def answer(question: Question, path: Path) -> Answer:
    """Explain one image.

    Raises:
        ImageError: the file cannot be read.
        NonFiniteError: a layer produced NaN or Inf.
        ValueError, MambaAttnError: the question does not fit the model.
    """
    subject, layers, query = question.subject, list(question.layers), question.query
    picture = subject.transform.pixels(path)
    inputs = images.normalise(picture[None]).to(subject.device)
    shown = layers or _at_depths(subject.layers)
    with torch.no_grad(), trace(subject.model, layers=shown, attention="mean") as record:
        logits = subject.model(inputs)
    explained = int(logits[0].argmax()) if question.target is None else question.target
    with torch.no_grad():
        matrices = {layer.name: layer.attention()[0].cpu().numpy() for layer in record.layers}
    place: dict[str, Any] = {} if query is None else query.argument
    maps = {}
    for method in question.methods:
        found = method.build(subject.model, layers or None).attribute(inputs, explained, **place)
        maps[method.key] = found[0, 0].cpu().numpy()
    rows = RawAttention(subject.model, layers=layers or None).rows(inputs, **place)
    return Answer(
        question=question,
        image=picture,
        probabilities=logits.softmax(1)[0].cpu().numpy(),
        explained=explained,
        reader=_reader(query, bool(record.layers[-1].layout.class_tokens)),
        maps=maps,
        matrices=matrices,
        read={name: row[0].cpu().numpy() for name, row in rows.items()},
    )


def _reader(query: Query | None, class_token: bool) -> str:
    if query is not None:
        return "the marked patch" if query.kind == "pixel" else "the marked box"
    return "the class token" if class_token else "the mean patch"


def _at_depths(layers: Sequence[str]) -> list[str]:
    """Return the layers at a quarter, half and three quarters of the depth."""
    last = len(layers) - 1
    return list(dict.fromkeys(layers[int(depth * last + 0.5)] for depth in DEPTHS))
