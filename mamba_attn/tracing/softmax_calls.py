"""One call of softmax attention: what it was computed from, its matrix, and whether its tokens are those it reads."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mamba_attn._types import Float
from mamba_attn.errors import TraceError
from mamba_attn.ops import require_bytes

_BACK = 16  # tensors before a call in which its queries and keys are looked for
_AGREE = 0.9  # part of the entries that queries and keys must reach together: those of others agree by half


class SoftmaxInputs(NamedTuple):
    """What attention was computed from; groups are heads, or what stands in the heads' place."""

    query: Tensor  # (rows, groups, length, width)
    key: Tensor  # (rows, groups or a divisor, length, width)
    value: Tensor  # as key, of any width
    mask: Tensor | None = None  # (rows or 1, groups or 1, length or 1, length): where True, or what is added
    causal: bool = False
    scale: float | None = None  # None: 1 / sqrt(width)
    safe: bool = True  # whether a row that reads nothing is zero, and not NaN
    ready: Tensor | None = None  # the matrices, where their own function returned them

    @property
    def values(self) -> Tensor:
        """Values in float32 or float64, one per group: (rows, groups, length, width)."""
        return self._wide(self.value)

    def probabilities(self) -> Float[Tensor, "rows groups length length"]:
        """Return the matrices after softmax, in float32, or in float64 if the queries are."""
        if self.ready is not None:
            return self._wide(self.ready)
        rows, groups, length = self.query.shape[:3]
        need = rows * groups * length**2 * (8 if self.query.dtype == torch.float64 else 4)
        require_bytes(
            f"the probabilities of {groups} heads over {rows} sequences of {length} tokens",
            need,
            self.query.device,
            "Trace fewer images at once, or smaller ones.",
        )
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = (self._wide(self.query) * scale) @ self._wide(self.key).mT
        if self.causal:
            allowed = torch.ones(length, length, dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~allowed, -math.inf)
        if self.mask is not None:
            mask = self.mask.detach()
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits)
        found = logits.softmax(-1)
        return found.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0) if self.safe else found

    def _wide(self, t: Tensor) -> Tensor:
        t = t.detach().to(torch.float64 if self.query.dtype == torch.float64 else torch.float32)
        return t.repeat_interleave(self.query.shape[1] // t.shape[1], 1)


@dataclass(eq=False)
class SoftmaxCall:
    """One call of softmax attention over the tokens of its own queries.

    Args:
        module: name of the innermost module of the traced model that was running.
        run: its number among the module's calls of attention, from -1 downwards: scans count runs from 0.
        rows: sequences.
        groups: heads, or what stands in their place.
        length: tokens of a sequence.
        whole: whether heads have an axis of their own; without one they may stand among the rows.
        given: the tensors that the inputs are made of.
        make: makes the inputs.
        dropout: probability of zeroed entries in what the model computed; the matrix is that before dropout.
        edges: where gradients of the call's outputs are found.
        back: makes the gradient at the probabilities (rows, groups, length, length) of these.
    """

    module: str
    run: int
    rows: int
    groups: int
    length: int
    whole: bool
    given: list[Tensor]
    make: Callable[[], SoftmaxInputs]
    dropout: float = 0.0
    edges: list[GradientEdge | None] = field(default_factory=list)
    back: Callable[[SoftmaxInputs, list[Tensor | None]], Tensor] | None = None
    dout: Tensor | None = None  # while orders are measured: (rows, groups * width, length)
    sources: tuple[Tensor, ...] = ()  # then, query, key and value with their graph
    at: int = 0  # then, how many tensors had been seen
    node: Any = None

    def __post_init__(self) -> None:
        self._versions = self._seen()
        self._inputs: SoftmaxInputs | None = None

    @property
    def steps(self) -> int:
        """Number of steps that share no token."""
        return self.rows * self.length if self.whole else self.length

    @property
    def signature(self) -> tuple[Any, ...]:
        """What says that a call of another forward pass, of any number of images, is the same one."""
        return (self.module, self.run, self.groups, self.length)

    def inputs(self) -> SoftmaxInputs:
        """Return what the attention was computed from.

        Raises:
            TraceError: the model wrote over it since.
        """
        if self._inputs is None:
            if self._seen() != self._versions:
                raise TraceError(
                    f"{self.module}: the model changed the attention's input in place after it; read the matrix during "
                    "the pass, with trace(attention=...)."
                )
            with torch.no_grad():
                self._inputs = self.make()
        return self._inputs

    def gradient(self, found: list[Tensor | None]) -> Tensor:
        """Return the gradient at the probabilities, of those at the edges: (rows, groups, length, length).

        Raises:
            TraceError: entries were dropped at random, and which is not known.
        """
        if self.dropout:
            raise TraceError(
                f"{self.module}: gradients() does not know which probabilities its active dropout zeroed; use "
                "model.eval()."
            )
        inputs = self.inputs()
        if self.back is None or all(gradient is None for gradient in found):
            return inputs.query.new_zeros(self.rows, self.groups, self.length, self.length)
        return self.back(inputs, found)

    def reads_own(self, earlier: Sequence[Tensor]) -> bool:
        """Whether queries, keys and values of one position come from one token, in a pass that measures orders.

        Half of the positions, chosen at random, must reach the same entries of an earlier tensor through all three. An
        entry is reached where the gradient of the half is that of all positions.

        Args:
            earlier: what was seen before, latest first.
        """
        generator = torch.Generator().manual_seed(9)
        half = torch.rand(self.rows if self.whole else 1, self.length, generator=generator) < 0.5
        if not all(source.requires_grad for source in self.sources) or not self.sources:
            return False
        asked = []
        for source in self.sources:
            noise = torch.randn(source.shape, generator=generator).to(source)
            chosen = half.view(-1, *[1] * (source.ndim - 3), self.length, 1).to(source.device)
            asked += [(source, noise), (source, noise * chosen)]
        for tensor in [t for t in earlier if t.requires_grad and t.is_floating_point()][:_BACK]:
            found = [
                torch.autograd.grad(source, tensor, cotangent, retain_graph=True, allow_unused=True)[0]
                for source, cotangent in asked
            ]
            whole, part = ([t for t in found[start::2] if t is not None] for start in (0, 1))
            reached = tensor.new_zeros(tensor.shape, dtype=torch.bool)
            if len(whole) == len(part) == len(self.sources):
                reached = torch.stack([t != 0 for t in whole]).all(0)
            if 2 * int(reached.sum()) < tensor.numel():
                continue  # queries and keys stand in different features of it, or in parts of it
            sides = [(some / every)[reached] > 0.5 for every, some in zip(whole, part, strict=True)]
            return all(float((side == sides[0]).float().mean()) > _AGREE for side in sides[1:])
        return False

    def _seen(self) -> list[int]:
        return [-1 if t.is_inference() else t._version for t in self.given]
