"""The model that a store was collected from, built again: as it was, with random weights, or scanning in another order.

A store names what built its model and with which options. Whatever is built here must have the layers that the store
holds, with their grids, and where nothing is reordered also their orders; else it would be another model's control.
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
        StoreError: its weights are in no file, or others are there now.
        WeightsError: they are gone.
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
            f"holds {subject.fingerprint}; collect anew, into another folder."
        )
    return subject


def untrained(folder: Path, index: Index, seed: int) -> LoadedModel:
    """Return a model of the same architecture with random weights, as it is before training.

    Args:
        folder: of the store.
        index: what it holds; of its model only the name and the options are needed, so that one made in memory will do.
        seed: of the weights.

    Raises:
        StoreError: its name builds no model here, or its options build one with other layers.
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
        WeightsError: its weights are gone.
    """
    if not takes_order(index.model["name"]):
        raise StoreError(f"{folder}: a {index.model['name']} scans in no order that could be changed.")
    trained(folder, index)  # the weights are those of the store
    subject = _subject(folder, index, index.model["weights"], {**index.model["options"], "order": order})
    _require_layers(folder, index, subject, orders=False)
    return subject


def takes_order(name: str) -> bool:
    """Whether a model of ``mamba_attn.models`` has the option ``order``."""
    return name in models.names() and "order" in inspect.signature(registry.builder(name)).parameters


def order_of(index: Index) -> str:
    """Name of the order that a store's model scans in; "" where it has none."""
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
    """Return what the model was shown of an image."""
    size, cover = ((int(side[0]), int(side[1])) for side in (index.transform["size"], index.transform["cover"]))
    return EvaluationTransform(size, cover, str(index.transform["interpolation"]))


def _require_layers(folder: Path, index: Index, subject: LoadedModel, *, orders: bool) -> None:
    try:
        layers: Sequence[StoredLayer] = described(subject, [layer.name for layer in index.layers])
    except (RuntimeError, ValueError, LookupError) as error:
        raise StoreError(f"{folder}: {subject.name} with options {dict(subject.options)} is another model: {error}"
                         ) from error  # fmt: skip
    same = len(layers) == len(index.layers) and all(
        own.same_as(its) if orders else (own.name, own.layout) == (its.name, its.layout)
        for own, its in zip(index.layers, layers, strict=True)
    )
    if not same:
        raise StoreError(
            f"{folder}: {subject.name} with options {dict(subject.options)} has other layers, grids or orders than the "
            "store's; its options were not recorded: pass options= to LoadedModel when you collect."
        )
