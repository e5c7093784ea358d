"""One task: explain some images with every method that lacks figures, and measure; nothing an image does ends the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mamba_attn import images as image_files
from mamba_attn.evaluation import _catalogue as catalogue
from mamba_attn.evaluation import perturbation, sanity
from mamba_attn.evaluation.cost import cost
from mamba_attn.evaluation.data import open_data
from mamba_attn.evaluation.labels import class_indices
from mamba_attn.evaluation.localisation import locate
from mamba_attn.evaluation.plan import LABEL, Model, Task
from mamba_attn.evaluation.ranking import cells, check_finite, constant, token_cell
from mamba_attn.evaluation.samples import Data, Sample
from mamba_attn.evaluation.store import Key

# what models, methods and images raise; captum asserts
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, AssertionError, MemoryError)
Record = tuple[Key, dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """Images of a task that could be read, in the order of their indices.

    Args:
        task: what is to be done.
        indices: of the images in their collection.
        samples: the images.
        images: normalised, on the model's device.
        clean: the model's answers.
        labels: the model's class of every label, None where it has none.
    """

    task: Task
    indices: Sequence[int]
    samples: Sequence[Sample]
    images: Tensor
    clean: perturbation.Clean
    labels: Sequence[int | None]

    @cached_property
    def cell(self) -> int:
        """Side of the cells that are ranked, in pixels."""
        return _cell(self.task.model, tuple(self.images.shape[2:]))

    def part(self, indices: Sequence[int]) -> "Batch":
        """Return some of the images."""
        place = [self.indices.index(index) for index in indices]
        clean = perturbation.Clean(*(getattr(self.clean, name)[place] for name in self.clean.__dataclass_fields__))
        chosen = ([each[one] for one in place] for each in (self.indices, self.samples, self.labels))
        numbers, samples, labels = chosen
        return Batch(self.task, numbers, samples, self.images[place], clean, labels)


def work(task: Task) -> list[Record]:
    """Do a task and return its lines; what fails is a line with the reason."""
    data = _data(task.selector)
    indices = sorted({index for its in task.needs.values() for index in its})
    samples, lines = {}, []
    subject = task.model.subject
    labels = class_indices(data, subject)
    for index in indices:
        try:
            samples[index] = data.load(index, subject.transform)
            _explained(task, data, index, labels)
        except (*FAILURES, OSError) as error:
            samples.pop(index, None)
            lines += _failed(task, data, {m: {index: its[index]} for m, its in task.needs.items() if index in its}, error)
    if not samples:
        return lines
    images = image_files.normalise(np.stack([sample.pixels for sample in samples.values()])).to(subject.device)
    classes = [_explained(task, data, index, labels) for index in samples]
    known = [None if sample.label is None else labels[sample.label] for sample in samples.values()]
    try:
        clean = perturbation.clean_answers(subject.model, images, task.options.fill, classes)
    except FAILURES as error:
        return lines + _failed(task, data, task.needs, error, samples)
    batch = Batch(task, list(samples), list(samples.values()), images, clean, known)
    for method, needs in task.needs.items():
        there = {index: measures for index, measures in needs.items() if index in samples}
        if there:
            lines += _method(batch.part(list(there)), data, method, there)
    return lines


def _method(batch: Batch, data: Data, method: str, needs: Mapping[int, tuple[str, ...]]) -> list[Record]:
    """All lines of a method; a batch that fails is tried again image by image, so that one does not cost the others."""
    try:
        lines = _measured(batch, data, method, needs)
    except FAILURES as error:
        if len(needs) == 1:
            return _failed(batch.task, data, {method: needs}, error)
        lines = []
        for index in needs:
            lines += _method(batch.part([index]), data, method, {index: needs[index]})
    return lines


def _measured(batch: Batch, data: Data, method: str, needs: Mapping[int, tuple[str, ...]]) -> list[Record]:
    explain = _explainer(method, batch)
    maps = explain(batch.task.model.subject.model)
    check_finite(maps)
    lines = []
    for measure in dict.fromkeys(name for names in needs.values() for name in names):
        chosen = [index for index in batch.indices if measure in needs[index]]
        place = [batch.indices.index(index) for index in chosen]
        found = _MEASURES[measure](batch.part(chosen), maps[place], method)
        for index, values in zip(chosen, found, strict=True):
            lines.append((_key(batch.task, data, index, method, measure), values))
    return lines


def _explainer(method: str, batch: Batch) -> Callable[[nn.Module], Tensor]:
    """The method's maps of the batch, (batch, rows, columns), by any model."""

    def explain(model: nn.Module) -> Tensor:
        torch.manual_seed(batch.task.options.seed)  # methods that draw draw the same
        attribution = catalogue.ENTRIES[method].build(model)
        maps = attribution.attribute(batch.images, target=batch.clean.explained.clone()).detach().float()
        if maps.shape != (len(batch.images), 1, *batch.images.shape[2:]):
            raise ValueError(f"{method}: expected maps (batch, 1, rows, columns), got {tuple(maps.shape)}.")
        return maps[:, 0]

    return explain


