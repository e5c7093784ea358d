"""RawAttention: what the query reads in each layer, averaged over layers."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from mamba_attn.attribution.grids import Row
from mamba_attn.attribution.maps import Positions
from mamba_attn.attribution.queries import Place, Query, read_rows
from mamba_attn.attribution.targets import Target
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_names import ByLayer, LayerNames


class RawAttention(TokenAttribution):
    """The query's row of the hidden attention, averaged over layers; independent of the class.

    Per layer, average the channels' true matrices and sum the routes in the token frame (arXiv 2403.01590, section
    3.3); read the query's row of the result in linear time and take its positive part; average the maps over layers.
    Layers on different grids, as in VMamba, are combined in pixels, where a token's value spreads over the area that it
    covers. In a ViT, the heads' probabilities are averaged.

    Args:
        model: a model that ``mamba_attn.trace`` supports.
        layers: names, patterns or numbers of the mixers to use, e.g. ``["layers.2.*"]`` for one stage of VMamba.
            Default: all.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        signed: keep the negative entries.
        convention: "exact", or published code whose map to return instead: "hidden_mamba", "implicit_unified",
            "vmamba_analysis" or "vmamba_analysis_dt", see ``mamba_attn.attribution.published``. These take no other
            option; they use their own default layers unless ``layers`` is given.

    Raises:
        ValueError: an unknown convention, or a published one with ``signed=True``. When called: a convention that does
            not suit the model, or a pixel or box for one that only computes the class token's row.

    Example:
        >>> RawAttention(model).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    reads_gradients: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerNames | None = None,
        layout: AnyLayout | None = None,
        orders: AnyOrders | None = None,
        signed: bool = False,
        convention: str = "exact",
    ) -> None:
        super().__init__(model, layers=layers, layout=layout, orders=orders)
        self.signed = signed
        self.convention = convention
        self._other = self._published(RawAttention, "convention")

    @property
    def shared_folds(self) -> tuple[str, ...]:
        """The mean, but for published code."""
        return () if self._other is not None else ("mean",)

    def rows(
        self,
        inputs: Tensor,
        query: Positions = None,
        *,
        pixel: Place | None = None,
        box: Place | None = None,
    ) -> ByLayer[Tensor]:
        """Return the query's signed row in every layer, (batch, tokens) each, by the layers' names; always exact.

        Args:
            inputs: as in ``attribute``.
            query: as in ``attribute``.
            pixel: as in ``attribute``.
            box: as in ``attribute``.

        Raises:
            ValueError: inputs are not a batch; a pixel or box is outside the image, or both are given.
        """
        call = self._called_with("rows", inputs)._call
        asked = self._asked("rows", inputs, query, pixel, box, call.text)
        with torch.no_grad():
            with self._tracing(layers=self.layers) as record:
                call.run(self.model, inputs)
            return ByLayer({layer.name: read_rows(layer, asked) for layer in self._ran(record)})

    def _explain(self, inputs: Tensor, target: Target, query: Query | None) -> list[Row]:
        if self._other is not None:
            return self._at_this_call(self._other)._explain(inputs, target, query)
        with self._traced(inputs, target) as (record, _):
            layers = record.layers
        signed = ((layer.layout, read_rows(layer, query)) for layer in layers)
        return [(layout, row if self.signed else row.clamp(min=0)) for layout, row in signed]
