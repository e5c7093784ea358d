"""Real modules that load beside the stand-ins and would still not run on a CPU tensor: what is replaced in them.

They stay the user's own modules, with their own classes; only the functions that launch kernels are replaced.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from mamba_attn.stand_ins._served import thing


def repair(module: ModuleType) -> None:
    """Replace what launches kernels in a module that was just run, if its functions are the known ones."""
    REPAIRS[module.__name__.rpartition(".")[2]](module)


def _replace(module: ModuleType, name: str, path: str) -> None:
    """Put a plain PyTorch function in the place of one with the same arguments, whatever their order."""
    original = getattr(module, name, None)
    if not inspect.isfunction(original):
        return
    signature, plain = inspect.signature(original), thing(path)

    @functools.wraps(original)
    def stand_in(*arguments: Any, **options: Any) -> Any:
        return plain(**signature.bind(*arguments, **options).arguments)

    setattr(module, name, stand_in)


def _norms(module: ModuleType) -> None:
    """mamba_ssm's fused norms; its RMSNorm calls ``rms_norm_fn`` of the same module."""
    if hasattr(module, "_layer_norm_fwd"):
        _replace(module, "layer_norm_fn", "_norm.layer_norm_fn")
        _replace(module, "rms_norm_fn", "_norm.rms_norm_fn")


def _step(module: ModuleType) -> None:
    """mamba_ssm's step with a cache."""
    _replace(module, "selective_state_update", "_step.selective_state_update")


def _cross_scans(module: ModuleType) -> None:
    """VMamba's scans have PyTorch classes for CPU tensors, and enter ``torch.cuda.device(x.device)`` around them."""
    for name, torch_class in (("cross_scan_fn", "CrossScanF"), ("cross_merge_fn", "CrossMergeF")):
        original, plain = getattr(module, name, None), getattr(module, torch_class, None)
        if inspect.isfunction(original) and plain is not None:
            setattr(module, name, _through(original, plain))


def _through(original: Callable[..., Any], plain: Any) -> Callable[..., Any]:
    """The function, through its own PyTorch class unless the tensor is on a GPU."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def on_any_device(*arguments: Any, **options: Any) -> Any:
        call = signature.bind(*arguments, **options)
        call.apply_defaults()
        values = {key: value for key, value in call.arguments.items() if key != "force_torch"}
        tensor = next(iter(values.values()))
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            return original(**values, force_torch=True)  # triton is a stand-in
        return plain.apply(*values.values())

    return on_any_device


def _chunked_scan(module: ModuleType) -> None:
    """VMamba's Mamba-2 scan has a PyTorch version, and chooses Triton's wherever triton can be imported."""
    original = getattr(module, "selective_scan_chunk_fn", None)
    if not inspect.isfunction(original) or "backend" not in inspect.signature(original).parameters:
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def in_pytorch(*arguments: Any, **options: Any) -> Any:
        call = signature.bind(*arguments, **options)
        call.arguments["backend"] = "torch"
        return original(*call.args, **call.kwargs)

    module.selective_scan_chunk_fn = in_pytorch  # type: ignore[attr-defined]


# by the last part of the module's name: checkouts are imported under many
REPAIRS: dict[str, Callable[[ModuleType], None]] = {
    "layer_norm": _norms,
    "layernorm": _norms,
    "selective_state_update": _step,
    "csm_triton": _cross_scans,
    "ssd_minimal": _chunked_scan,
}
