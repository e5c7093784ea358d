"""Captum's own methods with our interface: they are called, not reimplemented.

``FromCaptum`` is the adapter: it translates our target for captum. ``PixelsFromCaptum`` reduces the result to one map
and, with ``grid=True``, to means over the tokens' cells; of texts captum sees the embeddings, and a token has the sum
over their features. Any model will do; ``pixel`` and ``box`` have no meaning here and are refused.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import captum.attr
import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.calls import Call
from mamba_attn.attribution.grids import cell_means
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.queries import Query
from mamba_attn.attribution.targets import Function, Target, scores_in, target_indices
from mamba_attn.attribution.token_occlusion import delete_each, partners, swap_each
from mamba_attn.core.outputs import Steps, follow
from mamba_attn.errors import nearest
from mamba_attn.tracing.texts import Embedded

_COLOURS = ("sum", "absolute")
_TOKENS = ("replace", "delete", "swap")
_WINDOWS = 8  # of the default occlusion, side by side along the shorter side


class Asked(NamedTuple):
    """Arguments for captum's methods.

    Args:
        images: a copy that requires gradients; of texts, their embeddings.
        target: as captum takes it; None if there is a function.
        function: the target, if it is a function of the model's output; it must see exactly these images.
        call: what else the model is called with.
        scores: the way to them in the model's output.
        words: the model that takes embeddings in the place of ids; None for images.
    """

    images: Tensor
    target: Any
    function: Function | None
    call: Call
    scores: Steps = ()
    words: Embedded | None = None

    @property
    def others(self) -> tuple[Any, ...] | None:
        """All arguments of the model but the images, as captum's ``additional_forward_args``; a text has its own."""
        if self.words is not None:
            return None
        return tuple(value for place, value in enumerate(self.call.args) if place != self.call.place) or None

    @property
    def together(self) -> tuple[Tensor, ...]:
        """All inputs that are explained, these images among them, each a copy that requires gradients."""
        if self.words is not None:
            return (self.images,)
        given = self.call.args[: len(self.call.explained)]
        return tuple(
            self.images if place == self.call.place else each.detach().clone().requires_grad_()
            for place, each in enumerate(given)
        )

    @property
    def further(self) -> tuple[Any, ...] | None:
        """What the model is called with after the inputs that are explained, as ``additional_forward_args``."""
        return None if self.words is not None else self.call.args[len(self.call.explained) :] or None

    def baselines(self, given: Any) -> Any:
        """Return captum's baselines; of texts, ids become their embeddings."""
        if self.words is None or given is None:
            return given
        ids = torch.as_tensor(given)
        if ids.is_floating_point():
            return given
        return self.words.of(ids.expand(self.images.shape[:2])).to(self.images)

    def forward(self, model: nn.Module) -> Callable[..., Tensor]:
        """Return a function of the images and ``others``: the scores, or what the target makes of the output."""
        words, place, named = self.words, int(self.call.place), self.call.kwargs
        if words is not None:
            return lambda x: self._scores(words.run(model, x))
        return lambda x, *others: self._scores(model(*others[:place], x, *others[place:], **named))

    def forward_together(self, model: nn.Module) -> Callable[..., Tensor]:
        """Return a function of all of the model's arguments in their order."""
        return self.forward(model) if self.words is not None else lambda *args: self._scores(model(*args))

    def _scores(self, output: Any) -> Tensor:
        return follow(output, self.scores) if self.function is None else self.function(output).reshape(-1)


