"""Base classes of all attribution methods: the contract of ``attribute``, targets, and conversion of tokens to pixels.

``MapAttribution`` (any model) checks the call; ``TokenAttribution`` (a traced model) runs one traced pass and turns
rows of tokens into maps. Below them: maps on the token grid, and targets. ``queries`` handles pixels and boxes.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from mamba_attn._types import Float, Int
from mamba_attn.attribution.queries import Place, Query, make_query, split_query
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.errors import NonFiniteError, TraceError, UnsupportedModelError, nearest
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames, listed_layers
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.tracer import Trace, trace
from mamba_attn.tracing.unseen import unseen_sentence

Images = TypeVar("Images", Tensor, tuple[Tensor])  # captum's metrics pass a tuple of one tensor and expect one back
Function = Callable[[Any], Tensor]
Target = int | Tensor | tuple[int, ...] | Sequence[int] | Sequence[tuple[int, ...]] | Function | None
Row = tuple[TokenLayout, Tensor]  # one number per token (batch, tokens), and the layout of the tokens

_TRACED = ("layers", "layout", "orders")  # options of tracing, which published methods know too
_DENSE = "target=(class, row, column) or whatever indexes it, a list of such tuples, or a function of the output"


class MapAttribution(Attribution, ABC):
    """An attribution method that returns one map per image.

    It changes neither model nor inputs, and does not switch the model to eval mode.

    Args:
        model: called with the images only; returns logits (batch, classes), or any output that a target can index.

    Raises:
        TypeError: the model is not a module.
    """

    reads_rows: ClassVar[bool] = False  # whether it takes a pixel or a box

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}(model): expected a torch.nn.Module, got {type(model).__name__}.")
        super().__init__(model)
        self.model = model
        self.called = type(self).__name__  # in messages; differs if this method implements another method's option

    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        query: Sequence[float] | None = None,
        *,
        pixel: Place | None = None,
        box: Place | None = None,
        grid: bool = False,
        expand: bool = False,
    ) -> Images:
        """Return one map per image.

        Args:
            inputs: (batch, colours, height, width), images as the model takes them; volumes and videos
                (batch, colours, *sizes), spectrograms (batch, time, frequency).
            target: class index, or one per image as a list or tensor. For dense outputs, a tuple of indices such as
                (class, row, column), or a list of one tuple per image. Or a function of the model's output that returns
                one number per image, each depending on its own image only, or their sum. Default: the predicted class,
                for models that return (batch, classes). Class-independent methods also check the target.
            query: deprecated: two numbers are a ``pixel``, four a ``box``.
            pixel: (row, column) in pixels: read the row of this pixel's token. One for all images, or one per image as
                a list of tuples or a tensor (batch, 2). Default: the class token, or the mean over patches for models
                without one.
            box: (x0, y0, x1, y1) in pixels, columns x and rows y: read the mean of the rows of its tokens. One for all
                images, or one per image as a list of tuples or a tensor (batch, 4).
            grid: return the map on the token grid instead of in pixels.
            expand: return the inputs' shape, with an equal part of the map in every colour. Captum's metrics and
                pictures, which sum or compare all channels, need this.

        Returns:
            (batch, 1, height, width) at the inputs' size in pixels, of volumes (batch, 1, *sizes), interpolated
            linearly between patch centres; with ``grid=True`` that of the patch grid; with ``expand=True`` the inputs'
            shape: the sum over colours is the map. For a tuple of one tensor, as captum's metrics pass it, a tuple of
            one.

        Raises:
            TypeError: several inputs, or an input that is not a tensor.
            ValueError: inputs are not a batch; the output does not have the target, or the target is missing and there
                is no predicted class; a pixel or box outside the image, both at once, or one for a method that reads
                no rows; ``grid=True`` for layers on several grids, or with ``expand=True``.
            TraceError: the places of the model's tokens in the image are unknown.
            UnknownLayerError: a layer name or pattern matches none, or a number is out of range.
            NonFiniteError: a layer, the target or the map contains NaN or Inf.
        """
        call = f"{self.called}.attribute"
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
                f"{call}: the maps of images {which} contain NaN or Inf; check the images, the weights and the "
                "precision of the model."
            )
        if expand:
            colours = maps.ndim == images.ndim  # spectrograms have none
            maps = (maps / images.shape[1]).expand_as(images).contiguous() if colours else maps.squeeze(1)
        return (maps,) if isinstance(inputs, tuple) else maps

    @abstractmethod
    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        """Return the maps in pixels, ``size`` (rows, columns), or on the tokens' grid. Called without gradients."""

    def _asked(self, method: str, inputs: Tensor, query: Any, pixel: Any, box: Any) -> Query | None:
        """Return whose rows are read; refuse inputs that are not a batch, and places outside the images."""
        call, size = f"{self.called}.{method}", self._size(method, inputs)
        pixel, box = split_query(call, query, pixel, box, stacklevel=4)
        return make_query(call, size, len(inputs), pixel, box)

    def _size(self, method: str, inputs: Tensor) -> tuple[int, ...]:
        """Return the images' sizes in pixels, (rows, columns) or (frames, rows, columns); refuse what is no batch."""
        call = f"{self.called}.{method}"
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{call}(inputs): expected a tensor of images, got {type(inputs).__name__}.")
        if inputs.ndim < 3 or len(inputs) == 0:
            raise ValueError(
                f"{call}(inputs{tuple(inputs.shape)}): expected images (batch, colours, rows, columns), volumes or "
                "videos (batch, colours, *sizes), or spectrograms (batch, time, frequency)."
            )
        return tuple(inputs.shape[1 if inputs.ndim == 3 else 2 :])

    def _output(self, images: Tensor, target: Target) -> Any:
        """Return the model's output, after checking that it has the target and that the target's value is finite.

        Raises:
            ValueError: the output does not have the target.
            NonFiniteError: the value to explain is NaN or Inf.
        """
        call = f"{self.called}.attribute"
        output = self.model(images)
        if not bool(target_values(call, output, target, len(images)).isfinite().all()):
            raise NonFiniteError(
                f"{call}: the value to explain is NaN or Inf; check the images, the weights and the precision of the "
                "model."
            )
        return output


