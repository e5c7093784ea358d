"""How ``attribute`` calls the model: which argument the images are, what stands next to them, and a trace to read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mamba_attn.attribution.texts import Text
from mamba_attn.tracing.door_layers import DoorLayer
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.softmax_layers import AttentionLayer, DoorAttention
from mamba_attn.tracing.texts import named_arguments, takes
from mamba_attn.tracing.tracer import Trace, trace
from mamba_attn.tracing.undisturbed import undisturbed

Key = int | str  # position of an argument, or its keyword
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of the model, the images to explain in their place.

    Args:
        args: positional arguments.
        kwargs: keyword arguments, of a model that was traced with some.
        explained: positions, or keywords, of the inputs that are explained one after the other.
        place: that of the images.
        trace: of this very call, made before.
        seen: for every input, the layers that it reaches; filled when it is first asked for.
        text: what is known of the inputs where they are ids, else None.
    """

    args: tuple[Any, ...] = (None,)
    kwargs: dict[str, Any] = field(default_factory=dict)
    explained: tuple[Key, ...] = (0,)
    place: Key = 0
    trace: Trace | None = None
    seen: dict[Key, frozenset[str]] = field(default_factory=dict)
    text: Text | None = None

    @classmethod
    def of(cls, call: str, inputs: tuple[Tensor, ...], further: Any, model: nn.Module) -> "Call":
        """Return the call of the first input.

        Args:
            call: the name of the caller, for the message.
            inputs: to explain.
            further: captum's ``additional_forward_args``, one or a tuple of them; a dictionary at its end holds
                keyword arguments.
            model: of the method.

        Raises:
            ValueError: a text that is empty or all padding, or ids that the model does not have.
        """
        extra = () if further is None else further if isinstance(further, tuple) else (further,)
        named: dict[str, Any] = dict(extra[-1]) if extra and isinstance(extra[-1], Mapping) else {}
        extra = extra[:-1] if named else extra

        def usable(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

        with torch.inference_mode(False):  # autograd cannot save inference tensors
            args = tuple(usable(each) for each in (*inputs, *extra))
            kwargs = {name: usable(value) for name, value in named.items()}
        text = Text.of(call, model, args, kwargs)
        if text is not None and takes(model, "use_cache") and "use_cache" not in named_arguments(model, args, kwargs):
            kwargs["use_cache"] = False  # which would be filled for nothing
        return cls(args, kwargs, tuple(range(len(inputs))), text=text)

    @classmethod
    def traced(cls, call: str, inputs: tuple[Tensor, ...], model: nn.Module, record: Trace) -> "Call":
        """Return the call of the first input in a pass that was traced before.

        Args:
            call: the name of the caller, for the message.
            inputs: to explain.
            model: of the method.
            record: of the pass.

        Raises:
            ValueError: the pass is of another model, or was not called with these inputs.
            TraceError: the model has not run, or ran twice.
        """
        args, kwargs = record.arguments
        inner = model
        while isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        if record.model is not inner:
            raise ValueError(
                f"{call}(trace=...): this is a trace of another model, a {type(record.model).__name__}; trace the "
                "model that the method was made with."
            )
        explained: list[Key] = []
        given = _by_key(args, kwargs)
        for images in inputs:
            places = [key for key, value in given.items() if key not in explained and _same(value, images)]
            if not places:
                raise ValueError(
                    f"{call}(inputs{tuple(images.shape)}, trace=...): the traced pass was of other images; give those "
                    "that the model was called with."
                )
            explained.append(places[0])
        text = Text.of(call, model, args, kwargs)
        return cls(args, kwargs, tuple(explained), explained[0], record, text=text)

    def at(self, place: Key) -> "Call":
        """Return the same call, for another of its inputs."""
        return replace(self, place=place)

    @property
    def has_others(self) -> bool:
        """Whether there are tensors next to the images, which may have layers of their own; a text's mask has none."""
        given = _by_key(self.args, self.kwargs)
        found = [value for key, value in given.items() if key != self.place and isinstance(value, Tensor)]
        return bool(found) and (self.text is None or any(value.is_floating_point() for value in found))

    def reached(self, call: str, model: nn.Module) -> frozenset[str] | None:
        """Return the layers whose tokens come from the images, and from no other input that is explained; None for all.

        Found by running the model again with one input changed.

        Args:
            call: the name of the caller, for the message.
            model: the model.

        Raises:
            ValueError: no layer is reached by this input alone.
        """
        if not self.has_others:
            return None
        if not self.seen:
            with undisturbed(model, traced=True):
                plain = self._entering(model, None)
                for place in self.explained:
                    changed = self._entering(model, place)
                    equal = (name for name, x in plain.items() if name in changed and torch.equal(x, changed[name]))
                    self.seen[place] = frozenset(plain) - frozenset(equal)
        own = self.seen[self.place]
        joint = {name for place in self.explained if place != self.place for name in own & self.seen[place]}
        if joint:
            raise ValueError(
                f"{call}(inputs=...): {', '.join(sorted(joint)[:3])} see several of the {len(self.explained)} inputs, "
                "so it is not known in which of them their tokens lie; give one input and the others as "
                "additional_forward_args=(...)."
            )
        if not own:
            raise ValueError(f"{call}(inputs=...): no traced layer depends on input {self.place}; leave it out.")
        return own

    def _entering(self, model: nn.Module, moved: Key | None) -> dict[str, Tensor]:
        """Return what enters every layer, with one input changed."""
        given = _by_key(self.args, self.kwargs)
        if moved is not None:
            given[moved] = _pushed(given[moved])
        args = [value for key, value in given.items() if isinstance(key, int)]
        with trace(model) as record:
            model(*args, **{key: value for key, value in given.items() if isinstance(key, str)})
        return {layer.name: _entered(layer) for layer in record.layers}

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """Call the model with these images in their place.

        Args:
            model: the model.
            images: as many as there were.
        """
        args = [images if index == self.place else value for index, value in enumerate(self.args)]
        kwargs = {name: images if name == self.place else value for name, value in self.kwargs.items()}
        return model(*args, **kwargs)


def _pushed(images: Tensor) -> Tensor:
    """Return other images; integers are in another order."""
    if not images.is_floating_point():
        return images.flip(-1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    return images + noise * images.std().clamp(min=1e-3)


def _entered(layer: Layer) -> Tensor:
    """Return the tensor from which a layer's tokens come."""
    if isinstance(layer, DoorAttention):
        return layer.row_frame.value  # at doors, before any order is measured
    if isinstance(layer, DoorLayer):
        return layer.scan_frame.source_u
    if isinstance(layer, AttentionLayer):
        return layer.record.value
    if isinstance(layer, ScanLayer):
        return layer.scan.source_u
    raise TypeError(f"{layer.name}: a layer of another kind, {type(layer).__name__}.")


def unwrappable(method: Method) -> Method:
    """Return a method with the ``__wrapped__`` that captum's NoiseTunnel calls; all of captum's methods have it."""

    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return cast(Method, wrapper)


def _by_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Key, Any]:
    return dict([*enumerate(args), *kwargs.items()])


def _same(value: Any, images: Tensor) -> bool:
    if value is images:
        return True
    comparable = isinstance(value, Tensor) and value.shape == images.shape and value.device == images.device
    return comparable and value.dtype == images.dtype and torch.equal(value, images)
