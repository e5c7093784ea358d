"""Computes every measure of a batch of maps, as lines for the store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn.datasets.samples import Sample
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.evaluation import perturbation, sanity
from mamba_attn.evaluation.cost import cost
from mamba_attn.evaluation.localisation import locate
from mamba_attn.evaluation.plan import Task
from mamba_attn.evaluation.ranking import cells, constant
from mamba_attn.evaluation.specs import build


@dataclass(frozen=True)
class Batch:
    """The readable images of a task, in the order of their indices.

    Args:
        task: the task.
        indices: of the images in their collection.
        samples: the images.
        images: normalised, on the model's device.
        clean: the model's answers.
        labels: the model's class for every label; None if it has none.
        objects: where the objects of the collection's first images are, by index.
    """

    task: Task
    indices: Sequence[int]
    samples: Sequence[Sample]
    images: Tensor
    clean: perturbation.Clean
    labels: Sequence[int | None]
    objects: Mapping[int, Tensor]

    @cached_property
    def cell(self) -> int:
        """Side of the cells that are ranked, in pixels."""
        rows, columns = self.images.shape[2:]
        return self.task.model.cell((rows, columns))

    def part(self, indices: Sequence[int]) -> "Batch":
        """Return some of the images."""
        place = [self.indices.index(index) for index in indices]
        clean = perturbation.Clean(*(getattr(self.clean, name)[place] for name in self.clean.__dataclass_fields__))
        samples, labels = [self.samples[one] for one in place], [self.labels[one] for one in place]
        return Batch(self.task, list(indices), samples, self.images[place], clean, labels, self.objects)


def explainer(method: str, batch: Batch) -> Callable[[nn.Module], Tensor]:
    """Return a function from a model to the method's maps of the batch, (batch, rows, columns)."""

    def explain(model: nn.Module) -> Tensor:
        with _seeded(batch.task.options.seed, batch.images.device):  # random methods draw the same numbers
            attribution = build(method, model, batch.task.model.subject.layout)
            maps: Tensor = attribution.attribute(batch.images, target=batch.clean.explained.clone()).detach().float()
        if maps.shape != (len(batch.images), 1, *batch.images.shape[2:]):
            raise ValueError(f"{method}: expected maps (batch, 1, rows, columns), got {tuple(maps.shape)}.")
        return maps[:, 0]

    return explain


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that a method on this device uses; restore the caller's afterwards."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else []):
        if on_gpu:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs
        yield


def _perturbed(batch: Batch, maps: Tensor, cell: int) -> list[dict[str, Any]]:
    task, clean = batch.task, batch.clean
    seeds = [task.options.seed * 1_000_003 + index for index in batch.indices]
    found = perturbation.perturb(
        answers(task),
        batch.images,
        maps,
        clean.explained,
        cell=cell,
        seeds=seeds,
        fill=task.options.fill,
        subject=task.model.subject,
    )
    flat = constant(maps).tolist()
    return [
        {
            "label": label,
            "predicted": int(clean.predicted[i]),
            "clean": _short(clean.probability[i]),
            "blank": _short(clean.blank[i]),
            "constant": flat[i],
            "answers": found.predicted[i].tolist(),
            "probability": [[_short(value) for value in sign] for sign in found.probability[i]],
        }
        for i, label in enumerate(batch.labels)
    ]


def _localised(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index, sample, values in zip(batch.indices, batch.samples, maps, strict=True):
        if sample.inside is None:
            found.append({"skipped": "it has no boxes and no mask"})
        else:
            others = [inside for other, inside in batch.objects.items() if other != index]
            found.append(
                locate(values, sample.inside, sample.distractor, others[: batch.task.options.others]).as_dict()
            )
    return found


def _sane(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    """Run the sanity checks: randomisation, another class, repeatability, alone and in a batch."""
    task, model = batch.task, batch.task.model.subject.model
    explain, coarse = explainer(method, batch), cells(maps, batch.cell)
    stages = sanity.randomisation(
        model, lambda changed: cells(explain(changed), batch.cell), coarse, task.options.stages, task.options.seed
    )
    other = perturbation.Clean(**{**vars(batch.clean), "explained": _second(batch)})
    elsewhere = explainer(method, Batch(**{**_fields(batch), "clean": other}))(model)
    again = sanity.difference(maps, explain(model))
    alone = [explainer(method, batch.part([index]))(model)[0] for index in batch.indices]
    batched = sanity.difference(maps, torch.stack(alone))
    labels = sanity.spearman(coarse, cells(elsewhere, batch.cell))
    return [
        {
            "randomised": [None if value is None else _short(value) for value in stages[i]],
            "other_class": labels[i],
            "again": again[i],
            "alone": batched[i],
        }
        for i in range(len(batch.indices))
    ]


def _costs(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    subject = batch.task.model.subject
    alone = [explainer(method, batch.part([index])) for index in batch.indices]
    return [vars(cost(partial(explain, subject.model), subject.device)) for explain in alone]


def _pictures(batch: Batch, maps: Tensor, method: str) -> list[dict[str, Any]]:
    """Return the map for the page, twice as fine as the ranked cells."""
    fine = cells(maps, max(1, batch.cell // 2))
    return [
        {"predicted": predicted, "map": [[float(f"{value:.4g}") for value in row] for row in each.tolist()]}
        for predicted, each in zip(batch.clean.predicted.tolist(), fine, strict=True)
    ]


JUDGES: dict[str, Callable[[Batch, Tensor, str], list[dict[str, Any]]]] = {
    "perturbation": lambda batch, maps, method: _perturbed(batch, maps, batch.cell),
    "pixels": lambda batch, maps, method: _perturbed(batch, maps, 1),
    "localisation": _localised,
    "sanity": _sane,
    "cost": _costs,
    "picture": _pictures,
}


def answers(task: Task) -> Callable[[Tensor], Tensor]:
    """Return the model's scores, in the precision of its answers."""
    subject = task.model.subject

    def scores(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=task.options.precision != "float32"):
            logits = subject.logits(images)
        if logits is None:
            raise UnsupportedModelError(f"{subject.name} predicts no classes, so there is nothing to measure.")
        return logits

    return scores


def _second(batch: Batch) -> Tensor:
    """Return the most probable class other than the explained one."""
    with torch.inference_mode():
        logits = answers(batch.task)(batch.images).float()
    hidden = logits.scatter(1, batch.clean.explained.to(logits.device)[:, None], -torch.inf)
    return torch.as_tensor(hidden.argmax(1)).clone()


def _fields(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def _short(value: float | Tensor) -> float:
    return round(float(value), 5)
