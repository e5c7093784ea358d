"""Captum's LayerGradCam on tokens: it expects features on the channel axis, where token models do not have them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import captum.attr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.captum_methods import Asked, FromCaptum
from mamba_attn.attribution.grids import cell_means
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Target
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import UnsupportedModelError, nearest
from mamba_attn.tracing.adapters import find_mixers
from mamba_attn.tracing.door_layers import AnyLayout
from mamba_attn.tracing.layer_kinds import layer_kinds
from mamba_attn.tracing.layer_names import LayerName, layer_name, listed_layers

_STAGED = ("VMamba",)  # families in which all tokens of the last stage reach the head


class LayerGradCam(FromCaptum):
    """captum's LayerGradCam (arXiv 1610.02391, eq. 1 and 2) of the last layer whose tokens reach the head.

    Features are weighted by the mean of their gradients over all tokens, class tokens included, and summed; the
    positive part is taken after the sum, as in the paper, unless ``relu`` is off. Captum is called on a copy of the
    model that shares all weights and in which the layer passes its features on as channels.

    Args:
        model: a model that ``mamba_attn.trace`` supports; any other, with ``layer``.
        layer: a module or its name, which returns tokens (batch, tokens, features) or images of features, channels
            last if its grid is one of the model's token grids, else first; or the number of a mixer. Default: for
            VMamba the last stage; else the input of the last mixer, because after it possibly only the class token
            reaches the head.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        relu: take the positive part.

    Raises:
        TypeError: ``layer`` is neither a module, nor a name, nor a number.
        ValueError: a module of another model; when called, a layer that does not exist, or that returns neither tokens
            nor images.
        UnknownLayerError: when called, a number out of range.
        UnsupportedModelError: when called without ``layer``, a model that cannot be traced.

    Example:
        >>> LayerGradCam(model).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """

    options: ClassVar[Mapping[str, str]] = {"relu_attributions": "relu"}

    def __init__(
        self,
        model: nn.Module,
        layer: LayerName | nn.Module | None = None,
        *,
        layout: AnyLayout | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__(model)
        self.layout = layout
        self.layer: LayerName | None
        if isinstance(layer, nn.Module):  # as captum takes it
            names = {module: name for name, module in model.named_modules()}
            if not names.get(layer):
                raise ValueError(f"LayerGradCam(layer={type(layer).__name__}): expected a module inside the model.")
            self.layer = names[layer]
        else:
            self.layer = layer
        if self.layer is not None:
            listed_layers("LayerGradCam(layer=...)", [self.layer])
        self.relu = relu

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        asked = self._ask(images, target)
        names, at_input = self._places(images)
        frames = self._frames(images)
        for name in names:  # at doors, the module that calls the scan may be given channels first
            tap = _Tap([frame.grid for frame in frames])
            with torch.inference_mode(False):
                cam = self._cam(asked, name, at_input, tap)
            if any(_fits(frame, cam) for frame in frames if cam.ndim in (3, 4)):
                break
        if len(cam) != len(images) or cam.ndim not in (3, 4):
            raise ValueError(
                f"LayerGradCam(layer={name!r}): it returns {tap.shape}, neither (batch, tokens, features) nor images "
                "of features; choose another layer=."
            )
        frame = next((frame for frame in frames if _fits(frame, cam)), None)
        if frame is None and cam.ndim == 3:
            raise ValueError(
                f"LayerGradCam(layer={name!r}): it returns {cam.shape[2]} tokens whose place in the image is not "
                "known; choose another layer=."
            )
        if frame is None:
            pixels = F.interpolate(cam, size, mode="bilinear")
        else:
            own = frame.to_grid(cam) if cam.ndim == 3 else cam
            if grid and frame.grid == frames[0].grid:
                return own
            pixels = frame.to_pixels(own, size)
        return cell_means(pixels, (frames or self._layouts(images))[0]) if grid else pixels

    def _cam(self, asked: Asked, name: str, at_input: bool, tap: "_Tap") -> Float[Tensor, "batch 1 *tokens"]:
        run = asked.forward(_tapped(self.model, name, tap, at_input))

        def forward(x: Tensor, *others: Any) -> Tensor:
            tap.calls = 0
            values = run(x, *others)
            if tap.calls > 1:
                raise UnsupportedModelError(
                    f"LayerGradCam(layer={name!r}): {type(self.model).__name__} calls it {tap.calls} times in one "
                    "forward pass, so it is not known which call's features to take; choose a layer behind those that "
                    "are shared."
                )
            if tap.shape is None:
                raise UnsupportedModelError(
                    f"LayerGradCam(layer={name!r}): {type(self.model).__name__} does not call it; choose another layer."
                )
            return values

        found: Tensor = captum.attr.LayerGradCam(forward, tap.channels).attribute(
            asked.images, asked.target, asked.others, relu_attributions=self.relu
        )
        return found.detach()

    def _places(self, images: Tensor) -> tuple[list[str], bool]:
        """Return the names of the layer and of those that will do, and whether their inputs are meant, not outputs."""
        if self.layer is not None and not isinstance(self.layer, str):
            return [layer_name("LayerGradCam(layer=...)", self.layer, self._mixers(images))], False
        if self.layer is not None:
            names = [name for name, _ in self.model.named_modules() if name]
            if self.layer not in names:
                raise ValueError(f"LayerGradCam(layer={self.layer!r}): no such module. {nearest(self.layer, names)}")
            return [self.layer], False
        name = self._mixers(images)[-1]
        stage, found, _ = name.rpartition(".blocks.")
        known = find_mixers(self.model).get(name)
        staged = known is not None and known[1].family in _STAGED
        if staged and found:
            return [stage], False
        parts = name.split(".")
        return [
            ".".join(parts[:depth]) for depth in range(len(parts), 0 if known is None else len(parts) - 1, -1)
        ], True

    def _mixers(self, images: Tensor) -> list[str]:
        """The names of the modules that mix tokens, first to last."""
        shown = images if self._call.has_others else images[:1]
        kinds = layer_kinds(self.model, lambda: self._call.run(self.model, shown), layout=self.layout)
        return list(dict.fromkeys(name.partition("#")[0] for name in kinds))

    def _frames(self, images: Tensor) -> list[TokenLayout]:
        """The model's token frames; none for a model that cannot be traced, whose layer was named."""
        try:
            return self._layouts(images)
        except UnsupportedModelError:
            if find_mixers(self.model):
                raise
            return []


