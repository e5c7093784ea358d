"""Methods compared on texts: do they find the token an answer was copied from, what is lost without their tokens."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mamba_attn._types import Int
from mamba_attn.attribution.spec import method
from mamba_attn.attribution.targets import scores_in
from mamba_attn.attribution.texts import Text
from mamba_attn.core.outputs import follow
from mamba_attn.datasets.tasks import TaskTexts, source_ranks, swapped
from mamba_attn.datasets.texts import Texts, decode, encode, unknown_token
from mamba_attn.distributed import Ranks
from mamba_attn.evaluation.metrics import METRICS
from mamba_attn.evaluation.specs import FAILURES, Model, reason_of
from mamba_attn.evaluation.store import Key, Store
from mamba_attn.evaluation.summary import FEW, Table, compare
from mamba_attn.tracing.texts import takes

MEASURES = ("source", "tokens", "time")
UNKNOWN, DROP = "unknown", "drop"
SWAP = "swap within a kind"  # the check of the truth, next to the methods
_STEPS = 64  # of a text from whole to nothing; shorter texts go token by token
_TEXTS = 10  # explained at once
_EXAMPLES = 3  # texts that a page shows


class Example(NamedTuple):
    """One text, and what methods say of its tokens.

    Args:
        words: tokens as they are read.
        place: the number of the token whose prediction is explained.
        about: what is explained.
        values: by method, (tokens).
    """

    words: list[str]
    place: int
    about: str
    values: dict[str, np.ndarray]


@dataclass
class TextPlan:
    """A comparison on texts.

    Args:
        models: that read text.
        data: the texts.
        methods: keys, as ``choose_methods`` returns them.
        unasked: methods not named by the user, which may fit no model.
        measures: some of ``MEASURES``.
        fill: what removed tokens become: "unknown", the token for it, or where the tokenizer has none they are left
            out; "drop": they are left out.
        limit: texts per collection.
        seed: of all random numbers.
        notes: sentences about what was left out, and why.
        left: shares that other processes have not measured yet.
    """

    models: Sequence[Model]
    data: Sequence[Texts]
    methods: Sequence[str]
    unasked: Iterable[str] = frozenset()
    measures: Sequence[str] = MEASURES
    fill: str = UNKNOWN
    limit: int | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    left: int = 0

    @cached_property
    def pairs(self) -> list[tuple[Texts, Model]]:
        """Every collection with every model that can read it.

        Raises:
            ValueError: a model or a collection is in no pair; a model has no tokenizer.
        """
        found = [(texts, model) for texts in self.data for model in self.models if texts.fits(model.subject)]
        for model in self.models:
            if all(model is not its for _, its in found):
                raise ValueError(
                    f"data={[texts.name for texts in self.data]}: {model.name} did not learn these tasks; "
                    "give it a text file, one text per line."
                )
        for texts in self.data:
            if all(texts is not its for its, _ in found):
                raise ValueError(
                    f"data={texts.name!r}: only the model that learnt this task can be compared on it; add it."
                )
        for texts, model in found:
            if model.subject.tokenizer is None and not texts.task:
                raise ValueError(
                    f"models={model.name!r}: there is no tokenizer next to the model; save the one that it was trained "
                    "with there, tokenizer.save_pretrained(FOLDER), or give LoadedModel(tokenizer=)."
                )
        return found

    def measures_of(self, texts: Texts) -> list[str]:
        """Return the measures that suit a collection: sources are known of tasks alone, which lose no tokens.

        Args:
            texts: the collection.
        """
        return [name for name in self.measures if name != ("tokens" if texts.task else "source")]

    def key(self, texts: Texts, text: str, model: Model, name: str, measure: str) -> Key:
        """Return the store's key of a figure."""
        options = {"seed": self.seed, **({"fill": self.fill} if measure == "tokens" else {})}
        return Key(texts.identity, text, model.identity, name, measure, json.dumps(options))


