"""What an adapter says of a variant that it does not treat; ``trace`` takes such a scan at its door."""

from torch import nn

from mamba_attn.tracing.adapters import find_mixers, require_supported


def adapters_refuse(model: nn.Module) -> None:
    """Raise what the adapter of the first refused mixer says."""
    for name, (module, adapter) in find_mixers(model).items():
        require_supported(name, module, adapter, model)