class _Tap(nn.Module):
    """Hands features on unchanged, and as channels to ``channels``, where captum looks at them."""

    def __init__(self, grids: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.grids = grids
        self.channels = nn.Identity()
        self.shape: tuple[int, ...] | None = None
        self.calls = 0

    def forward(self, features: Any) -> Tensor:
        self.calls += 1
        if not isinstance(features, Tensor):
            raise TypeError(
                f"LayerGradCam: the layer gives {type(features).__name__}, not a tensor; name another layer=."
            )
        self.shape = tuple(features.shape)
        if features.ndim == 3 or (features.ndim == 4 and self.shape[1:3] in self.grids):
            moved: Tensor = self.channels(features.movedim(-1, 1)).movedim(1, -1)
            return moved
        same: Tensor = self.channels(features)
        return same


class _Tapped(nn.Module):
    """A layer with a tap on what it is given, or gives."""

    def __init__(self, layer: nn.Module, tap: _Tap, at_input: bool) -> None:
        super().__init__()
        self.layer = layer
        self.tap = tap
        self.at_input = at_input

    def __getattr__(self, name: str) -> Any:
        """What the model may want to know of its layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.at_input:
            return self.layer(self.tap(x), *args, **kwargs)
        return self.tap(self.layer(x, *args, **kwargs))


def _tapped(model: nn.Module, name: str, tap: _Tap, at_input: bool) -> nn.Module:
    """A copy of the model that shares everything but the modules on the way to the layer, which has a tap.

    A copy, not a hook: captum puts hooks of its own on the layer that it is given, and the user's model has to stay
    without any, whatever fails on the way.
    """
    root = current = _shallow(model)
    *way, last = name.split(".")
    for part in way:
        child = _shallow(current.get_submodule(part))
        current._modules[part] = child
        current = child
    current._modules[last] = _Tapped(current.get_submodule(last), tap, at_input)
    return root


def _shallow(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _fits(frame: TokenLayout, cam: Tensor) -> bool:
    return frame.tokens == cam.shape[2] if cam.ndim == 3 else frame.grid == tuple(cam.shape[2:])
