"""Names what still trains in a model that is explained: its answer then changes from call to call."""

import warnings
from weakref import WeakSet

from torch import nn

_named: "WeakSet[nn.Module]" = WeakSet()
_SHOWN = 3
_RATES = ("p", "drop_prob", "drop_rate")  # of dropout, and of stochastic depth in timm's and in other code


def warn_of_training(model: nn.Module) -> None:
    """Warn, once per model, of modules in training mode that make its answer random or depend on the batch.

    Args:
        model: any; nothing in it is changed.

    Warns:
        UserWarning: dropout and stochastic depth with a rate above 0, and batch norms, by name.
    """
    if not model.training or model in _named:
        return
    found = [name or type(each).__name__ for name, each in model.named_modules() if each.training and _changes(each)]
    if not found:
        return
    _named.add(model)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    warnings.warn(
        f"{type(model).__name__} is in training mode, and {', '.join(found[:_SHOWN])}{more} change its answer from "
        "call to call; batch norms also learn from these images. Call model.eval() first.",
        stacklevel=3,
    )


def _changes(module: nn.Module) -> bool:
    kind = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if "Drop" not in kind and "StochasticDepth" not in kind:
        return False
    return any(bool(getattr(module, rate, 0)) for rate in _RATES)
