"""What a model returned: the tensors in it, and which of them holds its scores."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

Steps = tuple[tuple[str, Any], ...]
_SCORES = ("logits", "scores", "out", "output")  # names of one tensor among several that would do
_SHOWN = 4  # tensors of an output in a message


class Leaf(NamedTuple):
    """A tensor in an output.

    Args:
        steps: ("item", key) or ("field", name), one after the other.
        tensor: what they lead to.
    """

    steps: Steps
    tensor: Tensor

    @property
    def code(self) -> str:
        """The expression for it."""
        return "output" + "".join(f".{key}" if kind == "field" else f"[{key!r}]" for kind, key in self.steps)


def find_scores(output: Any, batch: int) -> tuple[Leaf | None, list[Leaf]]:
    """Return the scores in a model's output, None where it cannot be known which they are, and all that would do.

    They are the only (batch, classes) tensor, or else the only one with one result per image; of several, the one
    called "logits", "scores", "out" or "output".

    Args:
        output: a tensor, or tuples, lists, mappings and dataclasses of them.
        batch: number of images.
    """
    unique = {id(leaf.tensor): leaf for leaf in reversed(list(leaves(output)))}  # a value may stand under two names
    found = [
        leaf
        for leaf in reversed(unique.values())
        if leaf.tensor.is_floating_point() and leaf.tensor.ndim >= 1 and len(leaf.tensor) == batch
    ]
    fitting = [leaf for leaf in found if leaf.tensor.ndim == 2] or found
    if len(fitting) == 1:
        return fitting[0], fitting
    for name in _SCORES:
        called = [leaf for leaf in fitting if leaf.steps and leaf.steps[-1][1] == name]
        if len(called) == 1:
            return called[0], fitting
    return None, fitting


def follow(output: Any, steps: Steps) -> Tensor:
    """Return the tensor that the steps of a leaf lead to."""
    for kind, key in steps:
        output = getattr(output, key) if kind == "field" else output[key]
    found: Tensor = output
    return found


def leaves(value: Any, steps: Steps = ()) -> Iterator[Leaf]:
    """Yield every tensor in an output.

    Args:
        value: of the output.
        steps: that led there.
    """
    if isinstance(value, Tensor):
        yield Leaf(steps, value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, (*steps, ("item", key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield from leaves(getattr(value, name), (*steps, ("field", name)))
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from leaves(part, (*steps, ("item", index)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*steps, ("field", field.name)))


def described(output: Any) -> str:
    """Return an output in words: a tensor's shape, or a type and the shapes in it."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape)) if output.is_floating_point() else f"{output.dtype} {tuple(output.shape)}"
    found = list(leaves(output))
    shown = ", ".join(f"{leaf.code} {tuple(leaf.tensor.shape)}" for leaf in found[:_SHOWN])
    more = ", ..." if len(found) > _SHOWN else ""
    return f"{type(output).__name__}{f' ({shown}{more})' if shown else ''}"
