"""Texts as inputs: which tokens of a batch of ids are real, and what a target and a query mean there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn._types import Bool, Int
from mamba_attn.attribution.queries import Query
from mamba_attn.tracing.texts import real_tokens

_TARGET = "target=token, for the last position of every text, or (position, token), or a list of one of them per text"


@dataclass(frozen=True, eq=False)
class Text:
    """What is known of a batch of texts.

    Args:
        real: which tokens are no padding.
    """

    real: Bool[Tensor, "batch tokens"]

    @classmethod
    def of(cls, call: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Text | None":
        """Return what a call of a model says of its texts; None if it has none.

        Args:
            call: the name of the caller, for the message.
            model: that is called.
            args: of the call.
            kwargs: of the call.

        Raises:
            ValueError: a text that is empty or all padding, or ids that the model does not have.
        """
        try:
            real = real_tokens(model, args, kwargs)
        except ValueError as error:
            raise ValueError(f"{call}: {error}") from None
        if real is None:
            return None
        empty = (~real.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"{call}(attention_mask): text {empty[0]} is all padding; leave it out of the batch.")
        return cls(real)

    @property
    def batch(self) -> int:
        """Number of texts."""
        return self.real.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of each text, padding included."""
        return self.real.shape[1]

    @property
    def last(self) -> list[int]:
        """The position of the last real token of every text."""
        found: list[int] = (self.tokens - 1 - self.real.flip(1).int().argmax(1)).tolist()
        return found

    def query(self, call: str, query: Any, target: Any) -> Query:
        """Return the position whose row is read in every text: what is asked for, else the target's.

        Args:
            call: the name of the caller, for the message.
            query: a position, one for all texts or one per text; those below 0 count from the last real token, -1.
            target: of ``attribute``, whose positions are the default.

        Raises:
            ValueError: something else, a position outside the text, or one of padding.
        """
        if query is not None:
            places = self._positions(f"{call}(query={query!r})", query)
        elif callable(target) or target is None:
            places = self.last
        else:
            places = self._asked(f"{call}(target={target!r})", target)[0]
        return Query("position", tuple((place,) for place in places))

    def indices(self, call: str, scores: Tensor, target: Any) -> Int[Tensor, "batch axes"]:
        """Return the indices of the target in each text's scores of tokens, (position, token).

        Args:
            call: the name of the caller, for the message.
            scores: (batch, tokens, vocabulary).
            target: None for the token that is the most likely after the last; as in ``attribute``.

        Raises:
            ValueError: scores of other positions than the texts have, or no such position or token.
        """
        where = f"{call}(target={target!r})"
        if scores.shape[1] != self.tokens:
            raise ValueError(
                f"{where}: the model returned {tuple(scores.shape)}, which are no scores of tokens at each of the "
                f"{self.tokens} positions; let it return all (logits_to_keep=0), or give a function of the output."
            )
        places, tokens = self._asked(where, target)
        rows = torch.tensor(places, device=scores.device)
        if tokens is None:
            named = scores.detach()[torch.arange(self.batch, device=scores.device), rows].argmax(-1)
        else:
            named = torch.tensor(tokens, device=scores.device)
        size = scores.shape[2]
        if bool(((named < 0) | (named >= size)).any()):
            raise ValueError(f"{where}: expected tokens in 0..{size - 1}; give {_TARGET}.")
        return torch.stack([rows, named], 1)

    def _asked(self, where: str, target: Any) -> tuple[list[int], list[int] | None]:
        """The target's positions and tokens; no tokens for the most likely."""
        if target is None:
            return self.last, None
        found = _plain(target)
        each = found if isinstance(found, list) else [found] * self.batch
        if len(each) == 1:
            each = each * self.batch
        if len(each) != self.batch:
            raise ValueError(f"{where}: {len(each)} targets for {self.batch} texts; give {_TARGET}.")
        if all(_is_number(one) for one in each):
            return self.last, each
        if not all(isinstance(one, tuple | list) and len(one) == 2 and all(map(_is_number, one)) for one in each):
            raise ValueError(f"{where}: expected numbers of tokens; give {_TARGET}.")
        return self._positions(where, [one[0] for one in each]), [one[1] for one in each]

    def _positions(self, where: str, given: Any) -> list[int]:
        """Positions, one per text, counted from the first token."""
        found = _plain(given)
        each = found if isinstance(found, list) else [found] * self.batch
        if len(each) != self.batch or not all(_is_number(one) for one in each):
            raise ValueError(f"{where}: expected a position, or a list of one for each of the {self.batch} texts.")
        places = []
        for text, (place, last) in enumerate(zip(each, self.last, strict=True)):
            index = place if place >= 0 else last + 1 + place
            if not 0 <= index < self.tokens or not bool(self.real[text, index]):
                first = int(self.real[text].int().argmax())
                raise ValueError(
                    f"{where}: text {text} has no token at position {place}; expected {first}..{last}, or -1 for the "
                    "last."
                )
            places.append(index)
        return places


def _plain(value: Any) -> Any:
    """Numbers, lists and tuples in the place of tensors and arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
