"""What can be traced in a model: mixers that adapters recognise, and what may go through doors."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

from torch import nn

from mamba_attn.core.decisions import decided, somebody_listens
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing import patch_embedding
from mamba_attn.tracing.adapters import AnyAdapter, Seen, find_mixers, nothing_found
from mamba_attn.tracing.patching import watch_layout
from mamba_attn.tracing.reachable import Loaded, loaded_modules, reaches_a_door, reaches_attention
from mamba_attn.tracing.running import modules_of


class Traceable(NamedTuple):
    """What can be traced in a model.

    Args:
        model: without what wraps it for several devices.
        mixers: those that adapters recognise, by name.
        refused: why an adapter refuses a mixer, by its name, where its scans may go through a door.
        unnamed: whether layers are known only when they have run, at doors.
        at_doors: whether there may be any, also where an adapter turns out not to compute what it should.
        modules: the model's modules by name.
        loaded: the modules of code that are loaded.
    """

    model: nn.Module
    mixers: dict[str, tuple[nn.Module, AnyAdapter]]
    refused: dict[str, str]
    unnamed: bool
    at_doors: bool
    modules: dict[str, nn.Module]
    loaded: Loaded

    @property
    def known(self) -> dict[str, tuple[nn.Module, AnyAdapter]]:
        """The mixers that adapters compute."""
        return {name: mixer for name, mixer in self.mixers.items() if name not in self.refused}

    @property
    def adapted(self) -> set[nn.Module]:
        """These mixers."""
        return {module for module, _ in self.known.values()}

    def learn_layout(self, stack: ExitStack, seen: Seen) -> None:
        """Learn the token frame while the model runs, also from families of mixers that were not asked for."""
        families = dict.fromkeys(adapter for _, adapter in self.mixers.values())
        sources = [source for adapter in families for source in adapter.layout_sources(self.model)]
        own = sources or patch_embedding.layout_sources(self.model, self.modules.values())
        watch_layout(stack, self.modules, own, seen)


def find_traceable(model: nn.Module, adapters: Iterable[AnyAdapter] | None = None) -> Traceable:
    """Return what can be traced in a model.

    Args:
        model: as for ``trace``.
        adapters: as for ``trace``.

    Raises:
        UnsupportedModelError: nothing, a compiled model, copies on several devices.
    """
    model, modules = _unwrapped(model)
    mixers = find_mixers(model, adapters, modules)
    refused = {
        name: reason
        for name, (module, adapter) in mixers.items()
        if (reason := adapter.refusal(module, model)) and (reaches_a_door(module) or reaches_attention(module))
    }
    adapted = [module for name, (module, _) in mixers.items() if name not in refused]
    loaded, parts = loaded_modules(), modules.values()
    unnamed = bool(refused) or reaches_a_door(model, parts, loaded) or reaches_attention(model, adapted, parts)
    at_doors = unnamed or (bool(adapted) and reaches_attention(model, (), parts))
    if not adapted and not at_doors:
        raise nothing_found(model, adapters)
    found = Traceable(model, mixers, refused, unnamed, at_doors, modules, loaded)
    if somebody_listens():  # this is in every trace's time
        families = ", ".join(sorted({adapter.family for _, adapter in found.known.values()})) or "none"
        doors = "; doors are open for the rest" if at_doors else ""
        decided("trace of %s: adapters for %d mixers: %s%s", type(model).__name__, len(found.known), families, doors)
    return found


def _unwrapped(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model inside a wrapper for several devices and its modules, or the reason why it cannot be traced there."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedModelError(
            f"trace(DataParallel on {len(model.device_ids)} devices): it runs copies of the model, which no trace "
            "sees. Write: with trace(model.module): model.module(images)."
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    modules = modules_of(model)
    for name, module in modules.items():
        wraps = "_orig_mod" in module._modules  # not hasattr: this is asked of every module of every trace
        if wraps or module._compiled_call_impl is not None:
            its = f"model.{name}" if name else "model"
            instead = (
                f"Keep the model as it was before torch.compile ({its}._orig_mod) and trace and call that."
                if wraps
                else f"Write {its}._compiled_call_impl = None, or trace and call the model before {its}.compile()."
            )
            raise UnsupportedModelError(f"trace(...): {its} is compiled, so its forward is not what runs. {instead}")
    return model, modules