def _perturbed(batch: Batch, maps: Tensor, cell: int) -> list[dict[str, Any]]:
    task, clean = batch.task, batch.clean
    seeds = [task.options.seed * 1_000_003 + index for index in batch.indices]
    found = perturbation.perturb(
        task.model.subject.model, batch.images, maps, clean.explained, cell=cell, seeds=seeds, fill=task.options.fill
    )
    flat = constant(maps).tolist()
    return [
        {
            "label": label, "predicted": int(clean.predicted[i]), "clean": _short(clean.probability[i]),
            "blank": _short(clean.blank[i]), "constant": flat[i],
            "answers": found.predicted[i].tolist(),
            "probability": [[_short(value) for value in sign] for sign in found.probability[i]],
        }
        for i, label in enumerate(batch.labels)
    ]  # fmt: skip


def _localised(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for sample, values in zip(batch.samples, maps, strict=True):
        if sample.inside is None:
            found.append({"skipped": "it has no boxes"})
        else:
            found.append(locate(values, sample.inside, sample.trap).as_dict())
    return found


def _sane(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    """Randomisation, another class, the same again, alone and in a batch."""
    task, model = batch.task, batch.task.model.subject.model
    explain, coarse = _explainer(method, batch), cells(maps, batch.cell)
    stages = sanity.randomisation(
        model, lambda changed: cells(explain(changed), batch.cell), coarse, task.options.stages, task.options.seed
    )
    other = perturbation.Clean(**{**vars(batch.clean), "explained": _second(batch)})
    elsewhere = _explainer(method, Batch(**{**_fields(batch), "clean": other}))(model)
    again = sanity.difference(maps, explain(model))
    alone = [_explainer(method, batch.part([index]))(model)[0] for index in batch.indices]
    batched = sanity.difference(maps, torch.stack(alone))
    labels = sanity.spearman(coarse, cells(elsewhere, batch.cell))
    return [
        {"randomised": [None if value is None else _short(value) for value in stages[i]], "other_class": labels[i],
         "again": again[i], "alone": batched[i]}
        for i in range(len(batch.indices))
    ]  # fmt: skip


def _costs(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    model = batch.task.model.subject
    found = [
        cost(lambda one=batch.part([index]): _explainer(method, one)(model.model), model.device)  # type: ignore[misc]
        for index in batch.indices
    ]
    return [vars(each) for each in found]


def _pictures(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    """The map for the page: twice as fine as what is ranked."""
    fine = cells(maps, max(1, batch.cell // 2))
    return [{"map": [[float(f"{value:.4g}") for value in row] for row in each.tolist()]} for each in fine]


_MEASURES: dict[str, Callable[[Batch, Tensor, str], list[dict[str, Any]]]] = {
    "perturbation": lambda batch, maps, method: _perturbed(batch, maps, batch.cell),
    "pixels": lambda batch, maps, method: _perturbed(batch, maps, 1),
    "localisation": _localised,
    "sanity": _sane,
    "cost": _costs,
    "picture": _pictures,
}


def _second(batch: Batch) -> Tensor:
    """The likeliest class but the explained one."""
    with torch.inference_mode():
        logits = batch.task.model.subject.model(batch.images).float()
    hidden = logits.scatter(1, batch.clean.explained.to(logits.device)[:, None], -torch.inf)
    return hidden.argmax(1).clone()


def _explained(task: Task, data: Data, index: int, labels: Sequence[int | None]) -> int | None:
    """The class that is explained; None for the predicted one.

    Raises:
        ValueError: the label is asked for, and there is none that the model knows.
    """
    if task.options.target != LABEL:
        return task.model.explained(task.options)
    label = data.items[index].label
    known = None if label is None else labels[label]
    if known is None:
        what = "it has no label" if label is None else f"{data.classes[label]!r} is no class of {task.model.name}"
        raise ValueError(f"{data.items[index].key}: {what}, so that there is no target.")
    return known


def _failed(
    task: Task, data: Data, needs: Mapping[str, Mapping[int, tuple[str, ...]]], error: BaseException,
    only: Mapping[int, Any] | None = None,
) -> list[Record]:  # fmt: skip
    reason = (str(error).strip().partition("\n")[0] or type(error).__name__)[:400]
    return [
        (_key(task, data, index, method, measure), {"error": reason})
        for method, its in needs.items()
        for index, measures in its.items()
        if only is None or index in only
        for measure in measures
    ]


def _key(task: Task, data: Data, index: int, method: str, measure: str) -> Key:
    identity = task.model.identity
    return Key(data.identity, data.items[index].key, identity, method, measure, task.options.of(measure))


def _fields(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def _short(value: float | Tensor) -> float:
    return round(float(value), 5)


@cache
def _data(selector: str) -> Data:
    return open_data(selector)


@cache
def _cell(model: Model, size: tuple[int, int]) -> int:
    subject = model.subject
    return token_cell(subject.model, torch.zeros(1, 3, *size, device=subject.device))
