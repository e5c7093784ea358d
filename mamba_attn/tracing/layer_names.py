"""How layers are named: by their name in the model, by a pattern, or by a number that counts them."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, TypeVar

from mamba_attn.errors import UnknownLayerError, nearest

Value = TypeVar("Value")
LayerName = str | int  # a name, or a number that counts layers from 0, from the last one when negative
LayerNames = LayerName | Iterable[LayerName]  # patterns too


class ByLayer(dict[str, Value]):
    """One value per layer, by name and in order; ``found[0]`` and ``found[-1]`` count the layers."""

    def __getitem__(self, layer: LayerName) -> Value:
        """Return a layer's value, by its name or number.

        Raises:
            UnknownLayerError: no such layer.
        """
        known = isinstance(layer, str) and layer in self
        return super().__getitem__(str(layer) if known else layer_name(f"[{layer!r}]", layer, list(self)))


def listed_layers(call: str, layers: Any) -> list[LayerName] | None:
    """Return what was asked for as a list; None stays None and stands for the default.

    Args:
        call: the argument as it is written, for the message.
        layers: names, patterns and numbers, or one of them.

    Raises:
        TypeError: anything else, True and False too.
    """
    if layers is None:
        return None
    one = isinstance(layers, str | Integral) or not isinstance(layers, Iterable)
    listed = [layers] if one else list(layers)
    for each in listed:
        if isinstance(each, bool) or not isinstance(each, str | Integral):
            raise TypeError(
                f"{call}: expected names, patterns or numbers of layers, e.g. ['layers.0.mixer', -1], got {each!r}."
            )
    return [each if isinstance(each, str) else int(each) for each in listed]


def layer_names(call: str, layers: LayerNames, names: Sequence[str]) -> list[str]:
    """Return the names that were asked for, in the order of all names.

    Args:
        call: the argument as it is written, for the message.
        layers: names, patterns (``"layers.1?.mixer"``) and numbers, or one of them.
        names: of all layers, in order.

    Raises:
        TypeError: neither names nor numbers.
        UnknownLayerError: a name or pattern that fits no layer, a number that is out of range.
    """
    chosen: set[str] = set()
    for each in listed_layers(call, layers) or []:
        fitting = [name for name in names if fnmatchcase(name, each)] if isinstance(each, str) else []
        chosen.update(fitting or [layer_name(call, each, names)])
    return [name for name in names if name in chosen]


def by_pattern(given: Mapping[str, Value], name: str) -> Value | None:
    """Return the value of the first pattern that fits a name, or None.

    Args:
        given: values by patterns of names.
        name: of a layer.
    """
    return next((value for pattern, value in given.items() if fnmatchcase(name, pattern)), None)


def layer_name(call: str, layer: LayerName, names: Sequence[str]) -> str:
    """Return the name of one layer.

    Args:
        call: the argument as it is written, for the message.
        layer: a name or a number.
        names: of all layers, in order.

    Raises:
        TypeError: neither a name nor a number.
        UnknownLayerError: no such layer.
    """
    listed_layers(call, [layer])
    if isinstance(layer, str):
        if layer in names:
            return layer
        raise UnknownLayerError(f"{call}: {layer!r} fits no layer. {nearest(layer, names)}")
    if not -len(names) <= layer < len(names):
        count = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
        known = f"; expected {-len(names)}..{len(names) - 1}" if names else ""
        raise UnknownLayerError(f"{call}: there is no layer {layer} of {count}{known}.")
    return names[layer]
