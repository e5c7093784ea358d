"""Texts whose answers, and the tokens that these were copied from, are known."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamba_attn._types import Float, Int

DATA, NOISE, ASK = 16, 16, 17  # of copying: ids of data are those below 16
KEYS = 16  # of recall: ids below are keys, those above values
_STEP = 5  # from a token to the one that is put in its place


class TaskTexts(NamedTuple):
    """Texts with queries.

    Args:
        ids: of the tokens.
        queries: the positions of the queries.
        answers: ids, by text and query.
        sources: the position of the token that holds the answer.
        values: the first of the ids that answers are among.
    """

    ids: Int[Tensor, "batch tokens"]
    queries: Int[Tensor, " queries"]
    answers: Int[Tensor, "batch queries"]
    sources: Int[Tensor, "batch queries"]
    values: int


def copying(batch: int, generator: torch.Generator, data: int = 4, body: int = 20) -> TaskTexts:
    """Return data tokens scattered in noise, then asked for in their order: selective copying (2312.00752, sec. 4.1).

    Args:
        batch: number of texts.
        generator: of the random numbers.
        data: tokens of data.
        body: tokens before the queries.
    """
    ids = torch.full((batch, body), NOISE)
    sources = torch.rand(batch, body, generator=generator).argsort(1)[:, :data].sort(1).values
    answers = torch.randint(0, DATA, (batch, data), generator=generator)
    ids.scatter_(1, sources, answers)
    queries = torch.arange(body, body + data)
    return TaskTexts(torch.cat([ids, torch.full((batch, data), ASK)], 1), queries, answers, sources, 0)


def recall(batch: int, generator: torch.Generator, pairs: int = 8) -> TaskTexts:
    """Return pairs of a key and a value, then all keys, each of which asks for its value: associative recall.

    Args:
        batch: number of texts.
        generator: of the random numbers.
        pairs: of a key and a value.
    """
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(KEYS, 2 * KEYS, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs, generator=generator).argsort(1)
    ids = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
    queries = torch.arange(2 * pairs, 3 * pairs)
    return TaskTexts(ids, queries, values.gather(1, order), 2 * order + 1, KEYS)


MAKERS: dict[str, Callable[[int, torch.Generator], TaskTexts]] = {"mamba_copy": copying, "mamba_recall": recall}


@torch.no_grad()
def swapped(model: nn.Module, tasks: TaskTexts) -> Float[Tensor, "queries batch tokens"]:
    """Return what the answers' logits lose when a token is another of its kind: at its source alone if the truth holds.

    Args:
        model: (batch, tokens) to logits (batch, tokens, vocabulary).
        tasks: the texts; answers, and what may be swapped, are the ``DATA`` ids from ``tasks.values`` on.
    """
    low, device = tasks.values, next(model.parameters()).device

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(ids.to(device))[:, tasks.queries].gather(2, tasks.answers[..., None].to(device))
        return found[..., 0]

    plain, lost = logits(tasks.ids), []
    for place in range(tasks.ids.shape[1]):
        other = tasks.ids.clone()
        theirs = (other[:, place] >= low) & (other[:, place] < low + DATA)
        other[theirs, place] = low + (other[theirs, place] - low + _STEP) % DATA
        lost.append(plain - logits(other))
    return torch.stack(lost, 2).transpose(0, 1)


def source_ranks(values: Float[Tensor, "batch tokens"], tasks: TaskTexts, query: int) -> Float[Tensor, " batch"]:
    """Return the rank of the source among the tokens before a query, from 0; of tied tokens the mean.

    Args:
        values: of all tokens.
        tasks: the texts.
        query: its number.
    """
    place, source = int(tasks.queries[query]), tasks.sources[:, query, None]
    context = values[:, :place].double()
    own = context.gather(1, source)
    higher, tied = (context > own).sum(1), (context == own).sum(1) - 1
    return higher + tied / 2
