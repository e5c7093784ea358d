"""The model that a store was collected from, built again: as it was, with random weights, or scanning in another order.

A store names its model's builder and options. The rebuilt model must have the store's layers and grids and, unless it
is reordered, the same orders; otherwise it would be a control of another model.
"""

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mamba_attn import models
from mamba_attn.analytics.index import Index, StoredLayer
from mamba_attn.analytics.request import described
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.loading import load
from mamba_attn.datasets.untrained import untrained as random_of
from mamba_attn.datasets.user_code import names_code
from mamba_attn.errors import StoreError
from mamba_attn.models import registry


def trained(folder: object, index: Index, given: LoadedModel | None = None) -> LoadedModel:
    """Return the model of a store with its weights.

    A function of a user's is not run because a store names it: the user must, who may not have made the store.

    Args:
        folder: of the store.
        index: what it holds.
        given: the model, where the user has it.

    Raises:
        StoreError: its weights are not in a file, or the file has changed; it was made by code that is not named here.
        WeightsError: the file is gone.
    """
    about, spec = index.model, spec_of(index)
    its = f"{about['name']} with weights {about['fingerprint']}"
    if given is not None:
        if given.fingerprint != about["fingerprint"]:
            raise StoreError(f"{folder}: it is of {its}, not of {given.name} with weights {given.fingerprint}.")
        return given
    if names_code(spec):
        weights = f" and weights={about['weights']!r}" if about["weights"] else ""
        raise StoreError(
            f"{folder}: its model was built by code of yours, which runs only where you name it: give model={spec!r}"
            f"{weights} again; in Python, AttentionStore.open(path, model=...) takes what mamba_attn.load returns."
        )
    if not spec or not (about["weights"] or spec.startswith("hf:")):  # those of transformers are in its folder
        raise StoreError(
            f"{folder}: it was collected from a {about['name']} that was made in memory, whose weights are "
            "in no file; trace that model itself, or give it to AttentionStore.open(path, model=...)."
        )
    subject = _subject(folder, index, about["weights"] or None, about["options"])
    if subject.fingerprint != about["fingerprint"]:
        raise StoreError(
            f"{folder}: it was collected with weights {about['fingerprint']}, and {about['weights'] or spec!r} now "
            f"holds {subject.fingerprint}; collect again, into another folder."
        )
    return subject


def spec_of(index: Index) -> str:
    """Return what ``mamba_attn.load`` builds a store's model from; "" for one made in memory."""
    return str(index.model.get("spec", index.model["name"]))  # older stores name models of this package alone


def untrained(folder: object, index: Index, seed: int, given: LoadedModel | None = None) -> LoadedModel:
    """Return a model of the same architecture with random weights, as it is before training.

    Args:
        folder: of the store.
        index: what it holds; only the model's name and options are used, so a model made in memory works too.
        seed: of the weights.
        given: the model, where the user has it; code of theirs is called again only then.

    Raises:
        StoreError: the name is not a known model, or its options build one with other layers; what builds it cannot
            make an untrained one.
    """
    if given is not None and names_code(given.spec):
        try:
            subject = random_of(given, seed)
        except ValueError as error:
            raise StoreError(f"{folder}: {error}") from error
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            subject = _subject(folder, index, "random", index.model["options"])
    _require_layers(folder, index, subject, orders=True)
    return subject


def with_weights(folder: object, index: Index, weights: str | Path) -> LoadedModel:
    """Return a model of the same architecture and options with other weights, as of another seed of training.

    Args:
        folder: of the store.
        index: what it holds; only the model's name and options are used.
        weights: the file.

    Raises:
        StoreError: the name is not a known model, or its options build one with other layers.
        WeightsError: the file is not there, or not of this model.
    """
    subject = _subject(folder, index, str(weights), index.model["options"])
    _require_layers(folder, index, subject, orders=True)
    return subject


def reordered(folder: object, index: Index, order: str) -> LoadedModel:
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


def _subject(folder: object, index: Index, weights: str | None, options: dict[str, Any]) -> LoadedModel:
    spec = spec_of(index) or str(index.model["name"])
    if spec not in models.names() and not spec.startswith(("timm:", "hf:")):
        raise StoreError(f"{folder}: its model {spec!r} is not one that mamba_attn.models builds.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was adapted was said when it was collected
            subject = load(spec, weights, classes=index.classes, **options)
    except (TypeError, ValueError) as error:
        raise StoreError(f"{folder}: its options {options} build no {spec}: {error}") from error
    subject.transform, subject.head = transform_of(index), str(index.model.get("head", "softmax"))
    return subject


def transform_of(index: Index) -> Transform:
    """Return the transform from an image to the model's input."""
    return Transform.from_dict(index.transform)


def _require_layers(folder: object, index: Index, subject: LoadedModel, *, orders: bool) -> None:
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
