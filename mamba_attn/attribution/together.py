"""Maps of several methods from one traced pass, in which a layer folds the matrices that they share once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from mamba_attn.attribution.calls import Call
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.targets import Target
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.tracing.tracer import Trace
from mamba_attn.tracing.tracer import trace as traced

Images = TypeVar("Images", Tensor, tuple[Tensor, ...])


def attribute_together(
    methods: Sequence[MapAttribution],
    inputs: Images,
    target: Target = None,
    *,
    additional_forward_args: Any = None,
    trace: Trace | None = None,
    **options: Any,
) -> list[Images]:
    """Return the maps of several methods, as each one's ``attribute`` does, from one pass if they can read one.

    Methods that read gradients go first, and take along the matrices that the others need: a sweep over the states that
    folds two matrices costs little more than one. These matrices stay in the trace, (batch, tokens, tokens) per layer,
    as with ``mamba_attn.trace(attention="mean")``.

    Args:
        methods: on the same model.
        inputs: as in ``MapAttribution.attribute``.
        target: as there.
        additional_forward_args: as there.
        trace: as there, for the methods that can read it; the others run the model themselves.
        **options: further arguments of every method's ``attribute``.

    Raises:
        ValueError: methods on different models; or as ``attribute``.

    Example:
        >>> from mamba_attn.attribution import MambaAttribution, RawAttention
        >>> maps = attribute_together([RawAttention(model), MambaAttribution(model)], torch.randn(2, 3, 224, 224))
        >>> [each.shape for each in maps]
        [torch.Size([2, 1, 224, 224]), torch.Size([2, 1, 224, 224])]
    """
    if any(method.model is not methods[0].model for method in methods):
        raise ValueError("attribute_together(methods=...): expected methods on one model.")
    readers = [method for method in methods if method.takes_trace]
    readers = [each for each in readers if trace is not None or _placed_alike(each, readers[0])]
    found: dict[int, Images] = {}
    if trace is not None or len(readers) > 1:
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        with _pass(readers, several, additional_forward_args) if trace is None else nullcontext(trace) as record:
            folds = {fold for method in readers for fold in method.shared_folds}
            for layer in (layer for layer in record.layers if isinstance(layer, ScanLayer)):
                for fold in folds:
                    layer.expect(fold)
            for method in sorted(readers, key=lambda its: (not its.reads_gradients, not its.needs_matrices)):
                found[id(method)] = method.attribute(inputs, target, trace=record, **options)
    options["additional_forward_args"] = additional_forward_args
    return [found[id(each)] if id(each) in found else each.attribute(inputs, target, **options) for each in methods]


def _placed_alike(one: MapAttribution, other: MapAttribution) -> bool:
    return one.layout is other.layout and one.orders is other.orders


@contextmanager
def _pass(methods: Sequence[MapAttribution], inputs: tuple[Tensor, ...], further: Any) -> Iterator[Trace]:
    """Run one traced pass that these methods can read."""
    model, first = methods[0].model, methods[0]
    gradients = any(method.reads_gradients for method in methods)
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    if gradients and frozen:
        inputs = tuple(x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    call = Call.of("attribute_together", inputs, further, model)
    with (
        torch.inference_mode(False),
        traced(model, layout=first.layout, orders=first.orders) as record,
    ):
        with torch.set_grad_enabled(gradients):
            call.run(model, call.args[0])
        yield record
