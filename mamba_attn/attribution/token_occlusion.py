"""What a target loses without each token of a text: left out, or swapped for another of its kind."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mamba_attn._types import Float, Int

Score = Callable[[Any, list[int] | None], Tensor]  # of an output, and of the positions of the targets


def delete_each(
    run: Callable[[Callable[[Tensor], Tensor]], Any],
    score: Score,
    ids: Int[Tensor, "batch tokens"],
    places: list[int] | None,
) -> Float[Tensor, "batch tokens"]:
    """Return what the target loses when a token is left out, and those behind it move up.

    The token at whose position the target is read stays, and gets 0.

    Args:
        run: calls the model, with every (batch, tokens, ...) tensor changed by a function.
        score: of what it returns.
        ids: of the texts.
        places: positions at which targets are read; None for scores of whole texts.

    Raises:
        ValueError: texts of one token.
    """
    batch, tokens = ids.shape
    if tokens < 2:
        raise ValueError("Occlusion(tokens='delete'): a text of one token has none to leave out.")
    plain, lost = score(run(lambda each: each), places), []
    for token in range(tokens):
        kept = [other for other in range(tokens) if other != token]
        moved = None if places is None else [max(0, place - (place >= token)) for place in places]
        change = plain - score(run(lambda each, kept=kept: each[:, kept]), moved)  # type: ignore[misc]
        read = torch.tensor([places is not None and places[text] == token for text in range(batch)])
        lost.append(change.masked_fill(read.to(change.device), 0))
    return torch.stack(lost, 1)


def swap_each(
    run: Callable[[Callable[[Tensor], Tensor]], Any],
    score: Score,
    ids: Int[Tensor, "batch tokens"],
    places: list[int] | None,
    others: dict[int, int],
) -> Float[Tensor, "batch tokens"]:
    """Return what the target loses when a token is another of its kind; those without a kind get 0.

    Args:
        run: as in ``delete_each``.
        score: of what it returns.
        ids: of the texts.
        places: as in ``delete_each``.
        others: what each id is swapped for.
    """
    plain, lost = score(run(lambda each: each), places), []
    for token in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, token] = torch.tensor([others.get(each, each) for each in ids[:, token].tolist()]).to(ids)
        if torch.equal(changed, ids):
            lost.append(torch.zeros_like(plain))
            continue
        swapped = run(lambda each, changed=changed: changed if each is ids else each)  # type: ignore[misc]
        lost.append(plain - score(swapped, places))
    return torch.stack(lost, 1)


def partners(kinds: Iterable[Iterable[int]]) -> dict[int, int]:
    """Return the id that each id is swapped for: the one half-way around its kind.

    Args:
        kinds: ids that may stand for each other, kind by kind.

    Raises:
        ValueError: a kind of one id, or an id of two kinds.
    """
    found: dict[int, int] = {}
    for kind in kinds:
        ids = [int(each) for each in kind]
        if len(set(ids)) < 2:
            raise ValueError(f"Occlusion(kinds=...): expected kinds of two ids or more, got {ids}.")
        twice = [each for each in ids if each in found or ids.count(each) > 1]
        if twice:
            raise ValueError(f"Occlusion(kinds=...): id {twice[0]} is listed twice; an id belongs to one kind.")
        found |= {each: ids[(place + len(ids) // 2) % len(ids)] for place, each in enumerate(ids)}
    return found
