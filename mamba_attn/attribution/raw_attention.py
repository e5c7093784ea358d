"""Raw hidden attention: what the query reads, layer by layer, averaged."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mamba_attn.attribution._base import Row, TokenAttribution
from mamba_attn.attribution._queries import Query, read_rows
from mamba_attn.layers import Layer
from mamba_attn.tracing import trace


class RawAttention(TokenAttribution):
    """The query's row of the hidden attention, averaged over layers; independent of the class.

    Per layer the channels' true matrices are averaged and the routes summed in the token frame (arXiv 2403.01590,
    section 3.3); the query's row of that is read in linear time, its positive part taken, and the maps averaged over
    the layers. Layers on different grids, as in VMamba, meet in pixels. In a ViT the heads' probabilities are averaged.

    Args:
        model: a model that ``mamba_attn.trace`` knows.
        layers: names or patterns of the mixers to use, e.g. ``["layers.2.*"]`` for one stage of VMamba. Default: all.
        signed: keep the negative entries.

    Example:
        >>> RawAttention(model).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    def __init__(self, model: nn.Module, *, layers: Iterable[str] | None = None, signed: bool = False) -> None:
        super().__init__(model, layers=layers)
        self.signed = signed

    def rows(self, inputs: Tensor, query: Query = None) -> dict[str, Tensor]:
        """Return the query's signed row in every layer, (batch, tokens) each, by the layers' names.

        Args:
            inputs: as in ``attribute``.
            query: as in ``attribute``.

        Raises:
            ValueError: inputs that are no batch, a query outside the image.
        """
        self._size("rows", inputs, query)
        with torch.no_grad():
            with trace(self.model, layers=self.layers) as record:
                self.model(inputs)
            return {layer.name: read_rows(layer, query) for layer in self._ran(record)}

    def _rows(self, layers: Sequence[Layer], query: Query) -> list[Row]:
        signed = ((layer.layout, read_rows(layer, query)) for layer in layers)
        return [(layout, row if self.signed else row.clamp(min=0)) for layout, row in signed]
