"""TokenAttribution: the base class of methods that read rows of tokens from one traced pass, made maps by ``grids``."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.grids import Row, frames_stand_second, rendered
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.errors import NonFiniteError, TraceError, UnsupportedModelError
from mamba_attn.tracing import patch_embedding
from mamba_attn.tracing.adapters import find_mixers
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import LayerNames, layer_names, listed_layers
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.tracer import Trace
from mamba_attn.tracing.undisturbed import undisturbed
from mamba_attn.tracing.unseen import unseen_sentence


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

    Example:
        >>> from mamba_attn.attribution import RawAttention
        >>> method = RawAttention(model, layers=[-2, -1])  # one that reads the last two layers
        >>> isinstance(method, TokenAttribution), method.attribute(images[:1], pixel=(100, 40)).shape
        (True, torch.Size([1, 1, 224, 224]))
    """

    reads_rows: ClassVar[bool] = True
    reads_traces: ClassVar[bool] = True

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
        """Return the method of ``attribution.published`` that an option names; None for the default, this method."""
        from mamba_attn.attribution.published import named  # which imports this file

        return named(self, kind, option)

    @abstractmethod
    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        """Return the rows whose maps are averaged: one, or one per layer. Called without gradients."""

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        rows = self._explain(images, target, query)
        frames_first = images.ndim == 5 and all(frames_stand_second(layout, images.shape) for layout, _ in rows)
        return rendered(
            f"{self.called}.attribute", rows, (images.shape[1], *images.shape[3:]) if frames_first else size, grid
        )

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
            if rules is not None and self._call.has_others and images.is_floating_point():
                images = images.detach().requires_grad_()  # rules hold the others
            reached = self._call.reached(call, self.model)
            with self._pass(images, gradients, rules) as (record, output):
                with torch.set_grad_enabled(gradients):
                    needed = gradients or target is not None
                    logit = self._values(output, target, len(inputs)).sum() if needed else torch.zeros(())
                if gradients and self._call.trace is not None and not logit.requires_grad:
                    raise TraceError(
                        f"{call}(trace=...): the traced pass kept no graph for gradients; run the model outside "
                        "torch.no_grad(), and if all of its parameters are frozen on images.requires_grad_()."
                    )
                record = self._part(record, reached)
                layers = self._ran(record)
                if multiplied and self.layers is None and record.unseen_mixers:
                    raise UnsupportedModelError(unseen_sentence(self.called, record.unseen_mixers))
                if not bool(logit.detach().isfinite()):
                    for layer in layers:  # the first layer that is not finite is where it began
                        layer.require_finite()
                    raise NonFiniteError(f"{call}: the value to explain is NaN or Inf; check the model's head.")
                with torch.no_grad():
                    yield record, logit

    @contextmanager
    def _pass(self, images: Tensor, gradients: bool, rules: Rules | None) -> Iterator[tuple[Trace, Any]]:
        """Run the model, or read the pass that was traced before; yield the trace and the model's output."""
        given = self._call.trace
        if given is None:
            places = {} if rules is None else self._places(images)
            with self._tracing(layers=self.layers, rules=rules) as record:
                with torch.set_grad_enabled(gradients):
                    output = self._call.run(self.model, images)
                for name in places.keys() & record.keys():
                    if not record[name].has_layout:
                        record[name].lay_out(places[name])
                yield record, output
            return
        if self.layers is not None:
            mixers = dict.fromkeys(name.partition("#")[0] for name in given)
            chosen = layer_names(f"{type(self).__name__}(layers=...)", self.layers, list(mixers))
            given = given.part([name for name in given if name.partition("#")[0] in chosen])
        yield given, given.output

    def _places(self, images: Tensor) -> dict[str, TokenLayout]:
        """Return the frames that are found by looking at a model ahead of its run, which a pass with rules cannot."""
        if self._call.text is not None:
            return {}  # a line
        mixers = find_mixers(self.model)
        sources = [each for _, adapter in mixers.values() for each in adapter.layout_sources(self.model)]
        if not mixers or self.layout is not None or sources or any(patch_embedding.layout_sources(self.model)):
            return {}
        quiet = undisturbed(self.model, traced=True)  # in eval mode: statistics do not learn from this pass
        with torch.inference_mode(False), quiet, self._tracing(layers=list(mixers)) as record:
            self._call.run(self.model, images if self._call.has_others else images[:1].clone())
        return {layer.name: layer.layout for layer in record.layers if layer.has_layout}

    def _ran(self, record: Trace) -> list[Layer]:
        """Return the layers of the pass.

        Raises:
            TraceError: none of the requested layers ran.
        """
        if not record:
            raise TraceError(f"{self.called}: the model's forward called none of the requested layers.")
        return record.layers