class FromCaptum(MapAttribution):
    """One of captum's methods, for a target that is fixed before captum changes the images."""

    def _ask(self, images: Tensor, target: Target) -> Asked:
        """Fix the target: the class predicted for these images, not for a method's modified versions of them."""
        text, words = self._call.text, None
        with torch.inference_mode(False), torch.no_grad():
            copy = images.detach().clone()  # captum sets requires_grad, which inference tensors do not allow
            output = self._output(copy, target)
            if text is not None:
                words = Embedded(self.model, self._call.args, self._call.kwargs, copy)
                copy = words.values.clone()
            copy.requires_grad_()
            if callable(target) and not isinstance(target, Tensor):
                return Asked(copy, None, target, self._call, words=words)
            where = f"{self.called}.attribute"
            scores = scores_in(where, output, len(copy), target, text)
            indices = target_indices(where, follow(output, scores), target, len(copy), text)
            if indices.shape[1] == 0:  # one number per image: captum wants no target
                return Asked(copy, None, None, self._call, scores, words)
            tuples = [tuple(each) for each in indices.tolist()]
            # captum takes a tensor of classes, a list of tuples or, for one image, a tuple; it rejects a list of one
            chosen: Any = indices[:, 0] if indices.shape[1] == 1 else tuples if len(tuples) > 1 else tuples[0]
        return Asked(copy, chosen, None, self._call, scores, words)


class PixelsFromCaptum(FromCaptum):
    """One of captum's methods whose result has the images' shape.

    Args:
        model: any; with ``grid=True``, one that ``mamba_attn.trace`` supports, whose first layer gives the grid.
        colours: "sum" of the colours' signed numbers, or "absolute", the sum of their absolute values.

    Raises:
        ValueError: another ``colours``.
    """

    def __init__(self, model: nn.Module, colours: str = "sum") -> None:
        super().__init__(model)
        if colours not in _COLOURS:
            raise ValueError(
                f"{type(self).__name__}(colours={colours!r}): no such reduction. {nearest(colours, _COLOURS)}"
            )
        self.colours = colours

    @abstractmethod
    def _attributions(self, asked: Asked) -> Tensor:
        """Call captum and return its attributions."""

    def _reduced(self, attributions: Float[Tensor, "batch colours *size"]) -> Float[Tensor, "batch 1 *size"]:
        """Reduce the colours to one number per pixel, or a token's features to one."""
        values = attributions.abs() if self.colours == "absolute" else attributions
        return values.sum(1, keepdim=True)

    def _maps(
        self, images: Tensor, target: Target, query: Query | None, size: tuple[int, ...], grid: bool
    ) -> Float[Tensor, "batch 1 *size"]:
        asked = self._ask(images, target)
        with torch.inference_mode(False):
            found = self._attributions(asked).detach()
        if asked.words is not None:
            return self._reduced(found.mT)
        maps = self._reduced(found)
        return cell_means(maps, self._layouts(images)[0]) if grid else maps


class IntegratedGradients(PixelsFromCaptum):
    """captum's IntegratedGradients (arXiv 1703.01365); signed.

    Args:
        model: any.
        colours: "sum" of the signed numbers, whose total over the pixels is the logit minus that of the baseline; or
            "absolute", the sum of their absolute values.
        baselines: as captum takes them. Default: 0, the mean colour of normalised images. Of texts a token, or one for
            every id, whose embeddings they are, or embeddings; default: embeddings of 0.
        n_steps: steps of the integral.
        method: captum's name of the integration method.
        internal_batch_size: images times steps in one pass; at least the batch, and exactly that if the target is a
            function.
        multiply_by_inputs: False returns the mean gradient.

    Raises:
        ValueError: another ``colours``.

    Example:
        >>> IntegratedGradients(model, n_steps=2).attribute(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1, 224, 224])
    """

    options: ClassVar[Mapping[str, str]] = {
        each: each for each in ("baselines", "n_steps", "method", "internal_batch_size", "return_convergence_delta")
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        colours: str = "sum",
        baselines: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int = 32,
        multiply_by_inputs: bool = True,
    ) -> None:
        super().__init__(model, colours)
        self.baselines = baselines
        self.n_steps = n_steps
        self.method = method
        self.internal_batch_size = internal_batch_size
        self.multiply_by_inputs = multiply_by_inputs
        self.return_convergence_delta = False  # an argument of attribute only

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the gradient is multiplied by the inputs; captum asks."""
        return self.multiply_by_inputs

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return captum's: how far attributions in the inputs' shape (``expand=True``) are from adding up."""
        method = captum.attr.IntegratedGradients(self.model, multiply_by_inputs=self.multiply_by_inputs)
        delta: Tensor = method.compute_convergence_delta(*args, **kwargs)
        return delta

    def _attributions(self, asked: Asked) -> Tensor:
        size = len(asked.images) if asked.function is not None else max(self.internal_batch_size, len(asked.images))
        forward = asked.forward_together(self.model)
        method = captum.attr.IntegratedGradients(forward, multiply_by_inputs=self.multiply_by_inputs)
        # the path of several inputs goes from all baselines to all inputs at once
        inputs, place = asked.together, int(asked.call.place)
        with torch.enable_grad():
            found = method.attribute(
                inputs,
                asked.baselines(self.baselines),
                asked.target,
                asked.further,
                n_steps=self.n_steps,
                method=self.method,
                internal_batch_size=size,
                return_convergence_delta=self.return_convergence_delta,
            )
        if self.return_convergence_delta:
            found, self._delta = found
        chosen: Tensor = found[place]
        return chosen


