"""What a user asked for, from text: methods with options, a class, a query, layers."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from mamba_attn.attribution import catalogue
from mamba_attn.attribution.spec import Method, method
from mamba_attn.datasets.loaded_model import Subject
from mamba_attn.errors import nearest

_DEFAULT = ("raw_attention", "attention_rollout", "mamba_attribution")


def parse_methods(methods: Sequence[str], subject: Subject) -> list[Method]:
    """Return the methods that a user named, each once; without any, those that fit the model.

    Args:
        methods: ``NAME`` or ``NAME:OPTION=VALUE,OPTION`` each, e.g. ``attention_rollout:signed``.
        subject: the model they are for.

    Raises:
        ValueError: an unknown name, option or value, or a method that the model has nothing for.
    """
    default = [catalogue.counterpart(name, subject.model) for name in _DEFAULT]
    found = {its.key: its for its in map(method, methods or default)}
    for its in found.values():
        refusal = catalogue.refusal(its.name, subject.model, subject.name)
        if refusal:
            raise ValueError(f"methods={its.key!r}: {refusal}")
        its.build(subject.model)  # options that exclude each other
    return list(found.values())


def counterparts(methods: Sequence[Method], beside: Subject) -> list[Method]:
    """Return what a second model is shown with: the same methods where they fit, with their default options."""
    names = dict.fromkeys(catalogue.counterpart(method.name, beside.model) for method in methods)
    return [Method(name) for name in names]


def parse_query(query: str | None, subject: Subject) -> tuple[float, ...] | None:
    """Return (row, column) or (x0, y0, x1, y1) in pixels of what the model sees; None for None.

    Raises:
        ValueError: not two or four numbers.
    """
    if query is None:
        return None
    try:
        numbers = tuple(float(part) for part in query.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (2, 4):
        rows, columns = subject.transform.size
        raise ValueError(
            f"query={query!r}: expected ROW,COLUMN or X0,Y0,X1,Y1 in pixels of what {subject.name} sees, "
            f"{rows} rows x {columns} columns."
        )
    return numbers


def check_query(query: tuple[float, ...] | None, methods: Sequence[Method]) -> None:
    """Refuse a query beside methods that read no token's row.

    Raises:
        ValueError: see above.
    """
    deaf = [method.key for method in methods if not method.entry.reads_rows]
    if query is not None and deaf:
        raise ValueError(f"query={query}: {', '.join(deaf)} read no token's row; leave out the query, or them.")


def parse_layers(layers: Sequence[str], subject: Subject) -> list[str]:
    """Return the names of layers, first to last.

    Args:
        layers: indices, names or patterns.
        subject: the model whose layers these are.

    Raises:
        ValueError: one that fits no layer.
    """
    chosen = set()
    for text in layers:
        if text.isdecimal() and int(text) < len(subject.layers):
            chosen.add(subject.layers[int(text)])
            continue
        fitting = [name for name in subject.layers if fnmatchcase(name, text)]
        if not fitting:
            known = f"{subject.name} has {len(subject.layers)} layers, 0..{len(subject.layers) - 1}. "
            raise ValueError(f"layers={text!r}: no such layer; {known}{nearest(text, subject.layers)}")
        chosen.update(fitting)
    return [name for name in subject.layers if name in chosen]


def same_depth(layers: Sequence[str], subject: Subject, beside: Subject) -> list[str]:
    """Return the layers of a second model that stand as deep as those of the first."""
    last, other = len(subject.layers) - 1, len(beside.layers) - 1
    deep = {round(subject.layers.index(name) / max(last, 1) * other) for name in layers}
    return [beside.layers[index] for index in sorted(deep)]


class Question(NamedTuple):
    """What is asked of one model, for every image.

    Args:
        subject: the model.
        methods: the maps to make.
        layers: names of the layers to use; empty: the methods' own defaults.
        target: class to explain. Default: the predicted one.
        query: whose rows are read, in pixels. Default: the class token, or the mean over patches.
    """

    subject: Subject
    methods: Sequence[Method]
    layers: Sequence[str] = ()
    target: int | None = None
    query: tuple[float, ...] | None = None

    def of_companion(self, beside: Subject) -> "Question":
        """Return the same question for a second model: as deep, the class of the same name, the place of the query."""
        target = self.target
        if target is not None and beside.classes != self.subject.classes:
            name = self.subject.classes[target]
            target = beside.classes.index(name) if name in beside.classes else None
        layers = same_depth(self.layers, self.subject, beside)
        rows, columns = (
            there / here for there, here in zip(beside.transform.size, self.subject.transform.size, strict=True)
        )
        factors = (rows, columns) if len(self.query or ()) == 2 else (columns, rows, columns, rows)
        query = None if self.query is None else tuple(x * f for x, f in zip(self.query, factors, strict=True))
        return Question(beside, counterparts(self.methods, beside), layers, target, query)
