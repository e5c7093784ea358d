"""The features of a layer's tokens: the last output after the layer that still holds all of them."""

from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.lrp.linear_backward import holds_tokens, token_frame
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.adapters import find_mixers
from mamba_attn.tracing.layer_names import LayerName, layer_name
from mamba_attn.tracing.layers import Layer


class Features:
    """Watches one forward pass of a model; nothing stays on it.

    Behind the last layer that is what a backbone hands on: the last norm's output, where all tokens go through it.
    Behind an earlier one it is the output of its block, with the residual stream; of blocks that return several
    tensors of the same shape, as official Vim's with its residual apart, their sum.

    Args:
        model: to be traced in the same pass.
        layer: a mixer's name, or its number. Default: the last one that runs.

    Raises:
        TypeError: neither a name nor a number.
        UnknownLayerError: no such mixer.
    """

    def __init__(self, model: nn.Module, layer: LayerName | None = None) -> None:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        self.model = model
        self.mixers = list(find_mixers(self.model))
        self.wanted = None if layer is None else layer_name(f"layer={layer!r}", layer, self.mixers)
        self.layer: str | None = None  # whose outputs are kept
        self._stopped = False
        self._outputs: list[tuple[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Watch the modules' outputs."""
        for name, module in self.model.named_modules():
            self._stack.callback(module.register_forward_hook(partial(self._after, name)).remove)
            if name in self.mixers:
                self._stack.callback(module.register_forward_pre_hook(partial(self._before, name)).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def of(self, layer: Layer) -> Float[Tensor, "batch tokens features"]:
        """Return the features of the layer that was watched.

        Args:
            layer: the traced one, ``layer`` by name.

        Raises:
            UnsupportedModelError: no output after it holds its tokens.
        """
        for name, output in reversed(self._outputs):
            if self._stopped and not (layer.name == name or layer.name.startswith(f"{name}.") or not name):
                continue
            parts = [part for part in (output if isinstance(output, tuple | list) else [output]) if _whole(layer, part)]
            if parts:
                together = sum(part for part in parts[1:] if part.shape == parts[0].shape)
                return token_frame(layer, parts[0] + together)
        raise UnsupportedModelError(
            f"{type(self.model).__name__}: no module after {layer.name} returns its {layer.tokens} tokens; name "
            "another layer=."
        )

    def _before(self, name: str, module: nn.Module, args: Any) -> None:
        if self.wanted is not None and self.layer is not None:
            self._stopped = True

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in self.mixers and (self.wanted is None or name == self.wanted):
            self.layer, self._outputs = name, []
        if self.layer is not None and not self._stopped:
            self._outputs.append((name, output))


def _whole(layer: Layer, part: Any) -> bool:
    """Whether it holds all tokens of the layer."""
    if not isinstance(part, Tensor) or not part.is_floating_point() or (part.ndim == 4 and not layer.has_layout):
        return False
    return holds_tokens(layer, part)