class TokenAttribution(MapAttribution):
    """An attribution method that returns one number per token of one or more layers.

    Args:
        model: a model that ``mamba_attn.trace`` supports; called with the inputs only.
        layers: names, patterns or numbers of the mixers to use, or one of them, as in ``mamba_attn.trace``. Default:
            all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.

    Raises:
        TypeError: the model is not a module; ``layers`` are neither names nor numbers.
    """

    reads_rows: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
    ) -> None:
        super().__init__(model)
        self.layers = listed_layers(f"{type(self).__name__}(layers=...)", layers)
        self.layout, self.orders = layout, orders

    def _published(self, kind: type["TokenAttribution"], option: str) -> "TokenAttribution | None":
        """Return the method of ``attribution.published`` named by an option; None for the default, this method.

        Published code has no other options, so naming it excludes all of them.

        Args:
            kind: class that defines the options; each is also an attribute of the same name.
            option: "convention" or "rule".

        Raises:
            ValueError: the value names no method, or other options are given too.
        """
        from mamba_attn.attribution.published import METHODS  # which imports this file

        options = [each for each in inspect.signature(kind.__init__).parameters.values() if each.name not in _TRACED]
        default = {each.name: each.default for each in options if each.kind is each.KEYWORD_ONLY}
        value, methods = getattr(self, option), METHODS[kind.__name__, option]
        if value == default[option]:
            return None
        call = f"{kind.__name__}({option}={value!r}"
        if value not in methods:
            raise ValueError(f"{call}): no such {option}. {nearest(value, [default[option], *methods])}")
        changed = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name, normal in default.items()
            if name != option and getattr(self, name) != normal
        )
        if changed:
            raise ValueError(
                f"{call}, {changed}): {option}={value!r} is published code, which has no such option; leave {changed} "
                f"out, or {option}={value!r}."
            )
        method = methods[value](self.model, layers=self.layers)
        method.layout, method.orders = self.layout, self.orders
        method.called = f"{call})"
        return method

    @abstractmethod
    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        """Return the rows whose maps are averaged: one, or one per layer. Called without gradients."""

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        return self._render(self._explain(images, target, query), size, grid)

    @contextmanager
    def _traced(
        self,
        inputs: Tensor,
        target: Target,
        *,
        gradients: bool = False,
        rules: Rules | None = None,
        multiplied: bool = False,
    ) -> Iterator[tuple[Trace, Tensor]]:
        """Run one traced forward pass; yield the trace and the sum of the images' target values.

        Take gradients inside the block: a model that checkpoints its activations runs again then, and must be traced.

        Args:
            inputs: as in ``attribute``.
            target: as in ``attribute``; without gradients, None is not looked up.
            gradients: keep the graph.
            rules: watch or change the forward pass.
            multiplied: the layers are multiplied, so that all that mix tokens must be among them, or be named.

        Raises:
            UnsupportedModelError: layers that are multiplied, and modules that mix tokens unseen.
        """
        call = f"{self.called}.attribute"
        with torch.inference_mode(False):
            images = inputs.clone() if inputs.is_inference() else inputs  # autograd cannot save inference tensors
            with trace(self.model, layers=self.layers, layout=self.layout, orders=self.orders, rules=rules) as record:
                with torch.set_grad_enabled(gradients):
                    output = self.model(images)
                    needed = gradients or target is not None
                    logit = target_values(call, output, target, len(inputs)).sum() if needed else torch.zeros(())
                layers = self._ran(record)
                if multiplied and self.layers is None and record.unseen_mixers:
                    raise UnsupportedModelError(unseen_sentence(self.called, record.unseen_mixers))
                if not bool(logit.detach().isfinite()):
                    for layer in layers:  # the first layer that is not finite is where it began
                        layer.require_finite()
                    raise NonFiniteError(f"{call}: the value to explain is NaN or Inf; check the model's head.")
                with torch.no_grad():
                    yield record, logit

    def _ran(self, record: Trace) -> list[Layer]:
        """Return the layers of the pass.

        Raises:
            TraceError: none of the requested layers ran.
        """
        if not record:
            raise TraceError(f"{self.called}: the model's forward called none of the requested layers.")
        return record.layers

    def _render(self, rows: Sequence[Row], size: tuple[int, ...], grid: bool) -> Float[Tensor, "batch 1 *size"]:
        """Return the mean of the rows' maps."""
        merged: dict[TokenLayout, Tensor] = {}
        for (
            layout,
            values,
        ) in rows:  # interpolation is linear, so rows on the same grid are summed first: one interpolation per grid
            merged[layout] = merged[layout] + values if layout in merged else values
        if grid and len({layout.grid for layout in merged}) > 1:
            grids = ", ".join("x".join(map(str, layout.grid)) for layout in merged)
            raise ValueError(
                f"{self.called}.attribute(grid=True): the layers are on several grids ({grids}); choose the "
                "layers of one grid with layers=, or leave grid=False for a map in pixels."
            )
        # a token of a coarser grid spreads its value over the finer tokens that it covers
        finest = max(len(layout.patches) for layout in merged)
        maps = [layout.to_grid(values) * (len(layout.patches) / finest) for layout, values in merged.items()]
        if not grid:
            maps = [
                layout.to_pixels(values, size[-len(layout.grid) :]) for layout, values in zip(merged, maps, strict=True)
            ]
        return (torch.stack(maps).sum(0) / len(rows)).unsqueeze(1)


