"""Parses a user's choices from text: methods with options, a class, a query, layers."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from mamba_attn.attribution import catalogue
from mamba_attn.attribution.queries import Query, require_inside
from mamba_attn.attribution.spec import Method, method
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.requirements import parse_place
from mamba_attn.datasets.made_of import made_of, traced_layers
from mamba_attn.errors import nearest

# of the table of docs/comparing.md, when cells are removed, among methods of one pass; a ViT has its counterpart
FIRST = "mamba_lrp"
_DEFAULT = (FIRST, "raw_attention", "attention_rollout", "mamba_attribution")


def parse_methods(methods: Sequence[str], subject: LoadedModel, *, place: bool = False) -> list[Method]:
    """Return the methods named by a user, without duplicates; by default, those that fit the model.

    Args:
        methods: ``NAME`` or ``NAME:OPTION=VALUE,OPTION`` each, e.g. ``attention_rollout:signed``.
        subject: the model.
        place: whether a pixel or box is asked about; then the default is of methods that read a token's row.

    Raises:
        ValueError: an unknown name, option or value, or a method that does not fit the model.
    """
    kinds = made_of(subject)
    default = list(dict.fromkeys(catalogue.counterpart(name, subject.model, kinds) for name in _DEFAULT))
    if place:
        default = [name for name in default if catalogue.get(name).reads_rows]
    if not subject.classes:
        default = [name for name in default if not method(name).of_a_class]
    found = {its.key: its for its in map(method, methods or default)}
    for its in found.values():
        if its.of_a_class and not subject.classes:
            raise ValueError(
                f"methods={its.key!r}: it explains a class, and {subject.name} has none; without classes there are "
                f"{' and '.join(default)}, and others."
            )
        refusal = catalogue.refusal(its.name, subject.model, str(subject.name), kinds)
        if refusal:
            raise ValueError(f"methods={its.key!r}: {refusal}")
        its.build(subject.model)  # raises if options exclude each other
    return list(found.values())


def counterparts(methods: Sequence[Method], other: LoadedModel) -> list[Method]:
    """Return the methods for a second model: the same ones or their counterparts, with default options."""
    kinds = made_of(other)
    names = dict.fromkeys(catalogue.counterpart(method.name, other.model, kinds) for method in methods)
    return [Method(name) for name in names]


def parse_query(query: str | None, box: str | None, subject: LoadedModel, methods: Sequence[Method]) -> Query | None:
    """Return the pixel or box in the image as the model sees it; None if neither is given.

    Args:
        query: ROW,COLUMN.
        box: X0,Y0,X1,Y1.
        subject: the model.
        methods: that will use it.

    Raises:
        ValueError: wrong counts of numbers, both at once, a place outside the image, methods that read no token's row.
    """
    rows, columns = subject.transform.size
    place = parse_place(query, box, f" of what {subject.name} sees, {rows} rows x {columns} columns")
    deaf = [method.key for method in methods if not method.entry.reads_rows]
    for kind, numbers in place.items():
        argument, found = ("query", query) if box is None else ("box", box), Query(kind, (numbers,))
        name, text = argument
        if deaf:
            raise ValueError(f"{name}={text!r}: {', '.join(deaf)} read no token's row; leave out {name}, or them.")
        require_inside(f"{name}={text!r}", found, subject.transform.size)
        return found
    return None


def parse_layers(layers: Sequence[str], subject: LoadedModel) -> list[str]:
    """Return the names of layers, first to last.

    Args:
        layers: indices, negative ones from the last, names or patterns.
        subject: the model whose layers these are.

    Raises:
        ValueError: one of them matches no layer.
    """
    every = traced_layers(subject) if layers else []
    chosen = set()
    for text in layers:
        if text.removeprefix("-").isdecimal() and -len(every) <= int(text) < len(every):
            chosen.add(every[int(text)])
            continue
        fitting = [name for name in every if fnmatchcase(name, text)]
        if not fitting:
            known = f"{subject.name} has {len(every)} layers, 0..{len(every) - 1}. "
            raise ValueError(f"layers={text!r}: no such layer; {known}{nearest(text, every)}")
        chosen.update(fitting)
    return [name for name in every if name in chosen]


def same_depth(layers: Sequence[str], subject: LoadedModel, other: LoadedModel) -> list[str]:
    """Return the layers of a second model at the same relative depth as those of the first."""
    own, others = traced_layers(subject), traced_layers(other)
    deep = {round(own.index(name) / max(len(own) - 1, 1) * (len(others) - 1)) for name in layers}
    return [others[index] for index in sorted(deep)]


class Question(NamedTuple):
    """The request for one model, the same for every image.

    Args:
        subject: the model.
        methods: the maps to make.
        layers: names of the layers to use; empty: the methods' own defaults.
        target: class to explain. Default: the predicted one.
        query: the pixel or box whose rows are read. Default: the class token, or the mean over patches.
        by_default: whether nobody named the methods, so that those that the model turns out to refuse are left out.
    """

    subject: LoadedModel
    methods: Sequence[Method]
    layers: Sequence[str] = ()
    target: int | None = None
    query: Query | None = None
    by_default: bool = False

    def of_companion(self, other: LoadedModel) -> "Question":
        """Return the same question for a second model: layers at the same depth, class by name, query scaled."""
        target = self.target
        if target is not None and other.classes != self.subject.classes:
            name = self.subject.classes[target]
            target = other.classes.index(name) if name in other.classes else None
        layers = same_depth(self.layers, self.subject, other)
        rows, columns = (
            there / here for there, here in zip(other.transform.size, self.subject.transform.size, strict=True)
        )
        query = None if self.query is None else self.query.scaled(rows, columns)
        return Question(other, counterparts(self.methods, other), layers, target, query, self.by_default)
