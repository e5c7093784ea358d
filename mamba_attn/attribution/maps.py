"""MapAttribution: the base class of all attribution methods, with the contract of ``attribute``; it checks the call.

``queries`` handles pixels and boxes, ``targets`` outputs and classes, ``calls`` what the model is called with.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Self, TypeVar, overload

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.calls import Call, unwrappable
from mamba_attn.attribution.grids import in_every_colour
from mamba_attn.attribution.queries import Place, Query, make_query, split_query
from mamba_attn.attribution.targets import Target, require_classes, target_values
from mamba_attn.attribution.texts import Text
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.training_mode import warn_of_training
from mamba_attn.errors import NonFiniteError, nearest
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.texts import is_text
from mamba_attn.tracing.tracer import Trace, trace

Images = TypeVar("Images", Tensor, tuple[Tensor, ...])  # captum's wrappers pass a tuple and expect one back
Method = TypeVar("Method", bound="MapAttribution")
Positions = int | Sequence[float] | Tensor | None  # in texts


class MapAttribution(Attribution, ABC):
    """An attribution method that returns one map per image.

    It changes neither model nor inputs, and does not switch the model to eval mode.

    Args:
        model: called with the images, and with what ``attribute`` is given for it; returns logits (batch, classes), or
            any output that a target can index. Of tuples, mappings and dataclasses the only (batch, classes) tensor
            counts.

    Raises:
        TypeError: the model is not a module.

    Example:
        >>> from mamba_attn.attribution import RawAttention
        >>> method = RawAttention(model)
        >>> isinstance(method, MapAttribution), method.attribute(images[:1]).shape
        (True, torch.Size([1, 1, 224, 224]))
    """

    reads_rows: ClassVar[bool] = False  # whether it takes a pixel or a box
    reads_traces: ClassVar[bool] = False  # whether a pass that was traced before will do
    reads_gradients: ClassVar[bool] = True  # whether that pass has to keep its graph
    takes_parts: ClassVar[bool] = True  # whether it explains one of several inputs that have layers of their own
    options: ClassVar[Mapping[str, str]] = {}  # captum's arguments of attribute, and which option each one replaces
    layout: AnyLayout | None = None
    orders: AnyOrders | None = None
    _call: Call = Call()
    _delta: Any = None  # set by methods that have one

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__}(model): expected a torch.nn.Module, got {type(model).__name__}.")
        super().__init__(model)
        self.model = model
        self.called = type(self).__name__  # in messages; differs if this method implements another method's option

    @overload
    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        query: Positions = None,
        *,
        pixel: Place | None = None,
        box: Place | None = None,
        grid: bool = False,
        expand: bool = False,
        additional_forward_args: Any = None,
        trace: Trace | None = None,
        return_convergence_delta: Literal[False] = False,
        **options: Any,
    ) -> Images: ...

    @overload
    def attribute(
        self, inputs: Images, target: Target = None, *, return_convergence_delta: Literal[True], **options: Any
    ) -> tuple[Images, Tensor]: ...

    @unwrappable
    def attribute(
        self,
        inputs: Images,
        target: Target = None,
        query: Positions = None,
        *,
        pixel: Place | None = None,
        box: Place | None = None,
        grid: bool = False,
        expand: bool = False,
        additional_forward_args: Any = None,
        trace: Trace | None = None,
        return_convergence_delta: bool = False,
        **options: Any,
    ) -> Images | tuple[Images, Tensor]:
        """Return one map per image.

        Args:
            inputs: (batch, colours, height, width), images as the model takes them; volumes and videos
                (batch, colours, *sizes) or (batch, frames, colours, height, width), spectrograms (batch, time,
                frequency); texts as ids (batch, tokens). A tuple of them for a model with several inputs, each of
                which gets a map from the layers that it alone reaches.
            target: class index, or one per image as a list or tensor. For dense outputs, a tuple of indices such as
                (class, row, column), or a list of one tuple per image. Or a function of the model's output that returns
                one number per image, each depending on its own image only, or their sum. Default: the predicted class,
                for models that return (batch, classes); the number itself for those that return (batch,).
                Class-independent methods also check the target. Of a model that scores tokens, (batch, tokens,
                vocabulary): a token, meant at the last position, or (position, token), or a list of one per text;
                positions below 0 count from the last token. Default: the most likely next token.
            query: of a text, the position whose row is read, one for all texts or one per text; below 0 it counts from
                the last token. Default: the target's position. For images it is deprecated: two numbers are a
                ``pixel``, four a ``box``.
            pixel: (row, column) in pixels: read the row of this pixel's token. One for all images, or one per image as
                a list of tuples or a tensor (batch, 2). Default: the class token, or the mean over patches for models
                without one.
            box: (x0, y0, x1, y1) in pixels, columns x and rows y: read the mean of the rows of its tokens. One for all
                images, or one per image as a list of tuples or a tensor (batch, 4).
            grid: return the map on the token grid instead of in pixels.
            expand: return the inputs' shape, with an equal part of the map in every colour. Captum's metrics and
                pictures, which sum or compare all channels, need this.
            additional_forward_args: what the model is called with after the inputs, one or a tuple, as in captum; a
                dictionary, alone or at the end, holds keyword arguments: ``{"attention_mask": mask}``, whose zeros are
                padding. If they are images too, the layers that they alone reach are left out.
            trace: a pass of the model over these inputs, from ``mamba_attn.trace``; read instead of running the model
                again, so that several maps cost one pass. Methods that need the class want it outside
                ``torch.no_grad()``. Layers are those of the trace, or those of them that ``layers`` names.
            return_convergence_delta: return (maps, delta), of methods that have captum's (batch,) error of the sum.
            **options: captum's own arguments of methods that have them (``baselines``, ``n_steps``, ...), for this call
                instead of those of the constructor.

        Returns:
            (batch, 1, height, width) at the inputs' size in pixels, of volumes (batch, 1, *sizes), interpolated
            linearly between patch centres; with ``grid=True`` that of the patch grid; with ``expand=True`` the inputs'
            shape: the sum over colours is the map. Of texts (batch, tokens), exactly 0 at padding. For a tuple, as
            captum's metrics pass it, a tuple of as many.

        Raises:
            TypeError: an input that is not a tensor; an option that the method does not have.
            ValueError: inputs are not a batch, or of several sizes; the output does not have the target, or the target
                is missing and there is no predicted class; a pixel or box outside the image, both at once, or one for a
                method that reads no rows; ``grid=True`` for layers on several grids, or with ``expand=True``; a layer
                that several of the inputs reach; a trace of another pass, or for a method that cannot read one.
            TraceError: the places of the model's tokens in the image are unknown; a trace without gradients.
            UnknownLayerError: a layer name or pattern matches none, or a number is out of range.
            NonFiniteError: a layer, the target or the map contains NaN or Inf.

        Warns:
            UserWarning: once per model, modules in training mode that change its answer (dropout, batch norms).
        """
        call = f"{self.called}.attribute"
        warn_of_training(self.model)
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        if not several:
            raise TypeError(f"{call}(inputs=()): expected a tensor of images, or several.")
        sizes = [self._size("attribute", images) for images in several]
        if len({len(images) for images in several}) > 1:
            shapes = ", ".join(str(tuple(images.shape)) for images in several)
            raise ValueError(f"{call}(inputs=...): the inputs have batches of different sizes, {shapes}.")
        texts = [images for images in several if is_text(images)]
        chosen, query = query, query if texts else None
        if chosen is not None and not texts:
            pixel, box = split_query(call, chosen, pixel, box, stacklevel=4)
        if texts and texts[0] is not several[0]:
            raise ValueError(f"{call}(inputs=...): the ids of a text must be the first of the model's inputs.")
        if trace is None:
            first = Call.of(call, several, additional_forward_args, self.model)
        elif not self.takes_trace:
            raise ValueError(f"{call}(trace=...): this method reads no trace, it runs the model itself; leave it out.")
        elif additional_forward_args is not None:
            raise ValueError(f"{call}(trace=..., additional_forward_args=...): the trace has its own; leave them out.")
        else:
            first = Call.traced(call, several, self.model, trace)
        asked = [self._asked("attribute", images, query, pixel, box, first.text, target) for images in several]
        if grid and expand:
            raise ValueError(f"{call}(grid=True, expand=True): the inputs' shape is in pixels; leave one of them out.")
        if asked[0] is not None and not self.reads_rows and not (texts and query is None):
            name = next(iter(asked[0].argument))
            raise ValueError(f"{call}({asked[0]}): this method reads no token's row; leave {name} out.")
        if return_convergence_delta:
            options["return_convergence_delta"] = True
        bound = self._with(call, options)
        results = []
        for place, images, size, rows in zip(first.explained, several, sizes, asked, strict=True):
            bound._call = first.at(place)
            maps = bound._finite_maps(images, target, rows, size, grid or is_text(images))
            if first.text is not None and is_text(images):
                maps = maps.squeeze(1).masked_fill(~first.text.real, 0)
            elif expand:
                maps = in_every_colour(maps, images)
            results.append(maps)
        found: Any = tuple(results) if isinstance(inputs, tuple) else results[0]
        return (found, bound._delta) if return_convergence_delta else found

    @property
    def takes_trace(self) -> bool:
        """Whether ``attribute`` takes ``trace``; methods that watch or change the pass run the model themselves."""
        other: MapAttribution | None = getattr(self, "_other", None)  # published code's
        return self.reads_traces if other is None else other.takes_trace

    @property
    def shared_folds(self) -> tuple[str, ...]:
        """Folds that the method reads out of whole matrices, where another method's sweep has computed them."""
        return ()

    @property
    def needs_matrices(self) -> bool:
        """Whether it computes whole matrices of ``shared_folds`` where nothing else has."""
        return False

    def has_convergence_delta(self) -> bool:
        """Whether ``attribute`` takes ``return_convergence_delta``; captum asks."""
        return "return_convergence_delta" in self.options

    def _with(self, call: str, options: Mapping[str, Any]) -> Self:
        """Return a copy for one call, with captum's arguments in place of the options that they replace.

        Raises:
            TypeError: an argument that this method does not have.
        """
        bound = copy.copy(self)
        for name, value in options.items():
            if name not in self.options:
                owners = [each.__name__ for each in _all_methods() if name in each.options]
                whose = f"Methods with it: {', '.join(sorted(owners))}." if owners else nearest(name, _arguments())
                raise TypeError(f"{call}({name}=...): this method has no {name}. {whose}")
            setattr(bound, self.options[name], value)
        return bound

    def _called_with(self, method: str, inputs: Tensor) -> Self:
        """Return a copy that calls the model with these inputs alone; refuse what is no batch."""
        self._size(method, inputs)
        bound = copy.copy(self)
        bound._call = Call.of(f"{self.called}.{method}", (inputs,), None, self.model)
        return bound

    def _at_this_call(self, other: Method) -> Method:
        """Return a copy of another method that calls the model as this one does."""
        bound = copy.copy(other)
        bound._call = self._call
        return bound

    def _finite_maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        """Return the maps.

        Raises:
            NonFiniteError: a map contains NaN or Inf.
        """
        with torch.no_grad():
            maps = self._maps(images, target, query, size, grid)
        maps = maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps
        finite = maps.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            which = ", ".join(str(index) for index in (~finite).nonzero().flatten().tolist())
            raise NonFiniteError(
                f"{self.called}.attribute: the maps of images {which} contain NaN or Inf; check the images, the "
                "weights and the precision of the model."
            )
        return maps

    @abstractmethod
    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        """Return the maps in pixels, ``size`` (rows, columns), or on the tokens' grid. Called without gradients."""

    def _asked(
        self,
        method: str,
        inputs: Tensor,
        query: Any,
        pixel: Any,
        box: Any,
        text: Text | None = None,
        target: Target = None,
    ) -> Query | None:
        """Return whose rows are read; refuse inputs that are not a batch, and places outside the images or texts."""
        call, size = f"{self.called}.{method}", self._size(method, inputs)
        if text is not None and is_text(inputs):
            if pixel is not None or box is not None:
                raise ValueError(f"{call}(pixel=..., box=...): a text has no pixels; give query=position.")
            return text.query(call, query, target)
        pixel, box = split_query(call, query, pixel, box, stacklevel=4)
        return make_query(call, size, len(inputs), pixel, box)

    def _size(self, method: str, inputs: Tensor) -> tuple[int, ...]:
        """Return the images' sizes in pixels, (rows, columns) or (frames, rows, columns), or a text's number of tokens.

        Raises:
            TypeError: not a tensor.
            ValueError: not a batch.
        """
        call = f"{self.called}.{method}"
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{call}(inputs): expected a tensor of images, got {type(inputs).__name__}.")
        if is_text(inputs) and len(inputs):
            return (inputs.shape[1],)
        if inputs.ndim < 3 or len(inputs) == 0:
            raise ValueError(
                f"{call}(inputs{tuple(inputs.shape)}): expected images (batch, colours, rows, columns), volumes or "
                "videos (batch, colours, *sizes), spectrograms (batch, time, frequency), or texts as ids "
                "(batch, tokens), integers."
            )
        return tuple(inputs.shape[1 if inputs.ndim == 3 else 2 :])

    def _output(self, images: Tensor, target: Target) -> Any:
        """Return the model's output, after checking that it has the target and that the target's value is finite.

        Raises:
            ValueError: the output does not have the target.
            NonFiniteError: the value to explain is NaN or Inf.
        """
        output = self._call.run(self.model, images)
        if not bool(self._values(output, target, len(images)).isfinite().all()):
            raise NonFiniteError(
                f"{self.called}.attribute: the value to explain is NaN or Inf; check the images, the weights and the "
                "precision of the model."
            )
        return output

    def _values(self, output: Any, target: Target, batch: int) -> Tensor:
        """Return the target's value in every image, or their sum.

        Raises:
            ValueError: the output does not have the target.
        """
        call = f"{self.called}.attribute"
        require_classes(call, self.model, target)
        return target_values(call, output, target, batch, self._call.text)

    def _tracing(self, **options: Any) -> AbstractContextManager[Trace]:
        """Return a trace of the model, with the token frame and the orders that this method was given."""
        return trace(self.model, layout=self.layout, orders=self.orders, **options)

    def _part(self, record: Trace, reached: frozenset[str] | None) -> Trace:
        """Return the layers of a pass whose tokens come from the images.

        Raises:
            ValueError: the method cannot do with them, because other inputs have layers of their own.
        """
        if reached is None or reached.issuperset(record):
            return record
        if not self.takes_parts:
            names = [name for name in record if name not in reached]
            others = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"{self.called}.attribute: {others} belong to other inputs of the model, and this method explains all "
                "of a pass; use MambaAttribution or IntegratedGradients."
            )
        return record.part([name for name in record if name in reached])

    def _layouts(self, images: Tensor) -> list[TokenLayout]:
        """Return the token layout of every layer, from a pass of the first image."""
        reached = self._call.reached(f"{self.called}.attribute", self.model)
        with torch.no_grad(), self._tracing() as record:
            whole = self._call.has_others or is_text(images)  # a text's mask is as long as the batch
            self._call.run(self.model, images if whole else images[:1])
        return [layer.layout for layer in self._part(record, reached).layers]


def _all_methods() -> Iterator[type[MapAttribution]]:
    """Yield every attribution method that is loaded."""
    waiting = MapAttribution.__subclasses__()
    while waiting:
        found = waiting.pop()
        yield found
        waiting += found.__subclasses__()


def _arguments() -> list[str]:
    """Names of the arguments of ``attribute``."""
    return [name for name in inspect.signature(MapAttribution.attribute).parameters if name not in ("self", "options")]