def layouts(model: nn.Module, images: Tensor) -> list[TokenLayout]:
    """Return the token layout of every layer, from a pass of the first image."""
    with torch.no_grad(), trace(model) as record:
        model(images[:1])
    return [layer.layout for layer in record.layers]


def cell_means(
    maps: Float[Tensor, "batch 1 rows columns"], layout: TokenLayout
) -> Float[Tensor, "batch 1 height width"]:
    """Return the mean over each token's cell: the pixels nearer to its centre than to any other."""
    vertical, horizontal = (
        _means(pixels, count, layout).to(maps) for pixels, count in zip(maps.shape[2:], layout.grid, strict=True)
    )
    return vertical @ maps @ horizontal.mT


def _means(pixels: int, count: int, layout: TokenLayout) -> Float[Tensor, "count pixels"]:
    position = (torch.arange(pixels, dtype=torch.float64) + 0.5 - layout.centre) / layout.step
    owner = (position + 0.5).floor().clamp(0, count - 1)
    inside = (owner == torch.arange(count)[:, None]).double()
    return inside / inside.sum(1, keepdim=True).clamp(min=1)


def target_values(call: str, output: Any, target: Any, batch: int) -> Tensor:
    """Return the target value of every image, (batch,), or their sum if a function returned a scalar.

    Args:
        call: the name of the caller, for the message.
        output: of the model.
        target: a class, one per image, a tuple of indices after the batch's or a list of them, a function of the
            output; None for the predicted class.
        batch: number of images.

    Raises:
        ValueError: the output does not have the target.
    """
    if callable(target) and not isinstance(target, Tensor):
        return _called(call, target, output, batch)
    indices = target_indices(call, output, target, batch)
    chosen: Tensor = output[(torch.arange(batch, device=output.device), *indices.unbind(1))]
    return chosen


