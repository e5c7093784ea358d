"""Texts to measure on: a file of them, a list, or those of a task; and what a tokenizer makes of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba_attn._types import Int
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.tasks import MAKERS, TaskTexts
from mamba_attn.errors import local_path
from mamba_attn.models.language import Vocabulary

TASKS = {"copying": "mamba_copy", "recall": "mamba_recall"}  # and the models that solve them
MANY = 100  # texts of a task where no number is given
_SEED = 7
_SELECTOR = f"expected a text file, one text per line, or one of {', '.join(TASKS)}"


@dataclass(frozen=True, eq=False)
class Texts:
    """A collection of texts, in order.

    Args:
        name: to display.
        identity: key of stored results.
        lines: the texts; empty for a task.
        task: the name of the task, or "".
    """

    name: str
    identity: str
    lines: Sequence[str] = ()
    task: str = ""

    def keys(self, limit: int | None) -> list[str]:
        """Return the names of the texts.

        Args:
            limit: at most this number. Default: all, or of a task as many as ``MANY``.
        """
        count = len(self.lines) if not self.task else MANY if limit is None else limit
        return [str(number) for number in range(count)][:limit]

    def of_task(self, count: int) -> TaskTexts:
        """Return the first texts of the task, the same whatever their number.

        Args:
            count: of them.
        """
        generator = torch.Generator().manual_seed(_SEED)
        each = [MAKERS[TASKS[self.task]](1, generator) for _ in range(count)]
        ids, answers, sources = (torch.cat([getattr(its, n) for its in each]) for n in ("ids", "answers", "sources"))
        return each[0]._replace(ids=ids, answers=answers, sources=sources)

    def fits(self, model: LoadedModel) -> bool:
        """Whether a model can read them: tasks are for the model that learnt them.

        Args:
            model: one that reads text.
        """
        return not self.task or model.spec == TASKS[self.task]


def open_texts(given: Any) -> Texts:
    """Return texts by what a user names.

    Args:
        given: the path of a text file, UTF-8, one text per line; "copying" or "recall", tasks of ``mamba_copy`` and
            ``mamba_recall``; or a list of texts.

    Raises:
        ValueError: no such file, not text, or empty.
    """
    if isinstance(given, Texts):
        return given
    if not isinstance(given, str):
        lines = [str(line) for line in given]
        return _of_lines("texts", "texts", lines, f"open_texts({lines!r})")
    path = local_path("data", given)
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"open_texts({given!r}): this file is not UTF-8 text; {_SELECTOR}.") from error
        return _of_lines(path.name, str(path.resolve()), lines, f"open_texts({given!r})")
    if given in TASKS:
        return Texts(given, f"{given}:{_SEED}", task=given)
    raise ValueError(f"open_texts({given!r}): no such file; {_SELECTOR}.")


def _of_lines(name: str, where: str, lines: Sequence[str], call: str) -> Texts:
    kept = [line.strip() for line in lines if line.strip()]
    if not kept:
        raise ValueError(f"{call}: it holds no text; {_SELECTOR}.")
    digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]
    return Texts(name, f"{where}:{digest}", kept)


def encode(tokenizer: Any, text: str) -> Int[Tensor, "1 tokens"]:
    """Return the ids of a text.

    Args:
        tokenizer: of transformers, or a ``Vocabulary``.
        text: any.
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer.encode(text)
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids


def decode(tokenizer: Any, ids: Int[Tensor, " tokens"]) -> list[str]:
    """Return the tokens of ids as they are read; arguments as in ``encode``."""
    if isinstance(tokenizer, Vocabulary):
        return tokenizer.decode(ids)
    return [read_token(tokenizer, int(number)) for number in ids]


def read_token(tokenizer: Any, number: int) -> str:
    """Return a token as it is read; byte-level and sentencepiece tokenizers mark the space before it.

    Args:
        tokenizer: of transformers.
        number: of the token.
    """
    piece = tokenizer.convert_ids_to_tokens(number)
    if piece is None:
        return f"<{number}>"  # the embedding has more rows than the tokenizer tokens
    space = " " if piece.startswith(("\u2581", "\u0120")) else ""
    text: str = tokenizer.decode([number])
    return text if text.startswith(" ") else space + text


def unknown_token(tokenizer: Any) -> int | None:
    """Return the id of the token that stands for what a tokenizer does not know; None where it has none.

    Args:
        tokenizer: of transformers, or a ``Vocabulary``.
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer.tokens.index("<unk>") if "<unk>" in tokenizer.tokens else None
    found: int | None = getattr(tokenizer, "unk_token_id", None)
    return found