def measure_texts(
    plan: TextPlan,
    store: Store,
    tell: Callable[[str, int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> list[Table]:
    """Measure everything that the store lacks, and return the tables.

    Args:
        plan: the comparison.
        store: existing results; every text adds to it.
        tell: is called with a name, how much is done, and of how much.
        ranks: this process among all that share the store. Default: alone.

    Raises:
        ValueError: a model or a method fits nothing; see ``TextPlan.pairs``.
        OSError: the store cannot be written.
    """
    return [_measured(plan, store, texts, model, tell, ranks or Ranks()) for texts, model in plan.pairs]


def _measured(
    plan: TextPlan,
    store: Store,
    texts: Texts,
    model: Model,
    tell: Callable[[str, int, int], None] | None,
    ranks: Ranks,
) -> Table:
    subject, keys, measures = model.subject, texts.keys(plan.limit), plan.measures_of(texts)
    work = _OfTask(plan, subject.model, texts.of_task(len(keys))) if texts.task else _Read(plan, model, texts)
    methods = _fitting(plan, model, work)
    shares = [(name, chunk) for name in [*methods, *work.checks] for chunk in work.chunks(keys)]

    def keys_of(name: str, chunk: Sequence[str]) -> list[Key]:
        return [plan.key(texts, key, model, name, measure) for key in chunk for measure in measures]

    def make(number: int) -> None:
        name, chunk = shares[number]
        if tell is not None:
            tell(f"{model.name}, {name}", number, len(shares))
        store.look([key for key in keys_of(name, chunk) if key not in store])
        lacking = [key for key in chunk if any(each not in store for each in keys_of(name, [key]))]
        if lacking:
            found = _tried(lambda part: work.lines(name, part), lacking)
            lines = [line.get(measure, line) for line in found for measure in measures]
            store.add(zip(keys_of(name, lacking), lines, strict=True))

    def missing() -> int:
        store.refresh()
        return sum(any(store.get(key) is None for key in keys_of(*share)) for share in shares)

    # a method that fails on one process alone makes its shares others: no counter of them is shared then
    work_name = f"{texts.identity} {model.identity} {' '.join(methods)}"
    plan.left += ranks.work(work_name, len(shares), make, missing)
    table = Table(texts, model, len(keys), work.accuracy)
    for measure in measures:
        lines = {
            name: {
                i: line for i, key in enumerate(keys) if (line := store.get(plan.key(texts, key, model, name, measure)))
            }
            for name in [*methods, *(work.checks if measure == "source" else [])]
        }
        good = {name: {i: line for i, line in its.items() if "error" not in line} for name, its in lines.items()}
        for metric in (each for each in METRICS.values() if each.measure == measure):
            if figures := compare(metric, good, range(len(keys)), plan.seed):
                table.figures[metric.name] = figures
        for name, its in lines.items():
            for line in its.values():
                if "error" in line:
                    reasons = table.failed.setdefault(name, {})
                    reasons[line["error"]] = reasons.get(line["error"], 0) + 1
    if len(keys) < FEW:
        table.flags.append(f"{len(keys)} texts order methods only where they differ a lot; use at least {FEW}.")
    table.flags += work.notes
    return table


def examples(plan: TextPlan, table: Table) -> list[Example]:
    """Return the first texts of a collection with the values of the methods measured on it, computed again.

    Args:
        plan: the comparison.
        table: one of its results.
    """
    if not isinstance(table.data, Texts):
        raise TypeError(f"examples(table of {type(table.data).__name__}): expected a table about texts.")
    texts, model, count = table.data, table.model, min(_EXAMPLES, table.images)
    work = _OfTask(plan, model.subject.model, texts.of_task(count)) if texts.task else _Read(plan, model, texts)
    measured = {name for figures in table.figures.values() for name in figures}
    methods = [name for name in plan.methods if name in measured]
    found = []
    for place in range(count):
        try:
            found.append(work.example(methods, place, model.subject.tokenizer))
        except FAILURES:
            continue  # the table says so
    return found


def _fitting(plan: TextPlan, model: Model, work: "_OfTask | _Read") -> list[str]:
    """Return the methods that run on the first text, and say what the others want.

    Raises:
        ValueError: a method that the user named does not.
    """
    found: list[str] = []
    reasons: dict[str, list[str]] = {}
    for name in plan.methods:
        try:
            work.attribute(name, [0])
        except FAILURES as error:
            reason = reason_of(error)
            if name not in plan.unasked:
                raise ValueError(f"methods={name!r}: {model.name}: {reason}") from error
            reasons.setdefault(reason, []).append(name)
        else:
            found.append(name)
    plan.notes += [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out of {model.name}: {reason}"
        for reason, names in reasons.items()
    ]
    return found


def _tried(work: Callable[[list[str]], list[dict[str, Any]]], keys: list[str]) -> list[dict[str, Any]]:
    """Return the lines of texts; a failing batch is tried text by text, to lose only the failing ones."""
    try:
        return work(keys)
    except FAILURES as error:
        if len(keys) == 1:
            return [{"error": reason_of(error)}]
        return [line for key in keys for line in _tried(work, [key])]


class _OfTask:
    """Ranks of the source of every query.

    Args:
        plan: of the comparison.
        model: that solves the tasks.
        tasks: all of the texts.
    """

    checks = (SWAP,)
    notes: Sequence[str] = ()

    def __init__(self, plan: TextPlan, model: nn.Module, tasks: TaskTexts) -> None:
        self._model, self._texts = model, tasks
        self._device = next(model.parameters()).device
        with torch.no_grad():
            answers = model(tasks.ids.to(self._device))[:, tasks.queries].argmax(-1).cpu()
        self.accuracy = float((answers == tasks.answers).float().mean())

    def chunks(self, keys: list[str]) -> list[list[str]]:
        """Return the texts that are explained at once."""
        return [keys[start : start + _TEXTS] for start in range(0, len(keys), _TEXTS)]

    def attribute(self, name: str, places: Sequence[int]) -> Tensor:
        """Return one value per token, (queries, texts, tokens)."""
        its = self._part(places)
        if name == SWAP:
            return swapped(self._model, its).cpu()
        built, found = method(name, "methods").build(self._model), []
        for query, place in enumerate(its.queries.tolist()):
            target = [(place, token) for token in its.answers[:, query].tolist()]
            found.append(built.attribute(its.ids.to(self._device), target, query=place if built.reads_rows else None))
        return torch.stack(found).detach().float().cpu()

    def lines(self, name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Return what is stored of texts, by measure."""
        places, start = [int(key) for key in keys], time.perf_counter()
        values = self.attribute(name, places)
        seconds, its = (time.perf_counter() - start) / len(keys), self._part(places)
        _require_finite(values)
        ranks = torch.stack([source_ranks(each, its, query) for query, each in enumerate(values)], 1)
        sizes = its.queries.tolist()
        return [{"source": {"ranks": each.tolist(), "sizes": sizes}, "time": {"seconds": seconds}} for each in ranks]

    def example(self, names: Sequence[str], place: int, tokenizer: Any) -> Example:
        """Return a text up to its first query."""
        its = self._part([place])
        end, source, answer = int(its.queries[0]), int(its.sources[0, 0]), its.answers[:, 0]
        words = decode(tokenizer, its.ids[0, : end + 1])
        about = (
            f"the answer {decode(tokenizer, answer)[0].strip()!r} to the outlined query; its source is token {source}"
        )
        return Example(
            words, end, about, {name: self.attribute(name, [place])[0, 0, : end + 1].numpy() for name in names}
        )

    def _part(self, places: Sequence[int]) -> TaskTexts:
        its, rows = self._texts, list(places)
        return its._replace(ids=its.ids[rows], answers=its.answers[rows], sources=its.sources[rows])


class _Read:
    """Probabilities while the tokens of a text are removed, those of the highest values first, then last.

    The prediction is explained: the class, or the token after the text. The last token, behind which it is read, stays.

    Args:
        plan: of the comparison.
        model: that reads the texts.
        texts: lines.
    """

    checks = ()
    accuracy = None

    def __init__(self, plan: TextPlan, model: Model, texts: Texts) -> None:
        self._subject, self._lines, self._seed = model.subject, texts.lines, plan.seed
        self._options = {"use_cache": False} if takes(self._subject.model, "use_cache") else {}
        self._fill = unknown_token(self._subject.tokenizer) if plan.fill == UNKNOWN else None
        if self._fill is None:
            why = "" if plan.fill == DROP else ", since its tokenizer has no token for what it does not know"
            self.notes = [f"removed tokens are left out{why}."]
        else:
            self.notes = [f"removed tokens become the tokenizer's unknown token, {self._fill}."]

    def chunks(self, keys: list[str]) -> list[list[str]]:
        """Return the texts one by one: they are of different lengths."""
        return [[key] for key in keys]

    def attribute(self, name: str, places: Sequence[int]) -> Tensor:
        """Return one value per token of one text, (tokens)."""
        return self._explained(name, self._ids(places[0]))[1]

    def lines(self, name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Return what is stored of one text, by measure."""
        ids, start = self._ids(int(keys[0])), time.perf_counter()
        explained, values = self._explained(name, ids)
        seconds = time.perf_counter() - start
        _require_finite(values)
        order = ranked(values[:-1], self._seed)
        first, last = (self._areas(ids, each, explained) for each in (order, order.flip(0)))
        return [{"tokens": {"first": first, "last": last}, "time": {"seconds": seconds}}]

    def example(self, names: Sequence[str], place: int, tokenizer: Any) -> Example:
        """Return a text, whose prediction is explained."""
        ids = self._ids(place)
        words = decode(tokenizer, ids[0].cpu())
        chances, classes = self._chances(ids)[0], self._subject.classes
        number = int(chances.argmax())
        own = classes is not None and len(classes) == len(chances)
        name = classes[number] if own else decode(tokenizer, torch.tensor([number]))[0]
        about = f"the prediction {name.strip()!r} behind the outlined token"
        return Example(words, len(words) - 1, about, {name: self._explained(name, ids)[1].numpy() for name in names})

    def _ids(self, place: int) -> Int[Tensor, "1 tokens"]:
        ids = encode(self._subject.tokenizer, self._lines[place])
        if ids.shape[1] < 3:
            raise ValueError(f"{self._lines[place]!r}: {ids.shape[1]} tokens; expected at least 3.")
        return ids.to(self._subject.device)

    def _explained(self, name: str, ids: Tensor) -> tuple[int, Tensor]:
        explained = int(self._chances(ids)[0].argmax())
        built = method(name, "methods").build(self._subject.model)
        return explained, built.attribute(ids, explained)[0].detach().float().cpu()

    @torch.no_grad()
    def _chances(self, ids: Tensor) -> Tensor:
        """Return the probabilities of the classes, or of the token after the text."""
        output = self._subject.model(ids, **self._options)
        text = Text(torch.ones_like(ids, dtype=torch.bool))
        logits = follow(output, scores_in("compare(target='predicted')", output, len(ids), None, text))
        return (logits[:, -1] if logits.ndim == 3 else logits).float().softmax(-1)

    def _areas(self, ids: Tensor, order: Tensor, explained: int) -> float:
        return area(lambda texts: self._chances(texts)[:, explained].cpu(), ids, order, self._fill)


def ranked(values: Tensor, seed: int) -> Tensor:
    """Return tokens by their values, highest first; tied ones in an order of no meaning.

    Args:
        values: (tokens).
        seed: of that order.
    """
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return shuffled[values[shuffled].argsort(descending=True, stable=True)]


def area(probability: Callable[[Tensor], Tensor], ids: Tensor, order: Tensor, fill: int | None) -> float:
    """Return the mean probability while tokens are removed in an order, from none to all that are in it.

    Args:
        probability: of texts (batch, tokens), (batch,).
        ids: (1, tokens) of the text.
        order: tokens, first to be removed first; the others stay.
        fill: the token in their place; None: they are left out.
    """
    counts = np.unique(np.linspace(0, len(order), min(len(order), _STEPS) + 1).round().astype(int))
    if fill is None:
        kept = (np.setdiff1d(np.arange(ids.shape[1]), order[:count].numpy()) for count in counts.tolist())
        values = torch.cat([probability(ids[:, torch.from_numpy(each)]) for each in kept])
    else:
        texts = ids.repeat(len(counts), 1)
        for row, count in enumerate(counts.tolist()):
            texts[row, order[:count]] = fill
        values = probability(texts)
    return float(torch.trapezoid(values.double(), torch.from_numpy(counts / len(order))))


def _require_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError("the map contains NaN or Inf.")