def target_indices(call: str, output: Any, target: Any, batch: int) -> Int[Tensor, "batch axes"]:
    """Return the indices of the target value in each image's output.

    Args:
        call: the name of the caller, for the message.
        output: of the model.
        target: as in ``target_values``, except a function.
        batch: number of images.

    Raises:
        ValueError: the output does not have the target.
    """
    where = f"{call}(target={target!r})"
    if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != batch:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{where}: the model returned {shape}, not one result for each of the {batch} images; give a function of "
            "the output, e.g. target=lambda output: output['scores'].sum()."
        )
    if target is None:
        if output.ndim != 2:
            raise ValueError(
                f"{where}: the model returned {tuple(output.shape)}, not (batch, classes), so there is no predicted "
                f"class; give {_DENSE}."
            )
        return output.argmax(1, keepdim=True)
    indices = _as_indices(where, target, batch).to(output.device)
    sizes = torch.tensor(output.shape[1:], device=output.device)
    if indices.shape[1] != len(sizes):
        raise ValueError(
            f"{where}: the model returned {tuple(output.shape)}, which needs {len(sizes)} indices after the batch's, "
            f"not {indices.shape[1]}; give {_DENSE}."
        )
    if bool(((indices < 0) | (indices >= sizes)).any()):
        known = ", ".join(f"0..{size - 1}" for size in output.shape[1:])
        raise ValueError(f"{where}: expected {'class indices' if len(sizes) == 1 else 'indices'} in {known}.")
    return indices


def _as_indices(where: str, target: Any, batch: int) -> Int[Tensor, "batch axes"]:
    """Return the indices as given, before they are checked against the output."""
    tuples = [target] * batch if isinstance(target, tuple) else target
    if isinstance(tuples, list) and any(isinstance(each, tuple) for each in tuples):
        if len({len(each) if isinstance(each, tuple) else -1 for each in tuples}) > 1:
            raise ValueError(f"{where}: expected tuples with equally many indices.")
        found = _as_tensor(where, tuples)
    else:
        found = _as_tensor(where, tuples)
        if found.ndim == 0:
            found = found.expand(batch)
        found = found.unsqueeze(1)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{where}: expected a class index, or one per image, as integers.")
    if found.ndim != 2 or len(found) != batch:
        raise ValueError(f"{where}: expected one class index, or one for each of the {batch} images.")
    return found.long()


def _as_tensor(where: str, target: Any) -> Tensor:
    """Return the numbers as a tensor; refuse names and other things."""
    try:
        return torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: expected a class index, or one per image, as integers.") from error


def _called(call: str, function: Function, output: Any, batch: int) -> Tensor:
    found = function(output)
    if isinstance(found, Tensor) and found.is_floating_point() and found.shape in ((), (1,), (batch,)):
        return found
    what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(
        f"{call}(target={function!r}): the function returned {what}; expected a scalar, or one number for each of the "
        f"{batch} images, as a tensor."
    )
