"""ScanRecord: everything that one call of a mixer's selective scans depended on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mamba_attn._types import Float, Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.order_check import is_known, remember, require_distinct
from mamba_attn.errors import TraceError


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanRecord:
    """One mixer call: a few selective scans (routes), each walking the tokens in its own order.

    ``u, delta, B, C`` have their letters of the Mamba paper (arXiv 2312.00752) and are in scan order. Mamba-1 has
    heads == channels and groups == 1; Mamba-2 has channels == heads x head width. ``delta`` is after bias and softplus.

    A mixer whose routes permute shared tensors keeps these in the token frame instead (``source_frame="tokens"``):
    the kernels index them, and ``u, delta, B, C`` gather when asked.

    Args:
        source_u: (batch, routes or 1, channels, positions).
        source_delta: (batch, routes or 1, heads, positions), positive.
        A: (routes, heads, states), or (routes, heads, 1) where states share it; negative.
        source_B: (batch, routes or 1, groups, states, positions).
        source_C: as ``source_B``.
        D: (routes, channels) or None.
        gate: (batch, channels, tokens) in the token frame, after its activation, or None.
        bypass: (batch, channels of its own, tokens) in the token frame: channels that no scan mixes and that stand
            beside those of the scans after them (MambaVision's second half), or None.
        read_order: (routes, length), token read at each step. A route may leave tokens out, but visits none twice.
        write_order: (routes, length), token written at each step, none twice on a route; differs from ``read_order``
            in rare variants only.
        tokens: number of tokens in the token frame.
        scale: factor of the summed routes (1/2 for Vim's division).
        source_frame: "scan" when positions are steps, "tokens" when they are tokens.
        layout: where the tokens sit in the image, when known.

    Raises:
        ValueError: an order that visits a token twice on one route, or one that does not exist.
    """

    source_u: Float[Tensor, "batch _ channels positions"]
    source_delta: Float[Tensor, "batch _ heads positions"]
    A: Float[Tensor, "routes heads _states"]
    source_B: Float[Tensor, "batch _ groups states positions"]
    source_C: Float[Tensor, "batch _ groups states positions"]
    D: Float[Tensor, "routes channels"] | None = None
    gate: Float[Tensor, "batch channels tokens"] | None = None
    bypass: Float[Tensor, "batch bypassing tokens"] | None = None
    read_order: Int[Tensor, "routes length"]
    write_order: Int[Tensor, "routes length"]
    tokens: int
    scale: float = 1.0
    source_frame: str = "scan"
    layout: TokenLayout | None = None

    def __post_init__(self) -> None:
        """Look at orders that are new."""
        require_distinct("ScanRecord: read_order", self.read_order, self.tokens)
        if self.write_order is not self.read_order:
            require_distinct("ScanRecord: write_order", self.write_order, self.tokens)

    @classmethod
    def from_scan(
        cls,
        u: Float[Tensor, "batch routes channels length"],
        delta: Float[Tensor, "batch routes heads length"],
        A: Float[Tensor, "routes heads _states"],
        B: Float[Tensor, "batch routes groups states length"],
        C: Float[Tensor, "batch routes groups states length"],
        D: Float[Tensor, "routes channels"] | None = None,
        *,
        order: Int[Tensor, "routes length"] | None = None,
        tokens: int | None = None,
        gate: Float[Tensor, "batch channels tokens"] | None = None,
        bypass: Float[Tensor, "batch bypassing tokens"] | None = None,
        scale: float = 1.0,
        layout: TokenLayout | None = None,
    ) -> Self:
        """Build a record from tensors in scan order; ``order=None`` walks tokens 0, 1, 2, ... in every route."""
        length = delta.shape[-1]
        tokens = length if tokens is None else tokens
        if order is None:
            with torch.inference_mode(False):  # inference tensors are looked at every time
                order = torch.arange(length, device=delta.device).expand(delta.shape[1], length)
            if length <= tokens:
                remember(order, tokens)
        require_distinct("ScanRecord.from_scan: order", order, tokens)
        return cls(
            source_u=u, source_delta=delta, A=A, source_B=B, source_C=C, D=D, gate=gate, bypass=bypass,
            read_order=order, write_order=order, tokens=tokens, scale=scale, layout=layout,
        )  # fmt: skip

    @classmethod
    def from_tokens(
        cls,
        u: Float[Tensor, "batch _ channels tokens"],
        delta: Float[Tensor, "batch _ heads tokens"],
        A: Float[Tensor, "routes heads _states"],
        B: Float[Tensor, "batch _ groups states tokens"],
        C: Float[Tensor, "batch _ groups states tokens"],
        D: Float[Tensor, "routes channels"] | None = None,
        *,
        order: Int[Tensor, "routes length"],
        gate: Float[Tensor, "batch channels tokens"] | None = None,
        bypass: Float[Tensor, "batch bypassing tokens"] | None = None,
        scale: float = 1.0,
        layout: TokenLayout | None = None,
    ) -> Self:
        """Build a record from tensors in the token frame, which every route reads in its own order."""
        require_distinct("ScanRecord.from_tokens: order", order, u.shape[-1])
        return cls(
            source_u=u, source_delta=delta, A=A, source_B=B, source_C=C, D=D, gate=gate, bypass=bypass,
            read_order=order, write_order=order, tokens=u.shape[-1], scale=scale, source_frame="tokens", layout=layout,
        )  # fmt: skip

    @property
    def batch(self) -> int:
        """Number of images (or sequences)."""
        return self.source_u.shape[0]

    @property
    def routes(self) -> int:
        """Number of scans."""
        return self.read_order.shape[0]

    @property
    def channels(self) -> int:
        """Number of channels of ``u``."""
        return self.source_u.shape[2]

    @property
    def heads(self) -> int:
        """Number of step sizes per token; equals ``channels`` in Mamba-1."""
        return self.source_delta.shape[2]

    @property
    def states(self) -> int:
        """States per channel."""
        return self.source_B.shape[3]

    @property
    def length(self) -> int:
        """Steps per route."""
        return self.read_order.shape[1]

    @property
    def u(self) -> Float[Tensor, "batch routes channels length"]:
        """The scan's input, in scan order."""
        return self._in_scan_order(self.source_u)

    @property
    def delta(self) -> Float[Tensor, "batch routes heads length"]:
        """Step sizes after bias and softplus, in scan order."""
        return self._in_scan_order(self.source_delta)

    @property
    def B(self) -> Float[Tensor, "batch routes groups states length"]:  # noqa: N802
        """Input matrix, in scan order."""
        return self._in_scan_order(self.source_B)

    @property
    def C(self) -> Float[Tensor, "batch routes groups states length"]:  # noqa: N802
        """Output matrix, in scan order."""
        return self._in_scan_order(self.source_C)

    def on_grid(self, x: Float[Tensor, "batch channels tokens"]) -> Float[Tensor, "batch height width channels"]:
        """Return values of tokens at their cells of the image, for mixers whose norm and gate see a grid.

        Raises:
            TraceError: the layout is not known.
        """
        if self.layout is None:
            raise TraceError(
                "ScanRecord.on_grid: the tokens' place in the image is not known; give the record layout=."
            )
        placed: Tensor = x.mT.unflatten(1, self.layout.grid)
        return placed

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a record whose floating-point tensors went through ``function`` (e.g. ``Tensor.detach``)."""
        names = ("source_u", "source_delta", "A", "source_B", "source_C", "D", "gate", "bypass")
        values = {name: getattr(self, name) for name in names}
        return self.replace(**{name: None if value is None else function(value) for name, value in values.items()})

    def replace(self, **changes: object) -> Self:
        """Return a record with some fields replaced."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return type(self)(**{**fields, **changes})

    def select_routes(self, routes: slice) -> Self:
        """Return the record of some routes only; nothing is copied."""

        def pick(source: Tensor) -> Tensor:
            return source if source.shape[1] == 1 else source[:, routes]

        def pick_order(order: Tensor) -> Tensor:
            part = order[routes]
            if is_known(order, self.tokens):
                remember(part, self.tokens)
            return part

        read_order = pick_order(self.read_order)
        same = self.write_order is self.read_order
        return self.replace(
            source_u=pick(self.source_u), source_delta=pick(self.source_delta), A=self.A[routes],
            source_B=pick(self.source_B), source_C=pick(self.source_C), D=None if self.D is None else self.D[routes],
            read_order=read_order, write_order=read_order if same else pick_order(self.write_order),
        )  # fmt: skip

    def _in_scan_order(self, source: Tensor) -> Tensor:
        """Expand shared routes; gather the token frame along each route's order."""
        source = source.expand(-1, self.routes, *source.shape[2:])
        if self.source_frame == "scan":
            return source
        index = self.read_order.view(1, self.routes, *[1] * (source.ndim - 3), self.length)
        return source.gather(-1, index.expand(*source.shape[:-1], self.length))