class InputXGradient(PixelsFromCaptum):
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

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the gradient is multiplied by the inputs; captum asks."""
        return True

    def _attributions(self, asked: Asked) -> Tensor:
        found: Tensor = captum.attr.InputXGradient(asked.forward(self.model)).attribute(
            asked.images, asked.target, asked.others
        )
        return found


class Saliency(PixelsFromCaptum):
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

    options: ClassVar[Mapping[str, str]] = {"abs": "abs"}

    def __init__(self, model: nn.Module, *, colours: str = "sum", abs: bool = True) -> None:
        super().__init__(model, colours)
        self.abs = abs

    def _attributions(self, asked: Asked) -> Tensor:
        found: Tensor = captum.attr.Saliency(asked.forward(self.model)).attribute(
            asked.images, asked.target, abs=self.abs, additional_forward_args=asked.others
        )
        return found


class Occlusion(PixelsFromCaptum):
    """captum's Occlusion (arXiv 1311.2901): how much the target falls when a window is covered; signed.

    Every pixel gets the mean over the windows that cover it, averaged over colours, which are equal if a window covers
    all of them.

    Args:
        model: any.
        sliding_window_shapes: side of a square window over all colours in pixels, or captum's (colours, rows, columns).
            Default: an eighth of the image's shorter side; of texts one token.
        strides: pixels from window to window, or captum's (colours, rows, columns). Default: half a window.
        baselines: as captum takes them. Default: 0, the mean colour of normalised images. Of texts a token such as the
            unknown one, whose embedding takes a token's place; default: an embedding of 0.
        perturbations_per_eval: covered copies of the batch in one pass; one if the target is a function.
        tokens: what happens to the tokens of a text: "replace" puts ``baselines`` in their place, as captum does;
            "delete" leaves a token out, so that those behind it move up; "swap" puts another token of its kind in its
            place, so that the text stays like those that the model was trained on. The last two take one token at a
            time.
        kinds: for "swap": ids that may stand for each other, kind by kind, such as [range(16), range(16, 32)]. Each is
            swapped for the one half-way around its kind; tokens of no kind get 0.

    Raises:
        ValueError: another ``tokens``; "swap" without ``kinds``, a kind of one id, or an id of two kinds; when called,
            a function as target that returns a sum over several images; "delete" or "swap" of images, or of texts with
            a function as target.

    Example:
        >>> Occlusion(model, sliding_window_shapes=112, strides=112).attribute(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1, 224, 224])
    """

    options: ClassVar[Mapping[str, str]] = {
        each: each for each in ("sliding_window_shapes", "strides", "baselines", "perturbations_per_eval")
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        sliding_window_shapes: int | tuple[int, ...] | None = None,
        strides: int | tuple[int, ...] | None = None,
        baselines: Any = None,
        perturbations_per_eval: int = 1,
        tokens: str = "replace",
        kinds: Any = None,
    ) -> None:
        super().__init__(model)
        if tokens not in _TOKENS:
            raise ValueError(f"Occlusion(tokens={tokens!r}): no such mode. {nearest(tokens, _TOKENS)}")
        if (tokens == "swap") != (kinds is not None):
            raise ValueError(f"Occlusion(tokens={tokens!r}, kinds={kinds!r}): tokens='swap' and kinds= go together.")
        self.tokens = tokens
        self._others = {} if kinds is None else partners(kinds)
        self.sliding_window_shapes = sliding_window_shapes
        self.strides = strides
        self.baselines = baselines
        self.perturbations_per_eval = perturbations_per_eval

    def _attributions(self, asked: Asked) -> Tensor:
        if self.tokens != "replace":
            return self._without_each(asked)
        clean = asked.images.detach()
        window, strides = self._windows(clean, words=asked.words is not None)
        if asked.function and len(clean) > 1 and asked.forward(self.model)(clean, *(asked.others or ())).numel() == 1:
            raise ValueError(
                f"Occlusion.attribute(target={asked.function!r}): the function returned one number for {len(clean)} "
                "images; covering a window needs one of each, (batch,)."
            )
        found: Tensor = captum.attr.Occlusion(asked.forward(self.model)).attribute(
            clean,
            window,
            strides,
            asked.baselines(self.baselines),
            asked.target,
            asked.others,
            # a function expects the images of the batch, not several copies of them
            perturbations_per_eval=1 if asked.function else self.perturbations_per_eval,
        )
        return found

    def _without_each(self, asked: Asked) -> Float[Tensor, "batch tokens 1"]:
        if asked.words is None or asked.function is not None:
            what = "are for texts" if asked.words is None else "need the target as numbers, not as a function"
            raise ValueError(f"Occlusion(tokens={self.tokens!r}): 'delete' and 'swap' {what}.")
        call, ids = asked.call, asked.call.args[int(asked.call.place)]
        chosen = asked.target if isinstance(asked.target, list) else [asked.target]
        places = [each[0] for each in chosen] if isinstance(chosen[0], tuple) else None

        def run(change: Callable[[Tensor], Tensor]) -> Any:
            def changed(value: Any) -> Any:
                of_tokens = isinstance(value, Tensor) and value.shape[:2] == ids.shape
                return change(value) if of_tokens else value

            with torch.no_grad():
                return self.model(*map(changed, call.args), **{name: changed(v) for name, v in call.kwargs.items()})

        def score(output: Any, at: list[int] | None) -> Tensor:
            scores = follow(output, asked.scores)
            rows = torch.arange(len(ids), device=scores.device)
            if at is not None:
                columns = torch.tensor(at, device=scores.device)
                return scores[rows, columns, torch.tensor([each[1] for each in chosen], device=scores.device)]
            return scores.reshape(-1) if asked.target is None else scores[rows, asked.target.to(scores.device)]

        if self.tokens == "delete":
            return delete_each(run, score, ids, places)[..., None]
        return swap_each(run, score, ids, places, self._others)[..., None]

    def _windows(self, images: Tensor, *, words: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Captum's window and strides; of embeddings (batch, tokens, features), windows of tokens over all features."""
        window, strides = self.sliding_window_shapes, self.strides
        if words:
            features = images.shape[2]
            window = window if isinstance(window, tuple) else (window or 1, features)
            return window, strides if isinstance(strides, tuple) else (strides or 1, features)
        colours, *size = images.shape[1:]
        window = max(1, min(size) // _WINDOWS) if window is None else window
        if isinstance(window, int):
            window = (colours, window, window)
        if strides is None:
            return window, (colours, *(max(1, side // 2) for side in window[1:]))
        return window, (colours, strides, strides) if isinstance(strides, int) else strides

    def _reduced(self, attributions: Float[Tensor, "batch colours *size"]) -> Float[Tensor, "batch 1 *size"]:
        return attributions.mean(1, keepdim=True)
