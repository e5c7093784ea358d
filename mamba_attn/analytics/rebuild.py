"""The model that a store was collected from, built again: as it was, with random weights, or scanning in another order.

A store names its model's builder and options. The rebuilt model must have the store's layers and grids and, unless it
is reordered, the same orders; otherwise it would be a control of another model.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mamba_attn import models
from mamba_attn.analytics.index import Index, StoredLayer
from mamba_attn.analytics.request import described
from mamba_attn.datasets.loaded_model import LoadedModel
from mamba_attn.errors import StoreError
from mamba_attn.models import registry
from mamba_attn.models.transforms import EvaluationTransform


def trained(folder: Path, index: Index) -> LoadedModel:
    """Return the model of a store with its weights.

    Args:
        folder: of the store.
        index: what it holds.

    Raises:
        StoreError: its weights are not in a file, or the file has changed.
        WeightsError: the file is gone.
    """
    about = index.model
    if not about["weights"]:
        raise StoreError(
            f"{folder}: it was collected from a {about['name']} that was made in memory, whose weights are "
            "in no file; trace that model itself."
        )
    subject = _subject(folder, index, about["weights"], about["options"])
    if subject.fingerprint != about["fingerprint"]:
        raise StoreError(
            f"{folder}: it was collected with weights {about['fingerprint']}, and {about['weights']!r} now "
            f"holds {subject.fingerprint}; collect again, into another folder."
        )
    return subject


def untrained(folder: Path, index: Index, seed: int) -> LoadedModel:
    """Return a model of the same architecture with random weights, as it is before training.

    Args:
        folder: of the store.
        index: what it holds; only the model's name and options are used, so a model made in memory works too.
        seed: of the weights.

    Raises:
        StoreError: the name is not a known model, or its options build one with other layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        subject = _subject(folder, index, "", index.model["options"])
    _require_layers(folder, index, subject, orders=True)
    return subject


def reordered(folder: Path, index: Index, order: str) -> LoadedModel:
    """Return the model with its weights, whose scans visit the patches in another order than it was trained in.

    Args:
        folder: of the store.
        index: what it holds.
        order: one of ``mamba_attn.orders.ORDERS``.

    Raises:
        StoreError: as ``trained``; or a model that scans in no order, such as a ViT.
        WeightsError: the weights' file is gone.
    """
    if not takes_order(index.model["name"]):
        raise StoreError(f"{folder}: a {index.model['name']} has no scan order to change.")
    trained(folder, index)  # the weights are those of the store
    subject = _subject(folder, index, index.model["weights"], {**index.model["options"], "order": order})
    _require_layers(folder, index, subject, orders=False)
    return subject


def takes_order(name: str) -> bool:
    """Whether a model of ``mamba_attn.models`` has the option ``order``."""
    return name in models.names() and "order" in inspect.signature(registry.builder(name)).parameters


def order_of(index: Index) -> str:
    """Return the name of the order that a store's model scans in; "" if it has none."""
    name = index.model["name"]
    return str(index.model["options"].get("order", "raster")) if takes_order(name) else ""


def _subject(folder: Path, index: Index, weights: str, options: dict[str, Any]) -> LoadedModel:
    name = str(index.model["name"])
    if name not in models.names():
        raise StoreError(f"{folder}: its model {name!r} is not one that mamba_attn.models builds.")
    try:
        model: nn.Module = models.create(name, weights=weights or None, **options)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{folder}: its options {options} build no {name}: {error}") from error
    return LoadedModel(name, model, list(index.classes), transform_of(index), weights, options)


def transform_of(index: Index) -> EvaluationTransform:
    """Return the transform from an image to the model's input."""
    size, cover = ((int(side[0]), int(side[1])) for side in (index.transform["size"], index.transform["cover"]))
    return EvaluationTransform(size, cover, str(index.transform["interpolation"]))


def _require_layers(folder: Path, index: Index, subject: LoadedModel, *, orders: bool) -> None:
    try:
        layers: Sequence[StoredLayer] = described(subject, [layer.name for layer in index.layers])
    except (RuntimeError, ValueError, LookupError) as error:
        raise StoreError(
            f"{folder}: {subject.name} with options {dict(subject.options)} is another model: {error}"
        ) from error
    same = len(layers) == len(index.layers) and all(
        own.same_as(its) if orders else (own.name, own.layout) == (its.name, its.layout)
        for own, its in zip(index.layers, layers, strict=True)
    )
    if not same:
        raise StoreError(
            f"{folder}: {subject.name} with options {dict(subject.options)} has other layers, grids or orders than the "
            "store's; its options were not recorded: pass options= to LoadedModel when you collect."
        )
