"""Steps: what measuring says of one call's steps, image by image, and how long it is remembered."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn._types import Int
from mamba_attn.core.layout import TokenLayout
from mamba_attn.errors import TraceError
from mamba_attn.tracing.frames import Measured, Place, agrees, measure
from mamba_attn.tracing.replay import Replay
from mamba_attn.tracing.selective_scans import ScanCall
from mamba_attn.tracing.softmax_calls import SoftmaxCall
from mamba_attn.tracing.undisturbed import settings, versions

_PAIR = 2  # images that are measured of a larger batch: enough to see whether orders differ, and how rows are laid


@dataclass(frozen=True, eq=False)
class Steps:
    """Which token every step of a call writes.

    Args:
        rows: the call's rows of every image, (images, rows each): windows and sub-grids may stand in the batch.
        order: (images or 1, rows each, groups, length); one for all images where theirs are alike; -1 for padding.
        tokens: size of the token frame.
        place: what was measured.
    """

    rows: Int[Tensor, "images each"]
    order: Int[Tensor, "_ each groups length"]
    tokens: int
    place: Place


@dataclass(frozen=True, eq=False)
class Found:
    """What is known of the scans of one forward pass.

    Args:
        steps: of every call; None where no tensor qualifies.
        measured: where they come from.
    """

    steps: list[Steps | None]
    measured: Measured


def steps_of(model: nn.Module, replay: Replay, calls: Sequence[ScanCall | SoftmaxCall]) -> Found | None:
    """Return the steps of the scans of a forward pass, measured or remembered; None if it runs another way now.

    They are remembered per model, shapes and settings of its modules, as long as another image has the same orders.
    When parameters have changed since, one weighted gradient says whether the orders still hold.

    Args:
        model: the model.
        replay: how it was called.
        calls: the scans that were seen.
    """
    batch = replay.batch
    small = replay if batch is None or batch <= _PAIR else replay.changed(lambda tensor: tensor[:_PAIR])
    key = (small.key, settings(model))
    remembered = _remembered.setdefault(model, {})
    now = versions(model)
    if key in remembered:
        then, measured = remembered[key]
        if then == now or agrees(model, small, measured):
            remembered[key] = (now, measured)
            return _for(measured, batch, calls)
        del remembered[key]
    measured = measure(model, small)
    found = _for(measured, batch, calls)
    alike = found is not None and all(each is None or len(each.order) == 1 for each in found.steps)
    if alike and (batch != 1 or agrees(model, small.changed(_another), measured)):
        remembered[key] = (now, measured)
        return found
    return _for(measure(model, replay), batch, calls) if small is not replay else found


_remembered: "weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Measured]]]" = weakref.WeakKeyDictionary()


def _another(image: Tensor) -> Tensor:
    """Another image of the same kind: the same numbers elsewhere."""
    if not image.is_floating_point() or image.ndim < 2:
        return image
    mixed = torch.randperm(image[0].numel(), generator=torch.Generator().manual_seed(11)).to(image.device)
    return image.flatten(1)[:, mixed].view(image.shape)


def _for(measured: Measured, batch: int | None, calls: Sequence[ScanCall | SoftmaxCall]) -> Found | None:
    """The steps of the calls that were seen, of so many images."""
    measured = _of_modules(measured, {call.module for call in calls})
    if [call.signature for call in calls] != measured.signatures:
        return None
    steps = [
        None if place is None else _by_image(place, call.rows, batch)
        for place, call in zip(measured.places, calls, strict=True)
    ]
    if any(place is not None and each is None for place, each in zip(measured.places, steps, strict=True)):
        return None
    return Found(steps, measured)


def _of_modules(measured: Measured, names: set[str]) -> Measured:
    """What was measured of some modules; adapters trace the others, whose scans are cut as well."""
    numbers = [i for i, signature in enumerate(measured.signatures) if signature[0] in names]
    now = {before: i for i, before in enumerate(numbers)}
    return replace(
        measured,
        signatures=[measured.signatures[i] for i in numbers],
        places=[measured.places[i] for i in numbers],
        chained={(now[a], now[b]) for a, b in measured.chained if a in now and b in now},
        nearest={now[i]: words for i, words in measured.nearest.items() if i in now},
    )


def _by_image(place: Place, rows: int, batch: int | None) -> Steps | None:
    """A place told by image; None if it was measured on fewer images and their rows are laid in no known way."""
    found = _told(place, rows, place.shape[0])
    measured = None if batch is None else batch if rows == len(place.order) else min(batch, _PAIR)
    if found is None and measured is not None and place.shape[0] % measured == 0:
        return _told(place, rows, measured)  # T holds every image as several rows
    return found


def _told(place: Place, rows: int, images: int) -> Steps | None:
    """A place told by image, where T holds so many."""
    order = place.order
    tokens = max(1, torch.Size(place.shape).numel() // (place.shape[place.axis] * images))
    of_row = torch.where(order >= 0, order // tokens, -1).flatten(1).amax(1)
    mixed = bool((torch.where(order >= 0, order // tokens, of_row[:, None, None]) != of_row[:, None, None]).any())
    if (
        mixed
        or len(order) % images
        or int(of_row.min()) < 0
        or bool((of_row.bincount(minlength=images) != len(order) // images).any())
    ):
        return None
    index = of_row.argsort(stable=True).view(images, -1)
    token = torch.where(order >= 0, order % tokens, -1)[index]
    if bool((token == token[:1]).all()):
        token = token[:1]
    if rows != len(order):
        each = index.shape[1]
        wanted = rows // each
        if rows % each or len(token) != 1:
            return None
        if torch.equal(index, torch.arange(len(order)).view(images, each)):
            index = torch.arange(rows).view(wanted, each)
        elif torch.equal(index, torch.arange(len(order)).view(each, images).T):
            index = torch.arange(rows).view(each, wanted).T
        else:
            return None
    return Steps(index, token, tokens, place)


def with_padding(order: Int[Tensor, "_ routes length"], tokens: int) -> tuple[Int[Tensor, "_ routes length"], int]:
    """Give steps that land nowhere tokens of their own, after those of the frame.

    Args:
        order: with -1 for such steps.
        tokens: size of the frame.

    Returns:
        The order, and the size of the frame.
    """
    nowhere = order < 0
    return torch.where(nowhere, tokens - 1 + nowhere.cumsum(-1), order), tokens + int(nowhere.sum(-1).max())


def read_behind(order: Int[Tensor, "_ routes length"], tokens: int) -> Int[Tensor, "_ routes length"]:
    """Return the tokens that steps read, each of which the step before writes; the first reads what no other does.

    Args:
        order: the token that each step writes.
        tokens: size of the frame.

    Raises:
        TraceError: more than one token is left for the first step.
    """
    rest = order[..., :-1]
    read = torch.zeros(*order.shape[:2], tokens + 1, dtype=torch.bool, device=order.device)
    read.scatter_(2, torch.where(rest < 0, tokens, rest), True)
    left = ~read[..., :-1]
    if bool((left.sum(-1) != 1).any()) or bool((rest < 0).any()):
        raise TraceError(
            "every step of this scan writes the token that the next one reads, as in Hydra, and which token the first "
            "reads is not known where there is padding; trace one sequence without padding."
        )
    return torch.cat([left.int().argmax(-1, keepdim=True), rest], -1)


def padded_layout(layout: TokenLayout | None, tokens: int) -> TokenLayout | None:
    """Return a layout with room for the tokens of padding, which are part of no map.

    Args:
        layout: without them.
        tokens: size of the frame with them.
    """
    if layout is None or tokens <= layout.tokens:
        return layout
    extra = layout.registers + tuple(range(layout.tokens, tokens))
    return replace(layout, registers=extra)
