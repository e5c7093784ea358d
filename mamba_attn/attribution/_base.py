"""What every attribution method shares: the contract of ``attribute``, and the way from tokens to pixels."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution._queries import Place, Query, make_query, split_query
from mamba_attn.attribution._targets import Target, target_values
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.errors import NonFiniteError, TraceError
from mamba_attn.tracing.layer_names import LayerNames, listed_layers
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.tracer import Trace, trace

__all__ = ["Images", "MapAttribution", "Row", "Target", "TokenAttribution"]

Row = tuple[TokenLayout, Tensor]  # one number per token (batch, tokens), and where the tokens sit
Images = TypeVar("Images", Tensor, tuple[Tensor])  # captum's metrics hand a tuple of one, and want one back


class MapAttribution(Attribution, ABC):
    """An attribution method that gives every image a map.

    Neither the model nor the inputs change; the model is not switched to eval mode either.

    Args:
        model: called with the images alone; returns logits (batch, classes), or whatever a target can be named in.

    Raises:
        TypeError: not a module.
    """

    reads_rows: ClassVar[bool] = False  # whether a pixel or a box means anything to it

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}(model): expected a torch.nn.Module, got {type(model).__name__}.")
        super().__init__(model)
        self.model = model

    def attribute(
        self, inputs: Images, target: Target = None, query: Sequence[float] | None = None, *,
        pixel: Place | None = None, box: Place | None = None, grid: bool = False, expand: bool = False,
    ) -> Images:  # fmt: skip
        """Return one map per image.

        Args:
            inputs: (batch, colours, height, width), images as the model takes them.
            target: class index, or one per image, as a list or tensor; for dense outputs a tuple of indices, as
                (class, row, column), or a list of one tuple per image; or a function of the model's output that returns
                one number per image, each from its own image, or their sum. Default: the predicted class, of models
                that return (batch, classes). Methods that do not depend on the class check what is given all the same.
            query: deprecated: two numbers are a ``pixel``, four a ``box``.
            pixel: (row, column) in pixels, whose token's row is read: one for all images, or one per image, as a list
                of tuples or a tensor (batch, 2). Default: the class token; for models without one the mean over
                patches.
            box: (x0, y0, x1, y1) in pixels, columns x and rows y, the mean of whose tokens' rows is read; one for all
                images, or one per image, as a list of tuples or a tensor (batch, 4).
            grid: return the tokens' grid instead of pixels.
            expand: return the inputs' shape, an equal part of the map in every colour, so that captum's metrics and
                pictures, which sum or compare all channels, run.

        Returns:
            (batch, 1, height, width) at the inputs' size in pixels, interpolated linearly between patch centres; with
            ``grid=True`` that of the patch grid; with ``expand=True`` (batch, colours, height, width), whose sum over
            colours is the map. For a tuple of one tensor, as captum's metrics hand it over, a tuple of one.

        Raises:
            TypeError: several inputs, or none that is a tensor.
            ValueError: inputs that are no batch, a target that the output does not have, or none where there is no
                predicted class; a pixel or box outside the image, both of them, or one for a method that reads no
                rows; ``grid=True`` for layers of several grids, or with ``expand=True``.
            TraceError: a model whose tokens' place in the image is not known.
            UnknownLayerError: a layer name or pattern that fits none, a number that is out of range.
            NonFiniteError: a layer, the target or the map is NaN or Inf.
        """
        call = f"{type(self).__name__}.attribute"
        if isinstance(inputs, tuple) and len(inputs) != 1:
            raise TypeError(f"{call}(inputs): expected one tensor of images, got a tuple of {len(inputs)}.")
        images = inputs[0] if isinstance(inputs, tuple) else inputs
        size, asked = self._size("attribute", images), self._asked("attribute", images, query, pixel, box)
        if grid and expand:
            raise ValueError(f"{call}(grid=True, expand=True): the inputs' shape is in pixels; leave one of them out.")
        if asked is not None and not self.reads_rows:
            raise ValueError(f"{call}({asked}): this method reads no token's row; leave {asked.kind} out.")
        with torch.no_grad():
            maps = self._maps(images, target, asked, size, grid)
        finite = maps.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            which = ", ".join(str(index) for index in (~finite).nonzero().flatten().tolist())
            raise NonFiniteError(
                f"{call}: the maps of images {which} hold NaN or Inf; check the images, the weights and the "
                "precision of the model."
            )
        if expand:
            maps = (maps / images.shape[1]).expand(-1, images.shape[1], -1, -1).contiguous()
        return (maps,) if isinstance(inputs, tuple) else maps

    @abstractmethod
    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, int], grid: bool
    ) -> Float[Tensor, "batch 1 height width"]:
        """Return the maps in pixels, ``size`` (rows, columns), or on the tokens' grid. Called without gradients."""

    def _asked(self, method: str, inputs: Tensor, query: Any, pixel: Any, box: Any) -> Query | None:
        """Whose rows are read; refuses inputs that are no batch, or places outside them."""
        call, size = f"{type(self).__name__}.{method}", self._size(method, inputs)
        pixel, box = split_query(call, query, pixel, box, stacklevel=4)
        return make_query(call, size, len(inputs), pixel, box)

    def _size(self, method: str, inputs: Tensor) -> tuple[int, int]:
        """The images' (rows, columns) in pixels; refuses inputs that are no batch."""
        call = f"{type(self).__name__}.{method}"
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{call}(inputs): expected a tensor of images, got {type(inputs).__name__}.")
        if inputs.ndim != 4 or len(inputs) == 0:
            raise ValueError(f"{call}(inputs{tuple(inputs.shape)}): expected images (batch, colours, rows, columns).")
        return inputs.shape[2], inputs.shape[3]


