"""Effective receptive fields by gradients.

Features are what a model passes on: the last output after a layer that still holds all of its tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.attribution.lrp.linear_backward import holds_tokens, token_frame
from mamba_attn.attribution.queries import Query, make_query, query_tokens, split_query
from mamba_attn.core.layout import TokenLayout
from mamba_attn.erf.reach import Reach, ReachSum
from mamba_attn.errors import NonFiniteError, UnsupportedModelError
from mamba_attn.tracing.adapters import find_mixers
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_kinds import layer_kinds
from mamba_attn.tracing.layer_names import LayerName, layer_name
from mamba_attn.tracing.layers import Layer
from mamba_attn.tracing.tracer import trace

CLASS_TOKEN = "class"
SHARES = (0.2, 0.3, 0.5, 0.99)  # that arXiv 2203.06717 draws rectangles for
_SIGNS = ("positive", "absolute")


@dataclass(frozen=True)
class ReceptiveField:
    """The effective receptive field of one token.

    Args:
        gradient: (rows, columns) float64: mean over images of d(sum of positive features) / d(pixel), its positive part
            or absolute value, summed over colours.
        centre: (row, column) of the token's centre in pixels; of the image for a class token.
        layer: name of the layer whose tokens they are.
        reader: description of the token whose field it is.
        images: how many were averaged.
        skipped: numbers of the images that gave NaN or Inf.
        reach: how far attention alone reaches, if requested.

    Example:
        >>> field = receptive_field(model, images[:1], reach=False)
        >>> field.gradient.shape, field.images
        ((224, 224), 1)
    """

    gradient: np.ndarray
    centre: tuple[float, float]
    layer: str
    reader: str
    images: int
    skipped: list[int]
    reach: Reach | None

    def shown(self, power: float = 0.2) -> np.ndarray:
        """Return the field scaled for drawing, (rows, columns) in 0..1: to the power of 0.2, over the largest value.

        Args:
            power: exponent of the gradient.
        """
        drawn = self.gradient**power
        shown: np.ndarray = drawn / (drawn.max() or 1.0)
        return shown

    def rectangle(self, share: float) -> tuple[int, float]:
        """Return side and area of the smallest square around the token that holds more than a share of the field.

        Args:
            share: of the sum of all gradients, 0 to 1.

        Returns:
            The side in pixels, and the fraction of the image inside: the square ends at the image's edges. For a
            token in the middle of a square image these are the numbers of arXiv 2203.06717.

        Raises:
            ValueError: a share outside 0 <= share < 1, or a field that is zero everywhere.
        """
        total = float(self.gradient.sum())
        if not 0 <= share < 1 or not total:
            raise ValueError(f"rectangle(share={share}): expected 0 <= share < 1, and a field that is not zero.")
        away = self._away(np.maximum)
        order = np.argsort(away, axis=None, kind="stable")
        inside = np.cumsum(self.gradient.ravel()[order])
        reached = away.ravel()[order][min(int(np.searchsorted(inside, share * total, side="right")), away.size - 1)]
        return round(2 * float(reached) + 1), float((away <= reached).mean())

    @property
    def distance(self) -> float:
        """Mean distance from the token, in pixels, weighted by the field."""
        total = float(self.gradient.sum())
        return float((self.gradient * self._away(np.hypot)).sum() / total) if total else float("nan")

    def _away(self, norm: np.ufunc) -> np.ndarray:
        """Return the distance of the pixels' centres from the token's."""
        rows, columns = (
            np.abs(np.arange(n) + 0.5 - at) for n, at in zip(self.gradient.shape, self.centre, strict=True)
        )
        return np.asarray(norm(rows[:, None], columns[None]))

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Return all fields by their names in the .npz file, each after a prefix."""
        named = {
            "erf": self.gradient, "centre": np.array(self.centre), "images": np.array(self.images),
            "skipped": np.array(self.skipped, dtype=np.int64), "layer": np.array(self.layer),
            "distance": np.array(self.distance),
        }  # fmt: skip
        if self.reach is not None:
            reach = self.reach
            named |= {f"row.{name}": row for name, row in reach.rows.items()}
            named |= {
                "layers": np.array(reach.layers),
                "row_distance": np.array(list(reach.row_distance.values())),
                "mean_distance": np.array(list(reach.mean_distance.values())),
                "rollout_distance": np.array(reach.rollout_distance),
            }
            named |= {} if reach.rollout is None else {"rollout": reach.rollout}
        return {prefix + name: array for name, array in named.items()}


