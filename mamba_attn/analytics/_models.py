"""The model of a store: what it is called, what it was shown, and the model itself, rebuilt."""

from functools import cached_property

from torch import nn

from mamba_attn.analytics import rebuild
from mamba_attn.analytics._names import Names
from mamba_attn.datasets.loaded_model import Subject
from mamba_attn.models.transforms import EvaluationTransform


class Models(Names):
    """The model of a store, by its names."""

    @property
    def model_name(self) -> str:
        """Name of the model, as ``mamba_attn.models.create`` takes it."""
        return str(self.index.model["name"])

    @property
    def classes(self) -> list[str]:
        """Names of the model's classes."""
        return list(self.index.classes)

    @property
    def transform(self) -> EvaluationTransform:
        """What the model was shown of an image."""
        return rebuild.transform_of(self.index)

    @cached_property
    def subject(self) -> Subject:
        """The model with its classes and transform, rebuilt from what the store says of it; see ``model``."""
        return rebuild.trained(self.folder, self.index)

    def untrained(self, seed: int = 0) -> Subject:
        """Return a model of the same name and options with random weights; its own weights are not needed.

        Args:
            seed: of the weights.

        Raises:
            StoreError: the name builds no model, or the options one with other layers.
        """
        return rebuild.untrained(self.folder, self.index, seed)

    def reordered(self, order: str) -> Subject:
        """Return the model with its weights, its scans in another order than it was trained in.

        Args:
            order: one of ``mamba_attn.orders.ORDERS``.

        Raises:
            StoreError: as ``model``; or a model that scans in no order.
            WeightsError: the weights are gone.
        """
        return rebuild.reordered(self.folder, self.index, order)

    def model(self) -> nn.Module:
        """Return the model, in eval mode.

        Raises:
            StoreError: its weights are in no file, or others are there now.
            WeightsError: they are gone.
        """
        return self.subject.model
