"""Explains a text: the next token or the class, strips of every method, matrices and rows, on one offline page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from mamba_attn.attribution import catalogue
from mamba_attn.attribution.spec import Method, method
from mamba_attn.attribution.targets import scores_in
from mamba_attn.attribution.texts import Text
from mamba_attn.core.document import render
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.outputs import follow
from mamba_attn.core.requirements import writable
from mamba_attn.datasets.texts import decode, encode, read_token
from mamba_attn.explanations.answer import at_depths
from mamba_attn.figures import png
from mamba_attn.figures.colours import limits
from mamba_attn.figures.picture import data_uri
from mamba_attn.models.language import Vocabulary
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.tracing.texts import takes
from mamba_attn.tracing.tracer import trace

_OF_SCANS = ("raw_attention", "attention_rollout", "mamba_attribution", "mamba_lrp", "frozen_contribution")
_OF_HYBRIDS = ("raw_attention", "attention_rollout", "frozen_contribution", "input_x_gradient")
_BEST = 10
_LABELS = 48  # along an axis; more do not fit
_SIDE = 340  # of a matrix, in pixels


@dataclass(frozen=True, eq=False)
class TextAnswer:
    """Results for one text.

    Args:
        subject: the model.
        words: the tokens as they are read.
        names: what the model chooses among, by number: tokens or classes.
        probabilities: of each after the last token.
        explained: the number that is explained.
        methods: of the strips.
        strips: one number per token, by method.
        matrices: attention, channels or heads averaged, (tokens, tokens) by layer.
        rows: what the last token reads in every layer, (layers, tokens).
        layers: names, first to last.
        softmax: which of them are softmax attention.
        unseen: names of modules that mix tokens and were not traced.

    Example:
        >>> import mamba_attn
        >>> found = explain_text(mamba_attn.load("mamba_copy", weights="demo"), "A . B . . C D . ? ?")
        >>> len(found.words), found.rows.shape[1]
        (10, 10)
    """

    subject: LoadedModel
    words: list[str]
    names: dict[int, str]
    probabilities: np.ndarray
    explained: int
    methods: list[Method]
    strips: dict[str, np.ndarray]
    matrices: dict[str, np.ndarray]
    rows: np.ndarray
    layers: list[str]
    softmax: list[str]
    unseen: list[str]

    @property
    def target(self) -> str:
        """What is explained, as it is read."""
        return self.names[self.explained]

    def best(self) -> list[tuple[int, str, float]]:
        """The most likely, best first: number, as it is read, probability."""
        order = np.argsort(-self.probabilities, kind="stable")[:_BEST].tolist()
        return [(number, self.names[number], float(self.probabilities[number])) for number in order]


def explain_text(
    model: LoadedModel,
    text: str,
    out: str | Path | None = None,
    *,
    target: str | int | None = None,
    methods: Sequence[str] = (),
    command: str = "",
) -> TextAnswer:
    """Explain what a language model reads: its next token, strips, matrices; as the command ``explain`` does.

    Args:
        model: with its tokenizer, as ``mamba_attn.load("hf:FOLDER")`` returns it.
        text: to read.
        out: folder for index.html and text.npz. Default: nothing is written.
        target: the token after the text, as it is read (" Paris", with its space) or its id; of a classifier the class,
            by name or number. Default: the most likely.
        methods: names of attribution methods, with options after a colon. Default: those that suit the layers.
        command: what makes the page again.

    Returns:
        What was found.

    Raises:
        ValueError: a model that reads images or has no tokenizer, a text that is empty, a target that is several tokens
            or none, a method that does not fit.
        UnsupportedModelError: a model that cannot be traced.
        OSError: the folder cannot be written.

    Example:
        >>> import mamba_attn
        >>> found = explain_text(mamba_attn.load("mamba_copy", weights="demo"), "A . B . . C D . ? ?")
        >>> found.words[0].strip()
        'A'
    """
    if model.reads != "text":
        raise ValueError(f"explain_text({model.name}): this model reads images; use mamba_attn.explain(model, images).")
    if model.tokenizer is None:
        raise ValueError(
            f"explain_text({model.name}): there is no tokenizer next to the model; save the one that it was trained "
            "with there, tokenizer.save_pretrained(FOLDER), or give LoadedModel(tokenizer=)."
        )
    if not text.strip():
        raise ValueError(f"explain_text(text={text!r}): the text is empty; give at least one token.")
    folder = None if out is None else writable(str(out))
    ids = encode(model.tokenizer, text).to(model.device)
    options = {"use_cache": False} if takes(model.model, "use_cache") else {}
    with torch.no_grad(), trace(model.model, attention="mean") as record:
        output = model.model(ids, **options)
    chances = _chances(output, ids)
    names = _names(model, len(chances))
    explained = int(chances.argmax()) if target is None else _target(model, target, names)
    layers = list(record)
    softmax = [layer.name for layer in record.layers if not isinstance(layer, ScanLayer)]
    chosen = [method(name) for name in methods or _default(model, record.unseen_mixers, bool(softmax))]
    for each in chosen:
        refusal = catalogue.refusal(each.name, model.model, str(model.name))
        if refusal and not softmax:  # of hybrids it knows the adapters' half alone
            raise ValueError(f"methods={each.key!r}: {refusal}")
    strips = {each.key: each.build(model.model, None).attribute(ids, explained)[0].cpu().numpy() for each in chosen}
    with torch.no_grad():
        matrices = {name: record[name].attention()[0].float().cpu().numpy() for name in at_depths(layers)}
        rows = np.stack([layer.row(layer.tokens - 1)[0].float().cpu().numpy() for layer in record.layers])
    found = TextAnswer(
        model, decode(model.tokenizer, ids[0]), names, chances, explained, chosen, strips, matrices, rows, layers,
        softmax, record.unseen_mixers,
    )  # fmt: skip
    if folder is not None:
        (folder / "index.html").write_text(page(found, command), encoding="utf-8")
        arrays = {"ids": ids[0].cpu().numpy(), "probabilities": chances, "rows": rows, "layers": np.array(layers)}
        arrays |= strips | {f"attention.{name}": matrix for name, matrix in matrices.items()}
        np.savez_compressed(folder / "text.npz", **arrays)  # type: ignore[arg-type]
    return found


def page(answer: TextAnswer, command: str = "") -> str:
    """Return the page of a text as HTML.

    Args:
        answer: what was found.
        command: what makes it again.
    """
    from mamba_attn.figures.text import tokens

    def strip(each: Method) -> Markup:
        values = answer.strips[each.key]
        about = f"{values.min():.2g} to {values.max():.2g}"
        return Markup(tokens(answer.words, values, asked=-1, title=each.title, note=about))

    return render(
        "explain_text.html",
        title="".join(answer.words)[:_LABELS],
        answer=answer,
        command=command,
        strip=strip,
        shown=_shown,
        matrix=lambda values: labelled(values, answer.words, answer.words),
        grid=labelled(answer.rows, answer.layers, answer.words),
    )


def labelled(values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Markup:
    """Return a heat map as SVG, with names on its rows and columns; where many do not fit, every second or third.

    Args:
        values: (rows, columns).
        rows: names.
        columns: names.
    """
    names = [[_shown(name) for name in each] for each in (rows, columns)]
    wide, high = _SIDE, max(14 * min(len(rows), _LABELS), _SIDE if len(rows) == len(columns) else 0)
    left, above = (8 + 6.6 * min(max(map(len, each)), 24) for each in names)
    parts = [
        Markup('<image x="{:.0f}" y="{:.0f}" width="{}" height="{}" href="{}" preserveAspectRatio="none"/>').format(
            left, above, wide, high, data_uri(png.matrix_rgb(values, **limits(values)))
        )
    ]
    cell = {"rows": high / len(rows), "columns": wide / len(columns)}
    for number in range(0, len(rows), -(-len(rows) // _LABELS)):
        y = above + (number + 0.5) * cell["rows"] + 3.5
        parts.append(
            Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(
                left - 4, y, names[0][number][-24:]
            )
        )
    for number in range(0, len(columns), -(-len(columns) // (_LABELS // 2))):
        x = left + (number + 0.5) * cell["columns"] + 3.5
        parts.append(
            Markup('<text transform="translate({:.1f},{:.1f}) rotate(-90)">{}</text>').format(
                x, above - 4, names[1][number][:24]
            )
        )
    size = Markup('<svg class=labelled viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}">').format(
        left + wide + 4, above + high + 4
    )
    return size + Markup("").join(parts) + Markup("</svg>")


def _shown(word: str) -> str:
    """A token with what is not seen written out."""
    return word.replace("\n", "\u21b5").replace("\t", "\u21e5") if word.strip() else repr(word)


def _chances(output: Any, ids: Tensor) -> np.ndarray:
    """Probabilities of the next token, or of the classes."""
    text = Text(torch.ones_like(ids, dtype=torch.bool))
    logits = follow(output, scores_in("explain_text(target=None)", output, len(ids), None, text))
    last = logits[0, -1] if logits.ndim == 3 else logits[0]
    found: np.ndarray = last.float().softmax(-1).cpu().numpy()
    return found


def _names(model: LoadedModel, count: int) -> dict[int, str]:
    if model.classes and len(model.classes) == count:
        return dict(enumerate(model.classes))
    words = model.tokenizer
    if isinstance(words, Vocabulary):
        return {
            number: words.tokens[number] if number < len(words.tokens) else f"<{number}>" for number in range(count)
        }
    return _Read(words)


class _Read(dict[int, str]):
    """Tokens of a tokenizer by id, decoded when they are asked for."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, number: int) -> str:
        self[number] = read_token(self._tokenizer, number)
        return self[number]


def _target(model: LoadedModel, target: str | int, names: dict[int, str]) -> int:
    """The number of a token or class.

    Raises:
        ValueError: several tokens, or none.
    """
    if isinstance(target, int):
        return target
    if not isinstance(names, _Read):
        found = [number for number, name in names.items() if name == target or name == target.strip()]
        if not found:
            shown = ", ".join(list(names.values())[:8])
            raise ValueError(f"target={target!r}: no such token or class; there are {shown}, ...")
        return found[0]
    ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(repr(read_token(model.tokenizer, number)) for number in ids) or "none"
        raise ValueError(
            f"target={target!r}: this tokenizer makes {len(ids)} tokens of it ({pieces}), and one is explained; give "
            "the first, with the space before it if it begins a word, e.g. ' Paris'."
        )
    return int(ids[0])


def _default(model: LoadedModel, unseen: Sequence[str], hybrid: bool) -> list[str]:
    """Methods that suit the layers; those that multiply layers want all of them."""
    suiting = _OF_HYBRIDS if hybrid else _OF_SCANS
    return [name for name in suiting if not (unseen and name in ("attention_rollout", "mamba_attribution"))]
