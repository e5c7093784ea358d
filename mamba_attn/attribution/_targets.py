"""What is explained: one number per image, chosen from a model's output by a class, indices or a function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_attn._types import Int

Function = Callable[[Any], Tensor]
Target = int | Tensor | tuple[int, ...] | Sequence[int] | Sequence[tuple[int, ...]] | Function | None

_DENSE = "target=(class, row, column) or whatever indexes it, a list of such tuples, or a function of the output"


def target_values(call: str, output: Any, target: Any, batch: int) -> Tensor:
    """Return what is explained of every image, (batch,), or its sum where a function returned a scalar.

    Args:
        call: the name of the caller, for the message.
        output: of the model.
        target: a class, one per image, a tuple of indices behind the batch's or a list of them, a function of the
            output; None for the predicted class.
        batch: number of images.

    Raises:
        ValueError: a target that does not fit the output.
    """
    if callable(target) and not isinstance(target, Tensor):
        return _called(call, target, output, batch)
    indices = target_indices(call, output, target, batch)
    chosen: Tensor = output[(torch.arange(batch, device=output.device), *indices.unbind(1))]
    return chosen


def target_indices(call: str, output: Any, target: Any, batch: int) -> Int[Tensor, "batch axes"]:
    """Return where in each image's output the explained number stands.

    Args:
        call: the name of the caller, for the message.
        output: of the model.
        target: as in ``target_values``, but no function.
        batch: number of images.

    Raises:
        ValueError: a target that does not fit the output.
    """
    where = f"{call}(target={target!r})"
    if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != batch:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{where}: the model returned {shape}, not one result for each of the {batch} images; give a function of "
            "the output, e.g. target=lambda output: output['scores'].sum()."
        )
    if target is None:
        if output.ndim != 2:
            raise ValueError(
                f"{where}: the model returned {tuple(output.shape)}, not (batch, classes), so there is no predicted "
                f"class; give {_DENSE}."
            )
        return output.argmax(1, keepdim=True)
    indices = _as_indices(where, target, batch).to(output.device)
    sizes = torch.tensor(output.shape[1:], device=output.device)
    if indices.shape[1] != len(sizes):
        raise ValueError(
            f"{where}: the model returned {tuple(output.shape)}, which needs {len(sizes)} indices behind the batch's, "
            f"not {indices.shape[1]}; give {_DENSE}."
        )
    if bool(((indices < 0) | (indices >= sizes)).any()):
        known = ", ".join(f"0..{size - 1}" for size in output.shape[1:])
        raise ValueError(f"{where}: expected {'class indices' if len(sizes) == 1 else 'indices'} in {known}.")
    return indices


def _as_indices(where: str, target: Any, batch: int) -> Int[Tensor, "batch axes"]:
    """The indices as the user meant them, whatever the output is."""
    tuples = [target] * batch if isinstance(target, tuple) else target
    if isinstance(tuples, list) and any(isinstance(each, tuple) for each in tuples):
        if len({len(each) if isinstance(each, tuple) else -1 for each in tuples}) > 1:
            raise ValueError(f"{where}: expected tuples of as many indices each.")
        found = _as_tensor(where, tuples)
    else:
        found = _as_tensor(where, tuples)
        if found.ndim == 0:
            found = found.expand(batch)
        found = found.unsqueeze(1)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{where}: expected a class index, or one per image, as integers.")
    if found.ndim != 2 or len(found) != batch:
        raise ValueError(f"{where}: expected one class index, or one for each of the {batch} images.")
    return found.long()


def _as_tensor(where: str, target: Any) -> Tensor:
    """The numbers; names and other things are none."""
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
