"""A model, or a mixer, of other people's code that ``dropin`` traces, and how it is built."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One model, or one mixer, of a repository.

    Args:
        class_name: of the module that is traced.
        variant: what sets it apart.
        make: builds it.
        shape: of its input.
        call: how it is run. Default: on its input alone.
        refused: a part of the sentence with which it must be refused; None when it must work.
        training: run it in training mode.
        noise: how far the parameters are moved, in units of a usual initial spread.
        maps: whether it is a whole model, of which maps over its input are asked for.
        orders: compare the order that is measured with the one that an adapter declares.
    """

    class_name: str
    variant: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Any] | None = None
    refused: str | None = None
    training: bool = False
    noise: float = 1.0
    maps: bool = True
    orders: bool = True


def build(case: Case) -> tuple[nn.Module, Tensor]:
    """The model, its parameters moved, and an input."""
    torch.manual_seed(0)
    model = case.make()
    model.train(case.training)  # a model's own may return nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = parameter.ndim < 2 or "A_log" in name or not parameter.numel()
            parameter.add_(case.noise * torch.randn_like(parameter) * (0.3 if plain else parameter[0].numel() ** -0.5))
    return model, torch.randn(case.shape)
