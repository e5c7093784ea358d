"""What every attribution method shares: the contract of ``attribute``, targets, and the way from tokens to pixels."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from mamba_attn._types import Int
from mamba_attn.attribution._queries import Query, check_query
from mamba_attn.errors import TraceError
from mamba_attn.layers import Layer
from mamba_attn.layout import TokenLayout
from mamba_attn.rules import Rules
from mamba_attn.tracing import Trace, trace

Target = int | Sequence[int] | Tensor | None
Row = tuple[TokenLayout, Tensor]  # one number per token (batch, tokens), and where the tokens sit


class TokenAttribution(Attribution, ABC):
    """An attribution method that gives every token of one or more layers a number.

    Neither the model nor the inputs change; the model is not switched to eval mode either.

    Args:
        model: a model that ``mamba_attn.trace`` knows; it is called with the inputs alone and returns logits.
        layers: names or patterns of the mixers to use. Default: all.

    Raises:
        TypeError: not a module.
    """

    def __init__(self, model: nn.Module, *, layers: Iterable[str] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}(model): expected a torch.nn.Module, got {type(model).__name__}.")
        super().__init__(model)
        self.model = model
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)

    def attribute(
        self,
        inputs: Tensor,
        target: Target = None,
        query: Query = None,
        *,
        grid: bool = False,
    ) -> Tensor:
        """Return one map per image.

        Args:
            inputs: (batch, colours, height, width), images as the model takes them.
            target: class index, or one per image, as a list or tensor. Default: the predicted class. Methods that do
                not depend on the class check it all the same.
            query: (row, column) of a pixel, or a box (x0, y0, x1, y1) in pixels, whose tokens' rows are read, their
                mean where there are several. Default: the class token; for models without one the mean over patches.
            grid: return the tokens' grid instead of pixels.

        Returns:
            (batch, 1, height, width) at the inputs' size in pixels, interpolated linearly between patch centres; with
            ``grid=True`` that of the patch grid.

        Raises:
            ValueError: inputs that are no batch, a target that is no class, a query outside the image,
                ``grid=True`` for layers of several grids.
            TraceError: a model whose tokens' place in the image is not known.
            UnknownLayerError: a layer name or pattern that fits none.
            NonFiniteError: a layer met NaN or Inf.
        """
        size = self._size("attribute", inputs, query)
        with torch.no_grad():
            return self._render(self._explain(inputs, target, query), size, grid)

    @abstractmethod
    def _explain(self, inputs: Tensor, target: Target, query: Query) -> list[Row]:
        """Return the rows whose maps are averaged: one, or one per layer. Called without gradients."""

    @contextmanager
    def _traced(
        self, inputs: Tensor, target: Target, *, gradients: bool = False, rules: Rules | None = None
    ) -> Iterator[tuple[Trace, Tensor]]:
        """One traced forward pass, and the sum of the images' target logits.

        Gradients are taken inside the block, where a model that checkpoints its activations is still traced.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``.
            gradients: keep the graph.
            rules: what watches, or changes, the forward.
        """
        with torch.inference_mode(False):
            images = inputs.clone() if inputs.is_inference() else inputs  # nothing is saved of inference tensors
            with trace(self.model, layers=self.layers, rules=rules) as record:
                with torch.set_grad_enabled(gradients):
                    output = self.model(images)
                    logit = output.gather(1, self._targets(output, target, len(inputs)).unsqueeze(1)).sum()
                self._ran(record)
                with torch.no_grad():
                    yield record, logit

    def _size(self, method: str, inputs: Tensor, query: Query) -> tuple[int, int]:
        """The images' (rows, columns) in pixels; ValueError for inputs that are no batch, or a query outside them."""
        call = f"{type(self).__name__}.{method}"
        if inputs.ndim != 4 or len(inputs) == 0:
            raise ValueError(f"{call}(inputs{tuple(inputs.shape)}): expected images (batch, colours, rows, columns).")
        size = (inputs.shape[2], inputs.shape[3])
        check_query(call, query, size)
        return size

    def _ran(self, record: Trace) -> list[Layer]:
        """The layers of the pass.

        Raises:
            TraceError: none of the layers asked for ran.
        """
        if not record:
            raise TraceError(f"{type(self).__name__}: the model's forward called none of the layers asked for.")
        return record.layers

    def _targets(self, output: Tensor, target: Target, batch: int) -> Int[Tensor, " batch"]:
        """One class per image.

        Raises:
            ValueError: an output that is not (batch, classes), or a target that is not one of its classes.
        """
        call = f"{type(self).__name__}.attribute(target={target!r})"
        if not isinstance(output, Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{call}: the model must return logits (batch, classes), got {shape}.")
        if target is None:
            return output.argmax(1)
        classes = torch.as_tensor(target, device=output.device)
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise ValueError(f"{call}: expected a class index, or one per image, as integers.")
        if classes.ndim > 1 or (classes.ndim == 1 and len(classes) != batch):
            raise ValueError(f"{call}: expected one class index, or one for each of the {batch} images.")
        if bool(((classes < 0) | (classes >= output.shape[1])).any()):
            raise ValueError(f"{call}: expected class indices in 0..{output.shape[1] - 1}.")
        return classes.long().expand(batch)

    def _render(self, rows: Sequence[Row], size: tuple[int, int], grid: bool) -> Tensor:
        """The mean of the rows' maps: (batch, 1, rows, columns)."""
        merged: dict[TokenLayout, Tensor] = {}
        for layout, values in rows:  # sums of rows on the same grid first: interpolation is linear
            merged[layout] = merged[layout] + values if layout in merged else values
        if grid and len({layout.grid for layout in merged}) > 1:
            grids = ", ".join(f"{layout.grid[0]}x{layout.grid[1]}" for layout in merged)
            raise ValueError(
                f"{type(self).__name__}.attribute(grid=True): the layers stand on several grids ({grids}); name the "
                "layers of one with layers=, or leave grid=False for a map in pixels."
            )
        # a token of a coarser grid spreads what it has over the finer tokens that it covers
        finest = max(len(layout.patches) for layout in merged)
        maps = [layout.to_grid(values) * (len(layout.patches) / finest) for layout, values in merged.items()]
        if not grid:
            maps = [layout.to_pixels(values, size) for layout, values in zip(merged, maps, strict=True)]
        return (torch.stack(maps).sum(0) / len(rows)).unsqueeze(1)
