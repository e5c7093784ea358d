"""Parses a method and its options from text, as on the command line."""

import ast
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mamba_attn.attribution import catalogue
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.errors import nearest
from mamba_attn.tracing.door_layers import AnyLayout
from mamba_attn.tracing.layer_names import LayerNames

_WORDS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Method:
    """An attribution method and its options.

    Args:
        name: in the catalogue of methods.
        options: keyword arguments of its class.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The method as the user writes it; also the name of its array."""
        options = ",".join(f"{name}={str(value).lower()}" for name, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    @property
    def title(self) -> str:
        """A readable title, with the options in brackets."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.entry.title} ({options})" if options else self.entry.title

    @property
    def entry(self) -> catalogue.Entry:
        """Its entry in the catalogue."""
        return catalogue.get(self.name)

    @property
    def of_a_class(self) -> bool:
        """Whether the map depends on the class."""
        return self.entry.depends_on_class(self.options)

    def build(
        self, model: nn.Module, layers: LayerNames | None = None, layout: AnyLayout | None = None
    ) -> MapAttribution:
        """Return the method on a model; ``layers=None`` uses the method's default."""
        return catalogue.build(self.name, model, layers=layers, layout=layout, **self.options)


def method(text: str, argument: str = "method") -> Method:
    """Parse a method as a user writes it.

    Args:
        text: ``NAME`` or ``NAME:OPTION=VALUE,OPTION``, e.g. ``attention_rollout:signed``.
        argument: its name in error messages.

    Raises:
        ValueError: an unknown name, option or value.
    """
    call = f"{argument}={text!r}"
    name, _, rest = text.partition(":")
    if name not in catalogue.METHODS:
        raise ValueError(f"{call}: no such method. {nearest(name, catalogue.METHODS)}")
    known = catalogue.get(name).known_options
    options = {}
    for part in filter(None, rest.split(",")):
        key, given, value = part.partition("=")
        if key not in known:
            raise ValueError(f"{call}: {name} has no option {key!r}. {nearest(key, known)}")
        options[key] = _value(call, key, value if given else "true", known[key])
    return Method(name, options)


def _value(call: str, option: str, value: str, default: object) -> object:
    """Convert a value to the type of the option's default; if that is None, to a number if it looks like one."""
    if isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in _WORDS:
            raise ValueError(f"{call}: {option} is true or false, not {value!r}.")
        return _WORDS[value.lower()]
    if isinstance(default, int):
        if not value.lstrip("-").isdecimal():
            raise ValueError(f"{call}: {option} is a whole number, not {value!r}.")
        return int(value)
    if isinstance(default, float):
        return _number(call, option, value)
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _number(call: str, option: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{call}: {option} is a number, not {value!r}.") from None
