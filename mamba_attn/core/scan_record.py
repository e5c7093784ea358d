"""ScanRecord: every input of one call of a mixer's selective scans."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
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
    the kernels index them, and the properties ``u, delta, B, C`` gather on access.

    Args:
        source_u: (batch, routes or 1, channels, positions).
        source_delta: (batch, routes or 1, heads, positions), not negative: how far the state decays.
        A: (routes, heads, states), or (routes, heads, 1) if states share it; negative.
        source_B: (batch, routes or 1, groups, states, positions).
        source_C: as ``source_B``.
        D: (routes, channels): each route adds D times what its step reads; or (batch, channels, tokens), in the token
            frame: each token adds D times its own input, which all routes share; or None.
        source_gain: as ``source_delta``, of any sign: factor of the input; None if that is delta.
        gate: (batch, channels, tokens) in the token frame, after its activation, or None.
        bypass: (batch, channels of its own, tokens) in the token frame: channels that no scan mixes, concatenated
            after those of the scans (MambaVision's second half), or None.
        read_order: (routes, length), or (batch, routes, length) where images differ: token read at each step. A route
            may leave tokens out, but visits none twice. -1: the step reads no token; its state decays and takes
            nothing in.
        write_order: (routes, length) or (batch, routes, length): token written at each step, at most once per route;
            differs from ``read_order`` in rare variants only. -1: the step's output is dropped.
        tokens: number of tokens in the token frame.
        scale: factor of the summed routes (1/2 for Vim's division).
        source_frame: "scan" when positions are steps, "tokens" when they are tokens.
        layout: where the tokens sit in the image, when known.

    Attributes:
        lacking: whether steps of ``read_order`` and of ``write_order`` lack a token; None if unchecked (see
            ``core.order_check``).

    Raises:
        ValueError: an order that visits a token twice on one route, or one that does not exist; a gain, a D of tokens
            or an order of images whose shape does not agree; a D of tokens where routes have inputs of their own.

    Example:
        >>> u, delta, A = torch.rand(1, 2, 8, 5), torch.rand(1, 2, 8, 5), -torch.rand(2, 8, 4)
        >>> B = C = torch.rand(1, 2, 1, 4, 5)
        >>> order = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])  # two routes, forwards and backwards
        >>> record = ScanRecord.from_scan(u, delta, A, B, C, order=order)
        >>> record.routes, record.tokens
        (2, 5)
    """

    source_u: Float[Tensor, "batch _ channels positions"]
    source_delta: Float[Tensor, "batch _ heads positions"]
    A: Float[Tensor, "routes heads _states"]
    source_B: Float[Tensor, "batch _ groups states positions"]
    source_C: Float[Tensor, "batch _ groups states positions"]
    D: Float[Tensor, "routes channels"] | Float[Tensor, "batch channels _tokens"] | None = None
    source_gain: Float[Tensor, "batch _ heads _positions"] | None = None
    gate: Float[Tensor, "batch channels tokens"] | None = None
    bypass: Float[Tensor, "batch bypassing tokens"] | None = None
    read_order: Int[Tensor, "... routes length"]
    write_order: Int[Tensor, "... routes length"]
    tokens: int
    scale: float = 1.0
    source_frame: str = "scan"
    layout: TokenLayout | None = None
    lacking: tuple[bool | None, bool | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate new orders, and the shapes of optional tensors."""
        read = write = require_distinct("ScanRecord: read_order", self.read_order, self.tokens, padding=True)
        if self.write_order is not self.read_order:
            write = require_distinct("ScanRecord: write_order", self.write_order, self.tokens, padding=True)
        object.__setattr__(self, "lacking", (read, write))
        if self.read_order.ndim + self.write_order.ndim > 4:
            self._check_orders_of_images()
        if self.source_gain is not None:
            self._check_gain(self.source_gain)
        if self.D is not None and self.D.ndim == 3:
            self._check_skip_of_tokens(self.D)

    @classmethod
    def from_scan(
        cls,
        u: Float[Tensor, "batch routes channels length"],
        delta: Float[Tensor, "batch routes heads length"],
        A: Float[Tensor, "routes heads _states"],
        B: Float[Tensor, "batch routes groups states length"],
        C: Float[Tensor, "batch routes groups states length"],
        D: Float[Tensor, "routes channels"] | Float[Tensor, "batch channels tokens"] | None = None,
        *,
        gain: Float[Tensor, "batch routes heads length"] | None = None,
        order: Int[Tensor, "... routes length"] | None = None,
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
            with torch.inference_mode(False):  # inference tensors are checked every time
                order = torch.arange(length, device=delta.device).expand(delta.shape[1], length)
            if length <= tokens:
                remember(order, tokens)
        require_distinct("ScanRecord.from_scan: order", order, tokens, padding=True)
        return cls(
            source_u=u,
            source_delta=delta,
            A=A,
            source_B=B,
            source_C=C,
            D=D,
            source_gain=gain,
            gate=gate,
            bypass=bypass,
            read_order=order,
            write_order=order,
            tokens=tokens,
            scale=scale,
            layout=layout,
        )

    @classmethod
    def from_tokens(
        cls,
        u: Float[Tensor, "batch _ channels tokens"],
        delta: Float[Tensor, "batch _ heads tokens"],
        A: Float[Tensor, "routes heads _states"],
        B: Float[Tensor, "batch _ groups states tokens"],
        C: Float[Tensor, "batch _ groups states tokens"],
        D: Float[Tensor, "routes channels"] | Float[Tensor, "batch channels tokens"] | None = None,
        *,
        gain: Float[Tensor, "batch _ heads tokens"] | None = None,
        order: Int[Tensor, "... routes length"],
        gate: Float[Tensor, "batch channels tokens"] | None = None,
        bypass: Float[Tensor, "batch bypassing tokens"] | None = None,
        scale: float = 1.0,
        layout: TokenLayout | None = None,
    ) -> Self:
        """Build a record from tensors in the token frame, which every route reads in its own order."""
        require_distinct("ScanRecord.from_tokens: order", order, u.shape[-1], padding=True)
        return cls(
            source_u=u,
            source_delta=delta,
            A=A,
            source_B=B,
            source_C=C,
            D=D,
            source_gain=gain,
            gate=gate,
            bypass=bypass,
            read_order=order,
            write_order=order,
            tokens=u.shape[-1],
            scale=scale,
            source_frame="tokens",
            layout=layout,
        )

    @property
    def batch(self) -> int:
        """Number of images (or sequences)."""
        return self.source_u.shape[0]

    @property
    def routes(self) -> int:
        """Number of scans."""
        return self.read_order.shape[-2]

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
        return self.read_order.shape[-1]

    @property
    def shares_orders(self) -> bool:
        """Whether all images walk the same orders and every step has a token, as the compiled kernels require."""
        read, write = self.lacking
        return not read and not write and self.read_order.ndim == self.write_order.ndim == 2

    @property
    def u(self) -> Float[Tensor, "batch routes channels length"]:
        """The scan's input, in scan order; zero where a step reads no token."""
        return self._in_scan_order(self.source_u, read=True)

    @property
    def delta(self) -> Float[Tensor, "batch routes heads length"]:
        """Step sizes after bias and softplus, in scan order."""
        return self._in_scan_order(self.source_delta)

    @property
    def gain(self) -> Float[Tensor, "batch routes heads length"]:
        """Factor of the input, in scan order: delta, unless the record has a gain of its own."""
        return self.delta if self.source_gain is None else self._in_scan_order(self.source_gain)

    @property
    def B(self) -> Float[Tensor, "batch routes groups states length"]:  # noqa: N802
        """Input matrix, in scan order; zero where a step reads no token."""
        return self._in_scan_order(self.source_B, read=True)

    @property
    def C(self) -> Float[Tensor, "batch routes groups states length"]:  # noqa: N802
        """Output matrix, in scan order."""
        return self._in_scan_order(self.source_C)

    @property
    def token_u(self) -> Float[Tensor, "batch channels tokens"]:
        """The input of every token, if all routes share it.

        Raises:
            ValueError: routes have different inputs.
        """
        if self.source_frame == "tokens" and self.source_u.shape[1] == 1:
            return self.source_u[:, 0]
        if self.routes > 1:
            raise ValueError(
                "ScanRecord.token_u: routes have different inputs; give u once, in the token frame: from_tokens "
                "with u (batch, 1, channels, tokens)."
            )
        u, order = self.u[:, 0], self.read_order[..., 0, None, :]
        frame = u.new_zeros(*u.shape[:2], self.tokens + 1)  # tokens that no step reads go to the end
        return frame.scatter(-1, order.where(order >= 0, self.tokens).expand_as(u), u)[..., :-1]

    def on_grid(self, x: Float[Tensor, "batch channels tokens"]) -> Float[Tensor, "batch *grid channels"]:
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
        names = ("source_u", "source_delta", "A", "source_B", "source_C", "D", "source_gain", "gate", "bypass")
        values = {name: getattr(self, name) for name in names}
        return self.replace(**{name: None if value is None else function(value) for name, value in values.items()})

    def replace(self, **changes: object) -> Self:
        """Return a record with some fields replaced."""
        return type(self)(**{**{name: getattr(self, name) for name in _GIVEN}, **changes})

    def select_routes(self, routes: slice) -> Self:
        """Return the record of some routes without copying tensors; a per-token D is split between the routes."""

        def pick(source: Tensor) -> Tensor:
            return source if source.shape[1] == 1 else source[:, routes]

        orders = self._orders(lambda order: order[..., routes, :])
        D = self.D
        if D is not None:
            D = D[routes] if D.ndim == 2 else D * (orders["read_order"].shape[-2] / self.routes)
        return self.replace(
            source_u=pick(self.source_u),
            source_delta=pick(self.source_delta),
            A=self.A[routes],
            source_B=pick(self.source_B),
            source_C=pick(self.source_C),
            D=D,
            source_gain=None if self.source_gain is None else pick(self.source_gain),
            **orders,
        )

    def select_images(self, images: slice) -> Self:
        """Return the record of some images without copying tensors."""
        names = ("source_u", "source_delta", "source_B", "source_C", "source_gain", "gate", "bypass")
        parts = {name: None if (its := getattr(self, name)) is None else its[images] for name in names}
        D = self.D[images] if self.D is not None and self.D.ndim == 3 else self.D
        return self.replace(**parts, D=D, **self._orders(lambda order: order[images] if order.ndim == 3 else order))

    def in_scan_order(self) -> Self:
        """Return only the scans: tensors in scan order, a token per step on every route, no per-token D."""
        with torch.inference_mode(False):
            order = torch.arange(self.length, device=self.source_delta.device).expand(self.routes, self.length)
        if not torch.compiler.is_compiling():
            remember(order, self.length)
        return self.replace(
            source_u=self.u,
            source_delta=self.delta,
            source_B=self.B,
            source_C=self.C,
            D=self.D if self.D is not None and self.D.ndim == 2 else None,
            source_gain=None if self.source_gain is None else self.gain,
            gate=None,
            bypass=None,
            layout=None,
            read_order=order,
            write_order=order,
            tokens=self.length,
            source_frame="scan",
        )

    def _in_scan_order(self, source: Tensor, read: bool = False) -> Tensor:
        """Expand shared routes; gather the token frame along each route's order.

        ``read``: a step that reads no token gives zero. In the token frame such a step always does.
        """
        source = source.expand(-1, self.routes, *source.shape[2:])
        lacking = self.lacking[0] is not False
        if self.source_frame == "scan" and not (read and lacking):
            return source
        order = self.read_order if self.read_order.ndim == 3 else self.read_order.unsqueeze(0)
        order = order.view(order.shape[0], self.routes, *[1] * (source.ndim - 3), self.length)
        if self.source_frame == "tokens":
            index = order.clamp(min=0) if lacking else order
            source = source.gather(-1, index.expand(*source.shape[:-1], self.length))
        return source.masked_fill(order < 0, 0) if lacking else source

    def _orders(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Pick a part of both orders, which inherits the checks of the whole."""

        def part(order: Tensor, lacking: bool | None) -> Tensor:
            chosen = pick(order)
            if chosen is not order and is_known(order, self.tokens):
                remember(chosen, self.tokens, padded=bool(lacking))
            return chosen

        read = part(self.read_order, self.lacking[0])
        same = self.write_order is self.read_order
        return {"read_order": read, "write_order": read if same else part(self.write_order, self.lacking[1])}

    def _check_orders_of_images(self) -> None:
        for name in ("read_order", "write_order"):
            shape = tuple(getattr(self, name).shape)
            if shape not in ((self.routes, self.length), (self.batch, self.routes, self.length)):
                raise ValueError(
                    f"ScanRecord: {name} must be (routes, length) = {(self.routes, self.length)} or, one per image, "
                    f"(batch, routes, length) = {(self.batch, self.routes, self.length)}, got {shape}."
                )

    def _check_gain(self, gain: Tensor) -> None:
        batch, routes, *rest = self.source_delta.shape
        if tuple(gain.shape) not in ((batch, routes, *rest), (batch, 1, *rest), (batch, self.routes, *rest)):
            raise ValueError(
                f"ScanRecord: source_gain must be shaped like source_delta {tuple(self.source_delta.shape)}, one per "
                f"head and position, got {tuple(gain.shape)}."
            )

    def _check_skip_of_tokens(self, D: Tensor) -> None:
        if tuple(D.shape) != (self.batch, self.channels, self.tokens):
            raise ValueError(
                f"ScanRecord: D must be (routes, channels) = {(self.routes, self.channels)} or (batch, channels, "
                f"tokens) = {(self.batch, self.channels, self.tokens)}, got {tuple(D.shape)}."
            )
        shared = self.source_frame == "tokens" and self.source_u.shape[1] == 1
        if not shared and self.routes > 1:
            raise ValueError(
                "ScanRecord: a per-token D multiplies each token's input, but these routes have inputs of their "
                "own; give u once, in the token frame: from_tokens with u (batch, 1, channels, tokens)."
            )


_GIVEN = tuple(each.name for each in fields(ScanRecord) if each.init)