class TokenAttribution(MapAttribution):
    """An attribution method that gives every token of one or more layers a number.

    Args:
        model: a model that ``mamba_attn.trace`` knows; it is called with the inputs alone.
        layers: names, patterns or numbers of the mixers to use, or one of them, as in ``mamba_attn.trace``. Default:
            all.

    Raises:
        TypeError: not a module; ``layers`` that are neither names nor numbers.
    """

    reads_rows: ClassVar[bool] = True

    def __init__(self, model: nn.Module, *, layers: LayerNames | None = None) -> None:
        super().__init__(model)
        self.layers = listed_layers(f"{type(self).__name__}(layers=...)", layers)

    @abstractmethod
    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        """Return the rows whose maps are averaged: one, or one per layer. Called without gradients."""

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, int], grid: bool
    ) -> Float[Tensor, "batch 1 height width"]:
        return self._render(self._explain(images, target, query), size, grid)

    @contextmanager
    def _traced(
        self, inputs: Tensor, target: Target, *, gradients: bool = False, rules: Rules | None = None
    ) -> Iterator[tuple[Trace, Tensor]]:
        """One traced forward pass, and the sum of what is explained of the images.

        Gradients are taken inside the block, where a model that checkpoints its activations is still traced.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``; where no gradients are asked for, None is not looked up.
            gradients: keep the graph.
            rules: what watches, or changes, the forward.
        """
        call = f"{type(self).__name__}.attribute"
        with torch.inference_mode(False):
            images = inputs.clone() if inputs.is_inference() else inputs  # nothing is saved of inference tensors
            with trace(self.model, layers=self.layers, rules=rules) as record:
                with torch.set_grad_enabled(gradients):
                    output = self.model(images)
                    needed = gradients or target is not None
                    logit = target_values(call, output, target, len(inputs)).sum() if needed else torch.zeros(())
                layers = self._ran(record)
                if not bool(logit.detach().isfinite()):
                    for layer in layers:
                        layer.require_finite()  # says where it began
                    raise NonFiniteError(f"{call}: what is to be explained is NaN or Inf; check the model's head.")
                with torch.no_grad():
                    yield record, logit

    def _ran(self, record: Trace) -> list[Layer]:
        """The layers of the pass.

        Raises:
            TraceError: none of the layers asked for ran.
        """
        if not record:
            raise TraceError(f"{type(self).__name__}: the model's forward called none of the layers asked for.")
        return record.layers

    def _render(self, rows: Sequence[Row], size: tuple[int, int], grid: bool) -> Float[Tensor, "batch 1 height width"]:
        """The mean of the rows' maps."""
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
