"""What a trace yields for one layer: its attention, rows, columns and products; and the layers of scans."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.core import notebook
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import MambaAttnError, NonFiniteError, TraceError, UnsupportedModelError
from mamba_attn.ops.arguments import working_dtype

Tail = Callable[[Tensor], Tensor]
AnyLayer = TypeVar("AnyLayer", bound="Layer")
LINEAR_FOLDS = ("mean", "sum")


class Layer(ABC):
    """One mixer call of a traced forward pass: what its tokens read from each other.

    Args:
        name: the mixer's name in the model.
        output: what the mixer returned.
        tail: recomputes the output from ``variable``, in mode "observe".
    """

    kind: ClassVar[str]  # in words

    def __init__(self, name: str, output: Any = None, tail: Tail | None = None) -> None:
        self.name = name
        self._output = output
        self.tail = tail

    @property
    @abstractmethod
    def _described(self) -> ScanRecord | AttentionRecord:
        """The record of the call."""

    @property
    def batch(self) -> int:
        """Number of images (or sequences)."""
        return self._described.batch

    @property
    def tokens(self) -> int:
        """Number of tokens in the token frame."""
        return self._described.tokens

    @property
    def padding(self) -> int:
        """Number of its last tokens that stand for padding, which is no part of the image."""
        return 0

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed from the record."""
        record = self._described
        return working_dtype(record) if isinstance(record, ScanRecord) else record.dtype

    @property
    def device(self) -> torch.device:
        """Of the record."""
        record = self._described
        return record.source_delta.device if isinstance(record, ScanRecord) else record.device

    def __repr__(self) -> str:
        facts = {"batch": self.batch, **self._facts(), "tokens": self.tokens}
        return f"{type(self).__name__}({self.name!r}, {', '.join(f'{key}={value}' for key, value in facts.items())})"

    def _repr_html_(self) -> str:
        """In a notebook: what the first image's patch in the middle reads, and where it is read; no matrix is made.

        Of a text, what its last token reads.
        """
        facts = {"kind": self.kind, "batch": self.batch, "tokens": self.tokens, **self._facts()}
        try:
            grid, patches = self.layout.grid, self.layout.patches
            facts["grid"] = " x ".join(map(str, grid))
            text = not self.layout.pixels
            place = tuple(n - 1 if text else n // 2 for n in grid)
            token = int(patches.view(grid)[place])
            with torch.no_grad():
                lines = {"reads": self.row(token)[0]}
                lines |= {} if text else {"is read": self.column(token)[0]}
                grids = {what: self.layout.to_grid(line[None])[0].float().cpu() for what, line in lines.items()}
            rows, columns = (1, *grid)[-2:]  # of a volume the slice with that patch
            high = max(1, columns // 8) if text else 1  # so that a line can be seen
            maps = {what: its[place[:-2]].reshape(rows, columns).repeat(high, 1).numpy() for what, its in grids.items()}
        except MambaAttnError as error:
            return notebook.card(self.name, facts, notebook.safe(error))
        which = f"the last token, {token}," if text else f"patch {place}"
        named = {"reads": f"what {which} reads", "is read": f"where {which} is read"}
        return notebook.card(
            self.name, facts, notebook.row([notebook.picture(its, named[what]) for what, its in maps.items()])
        )

    def _facts(self) -> dict[str, object]:
        """What a notebook and the repr show of this kind of layer."""
        return {}

    def _check_route(self, route: str | int, count: int) -> int:
        if not isinstance(route, int) or not 0 <= route < count:
            raise ValueError(f"{self.name}.attention(routes={route!r}): expected 'sum', 'each' or 0..{count - 1}.")
        return route

    @property
    def has_layout(self) -> bool:
        """Whether the tokens' place in the image is known."""
        return self._described.layout is not None

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens sit in the image.

        Raises:
            TraceError: the layout is not known.
        """
        layout = self._described.layout
        if layout is None:
            raise TraceError(
                f"{self.name}: the tokens' place in the image is not known, so there are no maps; pass "
                "layout=TokenLayout(grid=(height, width), ...) to trace(), to the method, or to LoadedModel()."
            )
        return layout

    @property
    def output(self) -> Tensor:
        """What the mixer returned, in the mixer's own shape.

        Raises:
            TraceError: the mixer returned no tensor.
        """
        if not isinstance(self._output, Tensor):
            raise TraceError(f"{self.name}: the mixer returned {type(self._output).__name__}, not a tensor.")
        return self._output

    @abstractmethod
    def lay_out(self, layout: TokenLayout | None) -> None:
        """Say where the tokens sit in the image; None leaves it as it is."""

    @property
    @abstractmethod
    def variable(self) -> Tensor:
        """What ``Trace.gradients`` differentiates by."""

    @abstractmethod
    def attention(
        self,
        fold: str = "mean",
        routes: str | int = "sum",
        *,
        row_weight: Tensor | None = None,
        col_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the attention matrix in the token frame: row i is what token i reads.

        Args:
            fold: of channels or heads: "mean", "sum", "positive", "absolute" or "each".
            routes: "sum", "each", or the number of one route.
            row_weight: multiplies row i; (batch, channels or heads, tokens).
            col_weight: multiplies column j; (batch, channels or heads, tokens).

        Returns:
            (batch, [channels or heads,] tokens, tokens); with routes="each" a second axis, of routes.
        """

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
        self,
        vector: Float[Tensor, "batch tokens"],
        *,
        fold: str = "mean",
        row_weight: Tensor | None = None,
        col_weight: Tensor | None = None,
        residual: bool = True,
    ) -> Float[Tensor, "batch tokens"]:
        """Return ``vector @ (I + attention)``, one step of a signed rollout; without ``residual`` the I is left out."""

    @cached_property
    @abstractmethod
    def _not_finite(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf."""

    def require_finite(self) -> None:
        """Raise NonFiniteError, with the names of the tensors, if the layer met NaN or Inf."""
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
    _expected: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        scan: ScanRecord,
        *,
        y: Tensor | None = None,
        output: Any = None,
        tail: Tail | None = None,
        attention: tuple[str, Tensor] | None = None,
    ) -> None:
        super().__init__(name, output, tail)
        self._scan = scan
        self._y = y
        self._ready = dict([attention]) if attention else {}

    @property
    def scan(self) -> ScanRecord:
        """Everything that the scans depended on, in the token frame."""
        return self._scan

    def lay_out(self, layout: TokenLayout | None) -> None:
        """Say where the tokens sit in the image; None leaves it as it is."""
        if layout is not None:
            object.__setattr__(self._scan, "layout", layout)  # the same record: rules know it by its identity

    @property
    def _described(self) -> ScanRecord:
        return self.scan

    def _facts(self) -> dict[str, object]:
        return {"routes": self.scan.routes, "channels": self.scan.channels, "states": self.scan.states}

    def expect(self, fold: str) -> None:
        """Keep the matrix of a fold once it is computed; the next weighted one takes it along, which costs little.

        Args:
            fold: "mean" or "sum".
        """
        self._expected = tuple(dict.fromkeys((*self._expected, fold)))

    @property
    def variable(self) -> Tensor:
        """The scans' output ``y``."""
        return self.y

    @property
    def y(self) -> Float[Tensor, "batch channels tokens"]:
        """The scans' output, routes summed in the token frame and scaled; before norm and gate."""
        if self._y is not None:
            return self._y
        return ops.selective_scan(self.scan)

    def attention(
        self,
        fold: str = "mean",
        routes: str | int = "sum",
        *,
        row_weight: Tensor | None = None,
        col_weight: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Return the attention matrix in the token frame: row i is what token i reads.

        Args:
            fold: as in ``mamba_attn.hidden_attention``.
            routes: "sum", "each", or the number of one route.
            row_weight: multiplies row i; (batch, channels, tokens), or per route in scan order.
            col_weight: multiplies column j; (batch, channels, tokens), or per route in scan order.
            backend: as in ``mamba_attn.hidden_attention``.

        Returns:
            (batch, [channels,] tokens, tokens), or (batch, routes, [channels,] tokens, tokens) with routes="each";
            times the record's scale.

        Raises:
            ValueError: an unknown fold or route.
            NonFiniteError: the layer met NaN or Inf.
            MatrixTooLargeError: the result would not fit the memory.
        """
        self.require_finite()
        plain = row_weight is None and col_weight is None and backend is None
        if plain and routes == "sum" and fold in self._ready:
            return self._ready[fold]

        def folded(scan: ScanRecord, rows: Tensor | None, columns: Tensor | None) -> Tensor:
            return ops.hidden_attention(scan, row_weight=rows, col_weight=columns, fold=fold, backend=backend)

        if routes == "sum":
            waiting = [each for each in self._expected if each not in self._ready]
            if plain and fold in waiting and not torch.is_grad_enabled():
                self._ready[fold] = folded(self.scan, None, None)
                return self._ready[fold]
            if not waiting or plain or backend is not None or torch.is_grad_enabled():
                return folded(self.scan, row_weight, col_weight)
            weights = [(row_weight, col_weight), *[(None, None)] * len(waiting)]
            wanted, *others = ops.hidden_attentions(self.scan, weights, [fold, *waiting])
            self._ready |= dict(zip(waiting, others, strict=True))
            return wanted
        count = self.scan.routes
        chosen = range(count) if routes == "each" else [self._check_route(routes, count)]
        matrices = [
            folded(self.scan.select_routes(slice(r, r + 1)), _of_route(row_weight, r), _of_route(col_weight, r))
            for r in chosen
        ]
        return torch.stack(matrices, dim=1) if routes == "each" else matrices[0]

    def row(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return what one token reads, (batch, [channels,] tokens), in linear time."""
        self.require_finite()
        if row_weight is None and col_weight is None and fold in self._ready and 0 <= token < self.tokens:
            return self._ready[fold][..., token, :]
        return ops.attention_row(self.scan, row=token, fold=fold, row_weight=row_weight, col_weight=col_weight)

    def column(
        self, token: int, *, fold: str = "mean", row_weight: Tensor | None = None, col_weight: Tensor | None = None
    ) -> Tensor:
        """Return where one token is read, (batch, [channels,] tokens), in linear time."""
        self.require_finite()
        return ops.attention_column(self.scan, column=token, fold=fold, row_weight=row_weight, col_weight=col_weight)

    def left_product(
        self,
        vector: Float[Tensor, "batch tokens"],
        *,
        fold: str = "mean",
        row_weight: Tensor | None = None,
        col_weight: Tensor | None = None,
        residual: bool = True,
    ) -> Float[Tensor, "batch tokens"]:
        """Return ``vector @ (I + attention)`` in linear time; without ``residual`` the I is left out."""
        self.require_finite()
        if row_weight is None and col_weight is None and fold in self._ready and fold in LINEAR_FOLDS:
            matrix = self._ready[fold]
            read = (vector.to(matrix).unsqueeze(1) @ matrix).squeeze(1)
            return vector + read if residual else read
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
        self.require_finite()
        return ops.scan_states(self.scan, routes=route, channels=channels).squeeze(1)

    @cached_property
    def _not_finite(self) -> list[str]:
        scan = self.scan
        if self._ready and self._y is not None and all_finite([self._y, *self._ready.values()]):
            return []  # computed from everything, and there already
        tensors = {"u": scan.source_u, "delta": scan.source_delta, "B": scan.source_B, "C": scan.source_C, "A": scan.A}
        tensors |= {} if scan.source_gain is None else {"gain": scan.source_gain}
        if all_finite(list(tensors.values())):
            return []
        return [name for name, tensor in tensors.items() if not all_finite([tensor])]


def _of_route(weight: Tensor | None, route: int) -> Tensor | None:
    """One route's part of a weight that has one per route."""
    return weight[:, route : route + 1] if isinstance(weight, Tensor) and weight.ndim == 4 else weight