def receptive_field(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    query: Sequence[float] | str | None = None,
    *,
    pixel: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    layer: LayerName | None = None,
    sign: str = "positive",
    reach: bool = True,
    layout: AnyLayout | None = None,
    orders: AnyOrders | None = None,
) -> ReceptiveField:
    """Return the effective receptive field of a token (arXiv 1701.04128), as arXiv 2203.06717 and VMamba measure it.

    Per image: the positive features of the token are summed, and the positive part of that sum's gradient with respect
    to the pixels is summed over colours. Features are what the model passes on after its last layer, on any grid.
    Images with NaN or Inf are left out and counted.

    Args:
        model: a model that ``mamba_attn.trace`` supports; it is not changed.
        images: normalised, (batch, colours, rows, columns), all of one size, square or not; or several such batches.
        query: "class" for the class token. Deprecated: two numbers are a ``pixel``, four a ``box``.
        pixel: (row, column) in pixels, the same for all images. Default: the patch in the middle,
            (height // 2, width // 2).
        box: (x0, y0, x1, y1) in pixels, whose tokens' mean it is; the same for all images.
        layer: use this layer's block output; a name or number. Default: the last one.
        sign: of the gradient: "positive" part, as published, or its "absolute" value.
        reach: also measure how far attention reaches: distances per layer, and the rollout.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.

    Raises:
        ValueError: no images, images of several sizes, a pixel or box outside them, several places, no class token,
            an unknown sign.
        UnknownLayerError: no such layer.
        UnsupportedModelError: no output after the layer holds its tokens.
        NonFiniteError: every image gave NaN or Inf.
        TraceError: the tokens' place in the image is not known.

    Example:
        >>> field = receptive_field(model, images, pixel=(100, 40), reach=False)
        >>> field.gradient.shape
        (224, 224)
    """
    if sign not in _SIGNS:
        raise ValueError(f"receptive_field(sign={sign!r}): expected one of {_SIGNS}.")
    if isinstance(query, str) and (pixel is not None or box is not None):
        raise ValueError(f"receptive_field(query={query!r}, ...): give only one of query, pixel and box.")
    if not isinstance(query, str):
        pixel, box = split_query("receptive_field", query, pixel, box)
    given = {"layout": layout, "orders": orders}
    total = FieldSum(model, query if isinstance(query, str) else None, pixel, box, layer, sign, reach, given)
    for batch in [images] if isinstance(images, Tensor) else images:
        total.add(batch)
    return total.result()


