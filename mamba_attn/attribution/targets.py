"""What of a model's output is explained: the scores in it, and the value of a target there."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn._types import Int
from mamba_attn.attribution.texts import Text
from mamba_attn.core.outputs import Leaf, Steps, described, find_scores, follow, leaves

Function = Callable[[Any], Tensor]
Target = int | Tensor | tuple[int, ...] | Sequence[int] | Sequence[tuple[int, ...]] | Function | None

_DENSE = "target=(class, row, column) or whatever indexes it, a list of such tuples, or a function of the output"
_CLASS = 7  # in examples
_HEADS = ("head", "fc", "classifier")
_FEATURES = "last_hidden_state"


def scores_in(where: str, output: Any, batch: int, target: Any = None, text: Text | None = None) -> Steps:
    """Return the way to the scores in a model's output, as ``core.outputs.find_scores`` finds them.

    Of several that a model of texts returns, those that are called logits.

    Args:
        where: what the user wrote, for the message.
        output: a tensor, or tuples, lists, mappings and dataclasses of them.
        batch: number of images.
        target: as given, for the example in the message.
        text: what is known of the texts that the model was given, if it was.

    Raises:
        ValueError: no tensor has one result per image, or several have; a model of texts that returns features alone.
    """
    found, fitting = find_scores(output, batch)
    if text is not None:
        logits = [leaf for leaf in leaves(output) if leaf.steps and leaf.steps[-1][1] == "logits"]
        found = logits[0] if logits else found
        if found is not None and target is None and found.steps[-1:] == (("item", _FEATURES),):
            raise ValueError(
                f"{where}: the model returned {described(output)}: features, and no scores of tokens, so there is no "
                "most likely one; trace the model with its head (AutoModelForCausalLM), or explain a feature, "
                "target=(position, feature)."
            )
    if found is not None:
        return found.steps
    what = "several of these have" if fitting else "it does not have"
    raise ValueError(
        f"{where}: the model returned {described(output)}; {what} one result for each of the {batch} images. "
        "Give a function of the output that picks one number per image, e.g. "
        f"target={_example(output, fitting, target)}."
    )


def target_values(call: str, output: Any, target: Any, batch: int, text: Text | None = None) -> Tensor:
    """Return the target value of every image, (batch,), or their sum if a function returned a scalar.

    Args:
        call: the name of the caller, for the message.
        output: of the model.
        target: a class, one per image, a tuple of indices after the batch's or a list of them, a function of the
            output; None for the predicted class, or the only number of each image.
        batch: number of images.
        text: what is known of the texts that the model was given, if it was.

    Raises:
        ValueError: the output does not have the target.
    """
    if callable(target) and not isinstance(target, Tensor):
        return _called(call, target, output, batch)
    scores = follow(output, scores_in(f"{call}(target={target!r})", output, batch, target, text))
    indices = target_indices(call, scores, target, batch, text)
    chosen: Tensor = scores[(torch.arange(batch, device=scores.device), *indices.unbind(1))]
    return chosen


def target_indices(
    call: str, scores: Tensor, target: Any, batch: int, text: Text | None = None
) -> Int[Tensor, "batch axes"]:
    """Return the indices of the target value in each image's scores; none where each image has one number.

    Args:
        call: the name of the caller, for the message.
        scores: (batch, ...), of the model's output.
        target: as in ``target_values``, except a function.
        batch: number of images.
        text: as in ``target_values``; of scores (batch, tokens, vocabulary) it says what the target means.

    Raises:
        ValueError: the scores do not have the target.
    """
    where = f"{call}(target={target!r})"
    axes = scores.ndim - 1
    if text is not None and axes == 2:
        return text.indices(call, scores, target)
    if axes == 0:
        if target is not None and target != ():
            raise ValueError(f"{where}: the model returned one number per image; leave target out.")
        return torch.zeros(batch, 0, dtype=torch.long, device=scores.device)
    if target is None:
        if axes != 1:
            raise ValueError(
                f"{where}: the model returned {tuple(scores.shape)}, not (batch, classes), so there is no predicted "
                f"class; give {_DENSE}."
            )
        return scores.argmax(1, keepdim=True)
    indices = _as_indices(where, target, batch).to(scores.device)
    sizes = torch.tensor(scores.shape[1:], device=scores.device)
    if indices.shape[1] != len(sizes):
        raise ValueError(
            f"{where}: the model returned {tuple(scores.shape)}, which needs {len(sizes)} indices after the batch's, "
            f"not {indices.shape[1]}; give {_DENSE}."
        )
    if bool(((indices < 0) | (indices >= sizes)).any()):
        known = ", ".join(f"0..{size - 1}" for size in scores.shape[1:])
        raise ValueError(f"{where}: expected {'class indices' if len(sizes) == 1 else 'indices'} in {known}.")
    return indices


def require_classes(call: str, model: nn.Module, target: Any) -> None:
    """Refuse the predicted class of a backbone, which returns features.

    Args:
        call: the name of the caller, for the message.
        model: one without classes has ``num_classes`` 0 and an identity for its head, as timm's and ours.
        target: as given.

    Raises:
        ValueError: the target is None, and the model returns features.
    """
    if target is not None or getattr(model, "num_classes", None) != 0:
        return
    if any(isinstance(each, nn.Identity) and name.rpartition(".")[2] in _HEADS for name, each in model.named_modules()):
        raise ValueError(
            f"{call}(target=None): {type(model).__name__} has no classes (num_classes=0), so there is no predicted "
            "one; use a method that needs none (RawAttention, AttentionRollout), or explain a feature, e.g. "
            f"target={_CLASS}, or a function of the output, e.g. target=lambda output: output.norm(dim=1)."
        )


def _example(output: Any, found: Sequence[Leaf], target: Any) -> str:
    """A function that picks one number per image of an output, in the form that fits it."""
    if not found:
        return f"lambda output: output{'.sum()' if isinstance(output, Tensor) else f'.scores[:, {_CLASS}]'}"
    leaf = next((leaf for leaf in found if "logits" in leaf.code), found[0] if found[0].tensor.ndim == 2 else found[-1])
    sizes = leaf.tensor.shape[1:]
    wanted = target if isinstance(target, int) and not isinstance(target, bool) else _CLASS
    places = [min(max(wanted, 0), sizes[0] - 1), *(size // 2 for size in sizes[1:])] if sizes else []
    index = "".join(f", {place}" for place in places)
    return f"lambda output: {leaf.code}" + (f"[:{index}]" if index else "")


def _as_indices(where: str, target: Any, batch: int) -> Int[Tensor, "batch axes"]:
    """Return the indices as given, before they are checked against the scores."""
    tuples = [target] * batch if isinstance(target, tuple) else target
    if isinstance(tuples, list) and any(isinstance(each, tuple) for each in tuples):
        if len({len(each) if isinstance(each, tuple) else -1 for each in tuples}) > 1:
            raise ValueError(f"{where}: expected tuples with equally many indices.")
        found = _as_tensor(where, tuples)
    else:
        found = _as_tensor(where, tuples)
        if found.ndim == 0 or (isinstance(target, Tensor) and found.shape == (1,)):  # captum: one number for all
            found = found.expand(batch)
        found = found.unsqueeze(1)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{where}: expected a class index, or one per image, as integers.")
    if found.ndim != 2 or len(found) != batch:
        raise ValueError(f"{where}: expected one class index, or one for each of the {batch} images.")
    return found.long()


def _as_tensor(where: str, target: Any) -> Tensor:
    """Return the numbers as a tensor; refuse names and other things."""
    try:
        return torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: expected a class index, or one per image, as integers.") from error


def _called(call: str, function: Function, output: Any, batch: int) -> Tensor:
    found = function(output)
    if isinstance(found, Tensor) and found.is_floating_point() and found.shape in ((), (1,), (batch,)):
        return found
    what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(
        f"{call}(target={function!r}): the function returned {what}; expected a scalar, or one number for each of the "
        f"{batch} images, as a tensor."
    )
