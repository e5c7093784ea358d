"""Runs tasks: explains images with every method that lacks figures, and measures; no image can end the run."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from mamba_attn.core.transform import Transform
from mamba_attn.datasets.class_names import class_indices
from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.samples import Data, Sample
from mamba_attn.errors import NonFiniteError
from mamba_attn.evaluation import perturbation
from mamba_attn.evaluation.measures import JUDGES, Batch, answers, explainer
from mamba_attn.evaluation.plan import Needs, Task
from mamba_attn.evaluation.ranking import check_finite
from mamba_attn.evaluation.specs import FAILURES, LABEL, Model, reason_of
from mamba_attn.evaluation.store import Key

Record = tuple[Key, dict[str, Any]]


class Worker:
    """Runs tasks. Models and data are loaded once and kept as long as the worker.

    Args:
        data: collections that are open already, by selector.
    """

    def __init__(self, data: Mapping[str, Data] | None = None) -> None:
        self._data = dict(data or {})
        self._models: dict[Model, Model] = {}
        self._objects: dict[tuple[str, Model], dict[int, Tensor]] = {}

    def work(self, task: Task) -> list[Record]:
        """Run a task and return its lines; a failure becomes a line with the reason."""
        model = self._models.setdefault(task.model, task.model)  # the first of equal ones, which may be loaded
        if task.selector not in self._data:
            self._data[task.selector] = open_data(task.selector)
        data, task = self._data[task.selector], replace(task, model=model)
        where = task.selector, model
        if _locates(task) and where not in self._objects:
            self._objects[where] = _objects(data, model.subject.transform, task.options.others + 1)
        return _work(task, data, self._objects.get(where, {}))


def _locates(task: Task) -> bool:
    return any("localisation" in measures for its in task.needs.values() for measures in its.values())


def _objects(data: Data, transform: Transform, count: int) -> dict[int, Tensor]:
    """Return where the objects of a collection's first images are, by index; unreadable images are passed over."""
    found: dict[int, Tensor] = {}
    for index in data.chosen() if data.truth else ():
        if len(found) == count:
            break
        with suppress(*FAILURES, OSError):
            inside = data.load(index, transform).inside
            if inside is not None:
                found[index] = inside
    return found


def _work(task: Task, data: Data, objects: Mapping[int, Tensor]) -> list[Record]:
    subject = task.model.subject
    labels = class_indices(data, subject)
    samples: dict[int, Sample] = {}
    classes, lines = [], []
    for index in sorted({index for its in task.needs.values() for index in its}):
        try:
            explained = _explained(task, data, index, labels)
            samples[index] = data.load(index, subject.transform)
            classes.append(explained)
        except (*FAILURES, OSError) as error:
            lines += _failed(task, data, _restricted(task.needs, [index]), error)
    if not samples:
        return lines
    pixels = np.stack([sample.pixels for sample in samples.values()])
    images = subject.transform.normalise(pixels).to(subject.device)
    try:
        clean = perturbation.clean_answers(answers(task), images, task.options.fill, classes, subject)
    except FAILURES as error:
        if len(samples) == 1:
            return lines + _failed(task, data, _restricted(task.needs, list(samples)), error)
        parts = (replace(task, needs=_restricted(task.needs, [index])) for index in samples)
        return lines + [line for part in parts for line in _work(part, data, objects)]
    known = [None if sample.label is None else labels[sample.label] for sample in samples.values()]
    batch = Batch(task, list(samples), list(samples.values()), images, clean, known, objects)
    for method, needs in _restricted(task.needs, list(samples)).items():
        lines += _method(batch.part(list(needs)), data, method, needs)
    return lines


def _method(batch: Batch, data: Data, method: str, needs: Mapping[int, tuple[str, ...]]) -> list[Record]:
    """Return all lines of a method; a failing batch is retried image by image, to lose only the failing ones."""
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
    explain = explainer(method, batch)
    maps = explain(batch.task.model.subject.model)
    check_finite(maps)
    lines = []
    for measure in dict.fromkeys(name for names in needs.values() for name in names):
        chosen = [index for index in batch.indices if measure in needs[index]]
        place = [batch.indices.index(index) for index in chosen]
        lines += _judged(batch.part(chosen), maps[place], data, method, measure)
    return lines


def _judged(batch: Batch, maps: Tensor, data: Data, method: str, measure: str) -> list[Record]:
    """Return all lines of a measure; a failure keeps other measures, and images are retried one by one."""
    try:
        found = JUDGES[measure](batch, maps, method)
        _check_numbers(measure, found)
    except FAILURES as error:
        if len(batch.indices) == 1:
            return _failed(batch.task, data, {method: {batch.indices[0]: (measure,)}}, error)
        return [
            line
            for place, index in enumerate(batch.indices)
            for line in _judged(batch.part([index]), maps[[place]], data, method, measure)
        ]
    return [
        (_key(batch.task, data, index, method, measure), values)
        for index, values in zip(batch.indices, found, strict=True)
    ]


def _check_numbers(measure: str, lines: list[dict[str, Any]]) -> None:
    """Refuse NaN and Inf, which a store cannot hold."""
    try:
        json.dumps(lines, allow_nan=False)
    except ValueError as error:
        raise NonFiniteError(f"{measure}: a figure is NaN or Inf.") from error


def _explained(task: Task, data: Data, index: int, labels: Sequence[int | None]) -> int | None:
    """Return the class to explain; None for the predicted one.

    Raises:
        ValueError: the label was requested, but the image has none that the model knows.
    """
    if task.options.target != LABEL:
        return task.model.explained(task.options)
    label = data.items[index].label
    known = None if label is None else labels[label]
    if known is None:
        what = "it has no label" if label is None else f"{data.classes[label]!r} is no class of {task.model.name}"
        raise ValueError(f"{data.items[index].key}: {what}, so there is no target.")
    return known


def _restricted(needs: Needs, indices: Sequence[int]) -> Needs:
    """Return the needs of some of the images."""
    kept = {
        method: {index: measures for index, measures in its.items() if index in indices}
        for method, its in needs.items()
    }
    return {method: its for method, its in kept.items() if its}


def _failed(task: Task, data: Data, needs: Needs, error: BaseException) -> list[Record]:
    reason = reason_of(error)
    return [
        (_key(task, data, index, method, measure), {"error": reason})
        for method, its in needs.items()
        for index, measures in its.items()
        for measure in measures
    ]


def _key(task: Task, data: Data, index: int, method: str, measure: str) -> Key:
    identity = task.model.identity
    return Key(data.identity, data.items[index].key, identity, method, measure, task.options.of(measure))