@dataclass
class FieldSum:
    """Accumulates gradients and reach over images, batch by batch, or part by part.

    Args:
        model: as ``receptive_field``, like the others.
        named: "class", or None.
        pixel: (row, column), or None.
        box: (x0, y0, x1, y1), or None.
        layer: name or number; None for the last one.
        sign: of the gradient.
        reach: whether to measure how far attention reaches too.
        given: options of ``mamba_attn.trace``: layout and orders.
    """

    model: nn.Module
    named: str | None = None
    pixel: Any = None
    box: Any = None
    layer: LayerName | None = None
    sign: str = "positive"
    reach: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    gradient: Tensor | None = None
    used: int = 0
    seen: int = 0
    skipped: list[int] = field(default_factory=list)
    centre: tuple[float, float] = (0.0, 0.0)
    name: str = ""
    reader: str = ""
    attention: ReachSum | None = None

    def add(self, images: Tensor) -> None:
        """Add a batch of images."""
        size = self._size(images)
        if self.gradient is None:
            self.gradient = torch.zeros(size, dtype=torch.float64)
        gradients, tokens = self._gradients(images, size)
        finite = gradients.isfinite().flatten(1).all(1)
        self.skipped += [self.seen + number for number in (~finite).nonzero().flatten().tolist()]
        self.seen += len(images)
        self.used += int(finite.sum())
        self.gradient += gradients[finite].sum(0).cpu()
        if self.attention is not None and bool(finite.any()):
            self.attention.add(self.model, images[finite], tokens, self.name)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything that was added, for ``merge``."""
        found = {"seen": np.array(self.seen), "skipped": np.array(self.skipped, dtype=np.int64)}
        if self.gradient is not None:
            found |= {
                "gradient": self.gradient.numpy(), "used": np.array(self.used), "centre": np.array(self.centre),
                "name": np.array(self.name), "reader": np.array(self.reader),
            }  # fmt: skip
        reach = {} if self.attention is None or not self.attention.images else self.attention.arrays()
        return found | {f"reach {name}": each for name, each in reach.items()}

    def merge(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add what another sum of this model and token has of the images that come next.

        Args:
            arrays: of that one.
        """
        self.skipped += [self.seen + number for number in arrays["skipped"].tolist()]
        self.seen += int(arrays["seen"])
        if "gradient" in arrays:
            its = torch.from_numpy(arrays["gradient"])
            self.gradient = its if self.gradient is None else self.gradient + its
            self.used += int(arrays["used"])
            row, column = arrays["centre"].tolist()
            self.centre, self.name, self.reader = (row, column), str(arrays["name"]), str(arrays["reader"])
        reach = {name.removeprefix("reach "): each for name, each in arrays.items() if name.startswith("reach ")}
        if reach:
            if self.attention is None:
                self.attention = ReachSum(None, None if self.named is not None else self.centre, self.given)
            self.attention.merge(reach)

    def result(self) -> ReceptiveField:
        """Return the field averaged over images."""
        if self.gradient is None:
            raise ValueError("receptive_field(images): expected at least one image, got none.")
        if not self.used:
            raise NonFiniteError(
                f"receptive_field: all {self.seen} images gave NaN or Inf; check the images, the weights and the "
                "precision of the model."
            )
        reach = None if self.attention is None else self.attention.result()
        mean = (self.gradient / self.used).numpy()
        return ReceptiveField(mean, self.centre, self.name, self.reader, self.used, self.skipped, reach)

    def _size(self, images: Tensor) -> tuple[int, int]:
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise ValueError(
                f"receptive_field(images{tuple(images.shape)} of {images.dtype}): expected normalised images (batch, "
                "colours, rows, columns)."
            )
        size = (images.shape[2], images.shape[3])
        if self.gradient is not None and size != tuple(self.gradient.shape):
            raise ValueError(
                f"receptive_field(images): {size[0]} x {size[1]} pixels after {self.gradient.shape[0]} x "
                f"{self.gradient.shape[1]}; fields of several sizes cannot be averaged."
            )
        return size

    def _gradients(self, images: Tensor, size: tuple[int, int]) -> tuple[Float[Tensor, "batch rows columns"], int]:
        """Return every image's gradient, with the chosen sign and summed over colours; the most tokens of a layer."""
        if not self.names:
            self.names = self._layer_names(images[:1])
        with torch.inference_mode(False), torch.enable_grad(), Features(self.model, self.layer, self.names) as features:
            pixels = images.detach().clone().requires_grad_()
            with trace(self.model, **self.given) as record:
                self.model(pixels)
                features.stop()
                layers = record.layers
                last = record[features.layer or layers[-1].name]
                tokens = self._tokens(last, size)
                chosen = features.of(last)[:, tokens]
                (gradient,) = torch.autograd.grad(chosen.relu().sum() / len(tokens), pixels)
        signed = gradient.clamp(min=0) if self.sign == "positive" else gradient.abs()
        # clamp turns -inf into finite numbers, and relu may drop NaN
        bad = ~(gradient.isfinite().flatten(1).all(1) & chosen.isfinite().flatten(1).all(1))
        summed = signed.double().sum(1)
        summed[bad] = float("nan")
        return summed, max(layer.tokens for layer in layers)

    def _layer_names(self, image: Tensor) -> list[str]:
        """The layers' names; at doors they are known when the model has run."""
        return list(layer_kinds(_unwrapped(self.model), lambda: self.model(image), **self.given))

    def _tokens(self, layer: Layer, size: tuple[int, int]) -> list[int]:
        """Return the query's tokens; at the first call, also set its place in pixels and its description."""
        layout = layer.layout
        asked = make_query("receptive_field", size, None, self.pixel, self.box)
        query, centre, reader = _place(layout, self.named, asked, size)
        if not self.name:
            self.name, self.reader = layer.name, reader
            self.centre = centre
        if self.reach and self.attention is None:
            self.attention = ReachSum(query, None if query is None else centre, self.given)
        elif self.attention is not None:
            self.attention.query = query  # which merged arrays do not have
        return query_tokens(layout, query)[0]


