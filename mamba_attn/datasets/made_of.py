"""What a loaded model is made of: its traced layers and their kinds, from one pass of a blank image, remembered."""

from weakref import WeakKeyDictionary

from torch import nn

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.layer_kinds import SOFTMAX, layer_kinds
from mamba_attn.tracing.undisturbed import undisturbed

_layers: "WeakKeyDictionary[nn.Module, dict[str, str]]" = WeakKeyDictionary()


def traced_layers(model: LoadedModel) -> list[str]:
    """Return the names of the layers that a trace finds, first to last.

    Args:
        model: with its transform.

    Raises:
        UnsupportedModelError: it has none.
    """
    return list(_kinds(model))


def made_of(model: LoadedModel) -> list[str]:
    """Return the kinds of layers that a trace finds, "selective scans" and "softmax attention"; [] if there are none.

    Args:
        model: with its transform.
    """
    try:
        return list(dict.fromkeys(_kinds(model).values()))
    except UnsupportedModelError:
        return []


def is_transformer(model: LoadedModel) -> bool:
    """Whether all layers are softmax attention, as in a ViT.

    Args:
        model: with its transform.
    """
    return made_of(model) == [SOFTMAX]


def _kinds(model: LoadedModel) -> dict[str, str]:
    found = _layers.get(model.model)
    if found is None:
        with undisturbed(model.model, traced=True):
            blank = model.transform.blank().to(model.device)
            found = layer_kinds(model.model, lambda: model.model(blank), layout=model.layout)
        _layers[model.model] = found
    return found
