"""captum's own methods behind the same contract: they are called, never written again; colours are reduced to one map.

They take any model. ``pixel`` and ``box`` have no meaning here and are refused; ``grid=True`` gives the means over
the tokens' cells.
"""

from typing import Any

import captum.attr
import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution._pixels import Asked, PixelAttribution, check_colours, over_colours
from mamba_attn.attribution._queries import Query
from mamba_attn.attribution._targets import Target

_WINDOWS = 8  # of the default occlusion, side by side along the shorter side


class _ReducedColours(PixelAttribution):
    """One of captum's methods whose result has the images' shape."""

    def __init__(self, model: nn.Module, colours: str) -> None:
        super().__init__(model)
        check_colours(type(self).__name__, colours)
        self.colours = colours

    def _attributions(self, asked: Asked) -> Tensor:
        """What captum returns."""
        raise NotImplementedError

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, int], grid: bool
    ) -> Float[Tensor, "batch 1 height width"]:
        asked = self._ask(images, target)
        with torch.inference_mode(False):
            attributions = self._attributions(asked)
        return self._in_shape(over_colours(attributions, self.colours), images, grid)


class IntegratedGradients(_ReducedColours):
    """captum's IntegratedGradients (arXiv 1703.01365); signed.

    Args:
        model: any.
        colours: "sum" of the signed numbers, whose total over the pixels is the logit less that of the baseline; or
            "absolute", the sum of their absolute values.
        baselines: as captum takes them. Default: 0, the mean colour of normalised images.
        n_steps: of the integral.
        method: of the integral, as captum calls them.
        internal_batch_size: images times steps in one pass; at least the batch, and just it where the target is a
            function.
        multiply_by_inputs: False leaves the mean gradient.

    Raises:
        ValueError: another ``colours``.

    Example:
        >>> IntegratedGradients(model, n_steps=2).attribute(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1, 224, 224])
    """

    def __init__(
        self, model: nn.Module, *, colours: str = "sum", baselines: Any = None, n_steps: int = 50,
        method: str = "gausslegendre", internal_batch_size: int = 32, multiply_by_inputs: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model, colours)
        self.baselines = baselines
        self.n_steps = n_steps
        self.method = method
        self.internal_batch_size = internal_batch_size
        self.multiply_by_inputs = multiply_by_inputs

    def _attributions(self, asked: Asked) -> Tensor:
        size = len(asked.images) if asked.function is not None else max(self.internal_batch_size, len(asked.images))
        method = captum.attr.IntegratedGradients(asked.forward(self.model), multiply_by_inputs=self.multiply_by_inputs)
        with torch.enable_grad():
            found: Tensor = method.attribute(
                asked.images, self.baselines, asked.target, n_steps=self.n_steps, method=self.method,
                internal_batch_size=size,
            )  # fmt: skip
        return found


class InputXGradient(_ReducedColours):
    """captum's InputXGradient (arXiv 1605.01713); signed.

    Args:
        model: any.
        colours: "sum" of the signed numbers, or "absolute", the sum of their absolute values.

    Raises:
        ValueError: another ``colours``.

    Example:
        >>> InputXGradient(model).attribute(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1, 224, 224])
    """

    def __init__(self, model: nn.Module, *, colours: str = "sum") -> None:
        super().__init__(model, colours)

    def _attributions(self, asked: Asked) -> Tensor:
        found: Tensor = captum.attr.InputXGradient(asked.forward(self.model)).attribute(asked.images, asked.target)
        return found


class Saliency(_ReducedColours):
    """captum's Saliency (arXiv 1312.6034), the gradient; its absolute value unless ``abs`` is off.

    Args:
        model: any.
        colours: "sum", or "absolute", the sum of absolute values; with ``abs`` the same. (The paper takes the largest.)
        abs: captum's: absolute values, colour by colour.

    Raises:
        ValueError: another ``colours``.

    Example:
        >>> Saliency(model).attribute(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1, 224, 224])
    """

    def __init__(self, model: nn.Module, *, colours: str = "sum", abs: bool = True) -> None:
        super().__init__(model, colours)
        self.abs = abs

    def _attributions(self, asked: Asked) -> Tensor:
        found: Tensor = captum.attr.Saliency(asked.forward(self.model)).attribute(
            asked.images, asked.target, abs=self.abs
        )
        return found


class Occlusion(PixelAttribution):
    """captum's Occlusion (arXiv 1311.2901): how far the target falls when a window is covered; signed.

    Every pixel has the mean over the windows that cover it; of its colours, which all have the same where a window
    covers all of them, the mean is taken.

    Args:
        model: any.
        sliding_window_shapes: side of a square window over all colours in pixels, or captum's (colours, rows, columns).
            Default: an eighth of the image's shorter side.
        strides: pixels from window to window, or captum's (colours, rows, columns). Default: half a window.
        baselines: as captum takes them. Default: 0, the mean colour of normalised images.
        perturbations_per_eval: covered copies of the batch in one pass; one where the target is a function.

    Raises:
        ValueError: when called, a function as target that returns a sum over several images.

    Example:
        >>> Occlusion(model, sliding_window_shapes=112, strides=112).attribute(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1, 224, 224])
    """

    def __init__(
        self, model: nn.Module, *, sliding_window_shapes: int | tuple[int, ...] | None = None,
        strides: int | tuple[int, ...] | None = None, baselines: Any = None, perturbations_per_eval: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.sliding_window_shapes = sliding_window_shapes
        self.strides = strides
        self.baselines = baselines
        self.perturbations_per_eval = perturbations_per_eval

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, int], grid: bool
    ) -> Float[Tensor, "batch 1 height width"]:
        asked = self._ask(images, target)
        colours = images.shape[1]
        window, strides = self.sliding_window_shapes, self.strides
        window = max(1, min(size) // _WINDOWS) if window is None else window
        if isinstance(window, int):
            window = (colours, window, window)
        if strides is None:
            strides = (colours, *(max(1, side // 2) for side in window[1:]))
        elif isinstance(strides, int):
            strides = (colours, strides, strides)
        clean = asked.images.detach()
        if asked.function and len(clean) > 1 and asked.forward(self.model)(clean).numel() == 1:
            raise ValueError(
                f"Occlusion.attribute(target={target!r}): the function returned one number for {len(clean)} images; "
                "covering a window needs one of each, (batch,)."
            )
        found: Tensor = captum.attr.Occlusion(asked.forward(self.model)).attribute(
            clean, window, strides, self.baselines, asked.target,
            perturbations_per_eval=1 if asked.function else self.perturbations_per_eval,
        )  # fmt: skip
        return self._in_shape(found.mean(1, keepdim=True), images, grid)