def _place(
    layout: TokenLayout, named: str | None, query: Query | None, size: tuple[int, int]
) -> tuple[Query | None, tuple[float, float], str]:
    """Return the query in pixels (None for the class token), its centre and its description."""
    if named is not None:
        if named != CLASS_TOKEN or not layout.class_tokens:
            what = f"expected {CLASS_TOKEN!r}" if named != CLASS_TOKEN else "there is no class token"
            raise ValueError(f"receptive_field(query={named!r}): {what}.")
        return None, (size[0] / 2, size[1] / 2), "the class token"
    if query is None:
        row, column = (n // 2 * layout.step + layout.centre for n in layout.grid)
        return Query("pixel", ((row, column),)), (row, column), "the patch in the middle"
    patches = layout.patches.tolist()
    places = [divmod(patches.index(token), layout.grid[1]) for token in query_tokens(layout, query)[0]]
    row, column = (float(np.mean(each)) * layout.step + layout.centre for each in zip(*places, strict=True))
    (place,) = query.places
    return query, (row, column), f"pixel {place[0]:g}, {place[1]:g}" if query.kind == "pixel" else "the marked box"


class Features:
    """Watches one forward pass of a model; nothing stays on it.

    After the last layer that is what a backbone returns: the last norm's output, if all tokens go through it.
    After an earlier one it is the output of its block, with the residual stream; of blocks that return several
    tensors of the same shape, as official Vim's with its residual apart, their sum.

    Args:
        model: the model; trace it in the same pass.
        layer: a layer's name, or its number. Default: the last one that runs.
        names: of the layers, as a trace has them. Default: of the mixers that adapters recognise.

    Raises:
        TypeError: neither a name nor a number.
        UnknownLayerError: no such mixer.
    """

    def __init__(self, model: nn.Module, layer: LayerName | None = None, names: Sequence[str] | None = None) -> None:
        self.model = model = _unwrapped(model)
        self.mixers = list(find_mixers(self.model)) if names is None else list(names)
        self.wanted = None if layer is None else layer_name(f"layer={layer!r}", layer, self.mixers)
        self.layer: str | None = None  # whose outputs are kept
        self._stopped = self._over = False
        self._outputs: list[tuple[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Watch the modules' outputs."""
        for name, module in self.model.named_modules():
            self._stack.callback(module.register_forward_hook(partial(self._after, name)).remove)
            if name in self.mixers:
                self._stack.callback(module.register_forward_pre_hook(partial(self._before, name)).remove)
        return self

    def stop(self) -> None:
        """Keep what has been seen: measuring the order of a layer's tokens calls the model again."""
        self._over = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def of(self, layer: Layer) -> Float[Tensor, "batch tokens features"]:
        """Return the features of the layer that was watched.

        Args:
            layer: the traced layer named by ``layer``.

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
            f"{type(self.model).__name__}: no module after {layer.name} returns its {layer.tokens} tokens; choose "
            "another layer=."
        )

    def _before(self, name: str, module: nn.Module, args: Any) -> None:
        if not self._over and self.wanted is not None and self.layer is not None:
            self._stopped = True

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._over:
            return
        if name in self.mixers and (self.wanted is None or name == self.wanted):
            self.layer, self._outputs = name, []
        if self.layer is not None and not self._stopped:
            self._outputs.append((name, output))


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else model


def _whole(layer: Layer, part: Any) -> bool:
    """Whether an output holds all tokens of the layer."""
    if not isinstance(part, Tensor) or not part.is_floating_point() or (part.ndim == 4 and not layer.has_layout):
        return False
    return holds_tokens(layer, part)
