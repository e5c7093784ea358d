"""What a trace yields for one layer: its attention, rows, columns and products."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.core import notebook
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import (
    MambaAttnError,
    NonFiniteError,
    TraceError,
    UnknownLayerError,
    UnsupportedModelError,
    nearest,
)
from mamba_attn.ops.arguments import working_dtype

Tail = Callable[[Tensor], Tensor]
AnyLayer = TypeVar("AnyLayer", bound="Layer")
Value = TypeVar("Value")
LayerName = str | int  # a name, or a number that counts layers from 0, from the last one when negative
LayerNames = LayerName | Iterable[LayerName]  # patterns too


class ByLayer(dict[str, Value]):
    """One value per layer, by name and in order; ``found[0]`` and ``found[-1]`` count the layers."""

    def __missing__(self, layer: LayerName) -> Value:
        """Look a number up, or refuse a name that is not there."""
        return self[layer_name(f"[{layer!r}]", layer, list(self))]


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


class Layer(ABC):
    """One mixer call of a traced forward pass: what its tokens read from each other.

    Args:
        name: the mixer's name in the model.
        record: everything that the call depended on.
        output: what the mixer returned.
        tail: recomputes the output from ``variable``, in mode "observe".
    """

    kind: ClassVar[str]  # in words

    def __init__(
        self, name: str, record: ScanRecord | AttentionRecord, output: Any = None, tail: Tail | None = None
    ) -> None:
        self.name = name
        self.batch = record.batch
        self.tokens = record.tokens
        if isinstance(record, ScanRecord):
            self.dtype, self.device = working_dtype(record), record.source_delta.device
        else:
            self.dtype, self.device = record.dtype, record.device
        self._layout = record.layout
        self._output = output
        self._tail = tail

    def _repr_html_(self) -> str:
        """In a notebook: what the first image's patch in the middle reads, and where it is read; no matrix is made."""
        facts = {"kind": self.kind, "batch": self.batch, "tokens": self.tokens, **self._facts()}
        try:
            grid, patches = self.layout.grid, self.layout.patches
            facts["grid"] = "{} x {}".format(*grid)
            place = (grid[0] // 2, grid[1] // 2)
            token = int(patches[place[0] * grid[1] + place[1]])
            with torch.no_grad():
                lines = {"reads": self.row(token)[0], "is read": self.column(token)[0]}
                maps = {what: self.layout.to_grid(line[None])[0].float().cpu().numpy() for what, line in lines.items()}
        except MambaAttnError as error:
            return notebook.card(self.name, facts, notebook.safe(error))
        named = {"reads": f"what patch {place} reads", "is read": f"where patch {place} is read"}
        return notebook.card(
            self.name, facts, notebook.row([notebook.picture(its, named[what]) for what, its in maps.items()])
        )

    def _facts(self) -> dict[str, object]:
        """What a notebook shows of this kind of layer."""
        return {}

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens sit in the image.

        Raises:
            TraceError: the layout is not known.
        """
        if self._layout is None:
            raise TraceError(
                f"{self.name}: the tokens' place in the image is not known, so there are no maps; pass "
                "layout=TokenLayout(grid=(height, width), ...) to trace()."
            )
        return self._layout

    @property
    def output(self) -> Tensor:
        """What the mixer returned, in the mixer's own shape.

        Raises:
            TraceError: the mixer returned no tensor.
        """
        if not isinstance(self._output, Tensor):
            raise TraceError(f"{self.name}: the mixer returned {type(self._output).__name__}, not a tensor.")
        return self._output

    @property
    @abstractmethod
    def variable(self) -> Tensor:
        """What ``Trace.gradients`` differentiates by."""

    @abstractmethod
    def attention(
        self, fold: str = "mean", *, row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return the attention matrix in the token frame: row i is what token i reads."""

    @abstractmethod
    def row(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return what one token reads, a row of ``attention``."""

    @abstractmethod
    def column(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return where one token is read, a column of ``attention``."""

    @abstractmethod
    def left_product(
        self, vector: Float[Tensor, "batch tokens"], *, fold: str = "mean", row_weight: Tensor | None = None,
        col_weight: Tensor | None = None, residual: bool = True,
    ) -> Float[Tensor, "batch tokens"]:  # fmt: skip
        """Return ``vector @ (I + attention)``, one step of a signed rollout; without ``residual`` the I is left out."""

    @cached_property
    @abstractmethod
    def _not_finite(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf."""

    def _require_finite(self) -> None:
        if self._not_finite:
            raise NonFiniteError(
                f"{self.name}: {', '.join(self._not_finite)} contain NaN or Inf; check the images, the weights and the "
                "precision of the forward pass."
            )


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds NaN or Inf; one wait for the device, however many there are."""
    ends = [end for tensor in tensors for end in tensor.detach().aminmax()]
    return all(map(math.isfinite, torch.stack(ends).tolist()))


def require(call: str, layers: Iterable[Layer], wanted: type[AnyLayer]) -> list[AnyLayer]:
    """Return the layers, which must be of one kind.

    Args:
        call: who asks, for the message.
        layers: of one trace.
        wanted: the kind.

    Raises:
        UnsupportedModelError: some are of another kind.
    """
    checked = list(layers)
    others = [layer for layer in checked if not isinstance(layer, wanted)]
    if others:
        names = ", ".join(layer.name for layer in others[:3]) + (", ..." if len(others) > 3 else "")
        raise UnsupportedModelError(
            f"{call} is defined for {wanted.kind}, and {names} are {others[0].kind}; name other layers with layers=, "
            "or use AttentionRollout or RawAttention, which take both; MambaAttribution is for selective scans, "
            "TransformerAttribution for softmax attention."
        )
    return [layer for layer in checked if isinstance(layer, wanted)]


class ScanLayer(Layer):
    """One call of a mixer of selective scans; row, column and left_product take linear time.

    Args:
        name: the mixer's name in the model.
        scan: the record of the call.
        y: the scans' merged output (batch, channels, tokens) of the running model, or None in mode "observe".
        output: what the mixer returned.
        tail: recomputes the output from y, in mode "observe".
        attention: (fold, matrix) when one was computed during the pass.
    """

    kind: ClassVar[str] = "selective scans"

    def __init__(
        self, name: str, scan: ScanRecord, *, y: Tensor | None = None, output: Any = None,
        tail: Tail | None = None, attention: tuple[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, scan, output, tail)
        self.scan = scan
        self._y = y
        self._ready = dict([attention]) if attention else {}

    def __repr__(self) -> str:
        scan = self.scan
        return (
            f"ScanLayer({self.name!r}, batch={scan.batch}, routes={scan.routes}, channels={scan.channels}, "
            f"states={scan.states}, tokens={scan.tokens})"
        )

    def _facts(self) -> dict[str, object]:
        return {"routes": self.scan.routes, "channels": self.scan.channels, "states": self.scan.states}

    @property
    def variable(self) -> Tensor:
        """The scans' output ``y``."""
        return self.y

    @property
    def y(self) -> Float[Tensor, "batch channels tokens"]:
        """The scans' output, routes summed in the token frame and scaled; before norm and gate."""
        if self._y is not None:
            return self._y
        y = ops.selective_scan(self.scan)
        return y if isinstance(y, Tensor) else y[0]

    def attention(
        self, fold: str = "mean", routes: str | int = "sum", *, row_weight: Tensor | None = None,
        col_weight: Tensor | None = None, backend: str | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the attention matrix in the token frame: row i is what token i reads.

        Args:
            fold: as in ``mamba_attn.hidden_attention``.
            routes: "sum", "each", or the number of one route.
            row_weight: (batch, channels, tokens), or per route in scan order.
            col_weight: likewise.
            backend: as in ``mamba_attn.hidden_attention``.

        Returns:
            (batch, [channels,] tokens, tokens), or (batch, routes, [channels,] tokens, tokens) with routes="each";
            times the record's scale.

        Raises:
            ValueError: an unknown fold or route.
            NonFiniteError: the layer met NaN or Inf.
            MatrixTooLargeError: the result would not fit the memory.
        """
        self._require_finite()
        plain = row_weight is None and col_weight is None and backend is None
        if plain and routes == "sum" and fold in self._ready:
            return self._ready[fold]
        weights = {"row_weight": row_weight, "col_weight": col_weight, "fold": fold, "backend": backend}
        if routes == "each":
            each = (self.attention(routes=route, **weights) for route in range(self.scan.routes))  # type: ignore[arg-type]
            return torch.stack(list(each), dim=1)
        if routes == "sum":
            return ops.hidden_attention(self.scan, **weights)  # type: ignore[arg-type]
        own = self._route(routes)
        for key in ("row_weight", "col_weight"):
            weight = weights[key]
            if isinstance(weight, Tensor) and weight.ndim == 4:
                weights[key] = weight[:, own]
        return ops.hidden_attention(self.scan.select_routes(own), **weights)  # type: ignore[arg-type]

    def row(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return what one token reads, (batch, [channels,] tokens), in linear time."""
        self._require_finite()
        return ops.attention_row(self.scan, row=token, fold=fold, row_weight=row_weight, col_weight=col_weight)

    def column(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return where one token is read, (batch, [channels,] tokens), in linear time."""
        self._require_finite()
        return ops.attention_column(self.scan, column=token, fold=fold, row_weight=row_weight, col_weight=col_weight)

    def left_product(
        self, vector: Float[Tensor, "batch tokens"], *, fold: str = "mean", row_weight: Tensor | None = None,
        col_weight: Tensor | None = None, residual: bool = True,
    ) -> Float[Tensor, "batch tokens"]:  # fmt: skip
        """Return ``vector @ (I + attention)`` in linear time; without ``residual`` the I is left out."""
        self._require_finite()
        product = ops.left_product(self.scan, vector=vector, fold=fold, row_weight=row_weight, col_weight=col_weight)
        return vector + product if residual else product

    def states(
        self, route: int = 0, channels: int | Iterable[int] | None = None
    ) -> Float[Tensor, "batch channels states length"]:
        """Return the hidden states of one route after each of its steps, in linear time; nothing else is stored.

        ``scan.read_order[route]`` is the token of each step. C . h + D u is what the route puts out.

        Args:
            route: its number.
            channels: the number of one channel, or several. Default: all.

        Raises:
            ValueError: a route or channel that is not there.
            NonFiniteError: the layer met NaN or Inf.
            MatrixTooLargeError: the states would not fit the memory; name fewer channels.
        """
        self._require_finite()
        return ops.scan_states(self.scan, routes=route, channels=channels).squeeze(1)

    def _route(self, route: str | int) -> slice:
        if not isinstance(route, int) or not 0 <= route < self.scan.routes:
            raise ValueError(
                f"{self.name}.attention(routes={route!r}): expected 'sum', 'each' or 0..{self.scan.routes - 1}."
            )
        return slice(route, route + 1)

    @cached_property
    def _not_finite(self) -> list[str]:
        scan = self.scan
        if self._ready and self._y is not None and all_finite([self._y, *self._ready.values()]):
            return []  # computed from everything, and there already
        tensors = {"u": scan.source_u, "delta": scan.source_delta, "B": scan.source_B, "C": scan.source_C, "A": scan.A}
        if all_finite(list(tensors.values())):
            return []
        return [name for name, tensor in tensors.items() if not all_finite([tensor])]
