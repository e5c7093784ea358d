"""Perturbation: what a model still predicts when the cells that a map ranks first, or last, are removed.

Positive perturbation removes the highest cells first: accuracy should fall fast. Negative perturbation removes the
lowest first: accuracy should stay. After Chefer et al., CVPR 2021, in the form of Ali et al., 2403.01590: 10 to 90 % of
the image, each time from the clean one; "top" is agreement with the clean prediction, "target" with the label, over all
images, also those that the model gets wrong. Deviation from the published code: maps are averaged over the token
grid and its cells are ranked; ``cell=1`` ranks pixels as they do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mamba_attn._types import Bool, Float, Int
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.errors import NonFiniteError
from mamba_attn.evaluation import fills
from mamba_attn.evaluation.ranking import ranking, to_pixels
from mamba_attn.evaluation.token_drop import answers_without

TENTHS = range(1, 10)  # tenths of the cells to remove
DROP = "drop"
FILLS = (*fills.FILLS, DROP)
BATCH = 18  # perturbed images per forward: both signs of one image; more is no faster on a CPU
_WEIGHTS = np.array([0.05, *[0.1] * 7, 0.05])  # the trapezoid on 0.1 .. 0.9, not divided by its length
_WHOLE = np.array([0.05, *[0.1] * 9, 0.05])  # on 0 .. 1


@dataclass(frozen=True)
class Clean:
    """A model's answers to images before anything is removed, and to one without content.

    Args:
        predicted: the class with the highest probability.
        probability: of the explained class.
        blank: the same for an image of the fill alone.
        explained: the class that maps explain.

    Example:
        >>> answers = clean_answers(model, images)
        >>> bool((answers.predicted == answers.explained).all())
        True
    """

    predicted: Int[Tensor, " batch"]
    probability: Float[Tensor, " batch"]
    blank: Float[Tensor, " batch"]
    explained: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Perturbed:
    """The model's answers after removal, by image, sign (positive, negative) and tenths removed.

    Args:
        predicted: the class with the highest probability.
        probability: of the explained class.

    Example:
        >>> found = Perturbed(torch.zeros(1, 2, 9, dtype=torch.int64), torch.linspace(1, 0, 9).expand(1, 2, 9))
        >>> round(float(auc(found.probability[:, 0].numpy())[0]), 6)  # of the probability, as the highest cells go
        40.0
    """

    predicted: Int[Tensor, "batch 2 9"]
    probability: Float[Tensor, "batch 2 9"]


def clean_answers(
    model: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch 3 height width"],
    fill: str = "black",
    explained: Sequence[int | None] | None = None,
    subject: LoadedModel | None = None,
) -> Clean:
    """Run the model once on the images, and on the same without content; all methods share the answers.

    Args:
        model: returns logits.
        images: normalised.
        fill: as in ``perturb``.
        explained: class per image whose probability is followed; None for the predicted one.
        subject: whose transform and head count. Default: ImageNet's normalisation, softmax.

    Raises:
        ValueError: a class outside the model's.
        NonFiniteError: an answer of NaN or Inf.

    Example:
        >>> answers = clean_answers(model, images, explained=[3, None])
        >>> int(answers.explained[0]), answers.probability.shape
        (3, torch.Size([2]))
    """
    with torch.inference_mode():
        shown = None if subject is None else subject.transform
        chances = _chances(torch.cat([model(images), model(fills.blank(images, _pixels(fill), shown))]), subject)
    if not bool(chances.isfinite().all()):
        raise NonFiniteError("the model's answer contains NaN or Inf, so it predicts no class.")
    chances, without = chances.chunk(2)
    predicted, classes = chances.argmax(1), chances.shape[1]
    chosen = predicted.clone()
    for index, given in enumerate(explained or []):
        if given is not None and not 0 <= given < classes:
            raise ValueError(f"explained={given}: the model's classes are 0..{classes - 1}.")
        chosen[index] = predicted[index] if given is None else given
    probability, empty = (each.gather(1, chosen[:, None])[:, 0] for each in (chances, without))
    return Clean(predicted, probability, empty, chosen)


def perturb(
    model: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch 3 height width"],
    maps: Float[Tensor, "maps rows columns"],
    explained: Int[Tensor, " batch"],
    *,
    cell: int,
    seeds: Sequence[int] | None = None,
    fill: str = "black",
    batch: int = BATCH,
    subject: LoadedModel | None = None,
) -> Perturbed:
    """Remove 10 to 90 % of every image, highest cells first and lowest cells first, and run the model each time.

    Args:
        model: returns logits.
        images: normalised.
        maps: in pixels; higher is more important.
        explained: the class whose probability is followed.
        cell: side of a cell in pixels, ``token_cell`` of the model; 1 ranks pixels.
        seeds: of the order of equal cells, one per image. Default: 0, 1, ...
        fill: what stands in the place of removed cells, one of ``fills.filled``; or "drop": the tokens are left out, as
            in ``token_drop.answers_without``.
        batch: perturbed images per forward.
        subject: as in ``clean_answers``.

    Raises:
        ValueError: maps of another size than the images, an unknown fill, or "drop" of single pixels or with a model
            that is no module.
        NonFiniteError: NaN or Inf in a map, or in an answer.

    Example:
        >>> from mamba_attn import models
        >>> small, pictures = models.create("vim_digits", weights="demo"), torch.randn(1, 3, 64, 64)
        >>> found = perturb(small, pictures, torch.rand(1, 64, 64), torch.tensor([3]), cell=8)
        >>> found.probability.shape
        torch.Size([1, 2, 9])
    """
    if maps.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"perturb: expected a map per image in pixels, got {tuple(maps.shape)} for {tuple(images.shape)}."
        )
    seeds = range(len(maps)) if seeds is None else seeds
    shown, module = (None, model) if subject is None else (subject.transform, subject.model)
    if fill == DROP and (cell == 1 or not isinstance(module, nn.Module)):
        raise ValueError("fill='drop' leaves out tokens of a model: give the model itself, and cells of its tokens.")

    def answer(image: Tensor, gone: Tensor, seed: int) -> Tensor:
        if fill == DROP and isinstance(module, nn.Module):
            return answers_without(module, image.expand(len(gone), -1, -1, -1), gone, model)
        return model(fills.filled(image, gone, fill, shown, seed))

    order, answers = ranking(maps, cell, seeds), []
    with torch.inference_mode():
        for image, its, seed in zip(images, order, seeds, strict=True):
            gone = to_pixels(_removed(its), cell, (image.shape[1], image.shape[2])).flatten(0, 1)
            parts = [answer(image, part, seed) for part in gone.split(batch)]
            answers.append(_chances(torch.cat(parts), subject))
    chances = torch.stack(answers).unflatten(1, (2, len(TENTHS)))
    if not bool(chances.isfinite().all()):
        raise NonFiniteError("the model's answer to an image with cells removed contains NaN or Inf.")
    probability = chances.gather(3, explained.to(chances.device).view(-1, 1, 1, 1).expand(-1, *chances.shape[1:3], 1))
    return Perturbed(chances.argmax(3), probability.squeeze(3))


def _pixels(fill: str) -> str:
    """Return the fill of an image without content: dropping all tokens leaves nothing to run on."""
    return "mean" if fill == DROP else fill


def _chances(logits: Tensor, subject: LoadedModel | None) -> Tensor:
    return logits.float().softmax(1) if subject is None else subject.probabilities(logits)


def auc(accuracy: np.ndarray) -> np.ndarray:
    """Return the area under accuracies at 10 to 90 % removed, times 100: a trapezoid over 0.1 .. 0.9, so at most 80.

    Args:
        accuracy: (..., 9) in 0..1, or hits of single images: the area of a mean is the mean of the areas.

    Example:
        >>> float(auc(np.ones(9)))  # a model that never changes its mind
        80.0
    """
    return np.asarray(100 * (np.asarray(accuracy, dtype=np.float64) @ _WEIGHTS))


def deletion(probability: np.ndarray, clean: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Return the area under the probability as the highest cells are removed, 0 to 100 %: lower is better.

    After Petsiuk et al., RISE, BMVC 2018, in steps of 10 %.

    Args:
        probability: (..., 2, 9), as in ``Perturbed``.
        clean: (...), nothing removed.
        blank: (...), everything removed.

    Example:
        >>> probability = np.full((2, 9), 0.5)
        >>> round(float(deletion(probability, np.array(0.5), np.array(0.5))), 6)
        0.5
    """
    positive = probability[..., 0, :]
    return np.asarray(np.concatenate([clean[..., None], positive, blank[..., None]], -1) @ _WHOLE)


def insertion(probability: np.ndarray, clean: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Return the area under the probability as the highest cells are added to a blank image: higher is better.

    Inserting a fraction leaves the same image as negative perturbation by its complement, so nothing is computed twice.
    RISE begins with a blurred image; this one with the fill.

    Args:
        probability: (..., 2, 9), as in ``Perturbed``.
        clean: (...), nothing removed.
        blank: (...), everything removed.

    Example:
        >>> probability = np.full((2, 9), 0.5)
        >>> round(float(insertion(probability, np.array(0.5), np.array(0.5))), 6)
        0.5
    """
    negative = probability[..., 1, ::-1]
    return np.asarray(np.concatenate([blank[..., None], negative, clean[..., None]], -1) @ _WHOLE)


def _removed(order: Int[Tensor, " cells"]) -> Bool[Tensor, "2 9 cells"]:
    """Return which cells to remove: int(cells x fraction), as published, from the top and from the bottom."""
    place = order.argsort()
    counts = torch.tensor([len(order) * tenths // 10 for tenths in TENTHS], device=order.device)[:, None]
    return torch.stack([place < counts, place >= len(order) - counts])
