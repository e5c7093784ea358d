"""On a machine without CUDA, code that moves itself there while it is imported stays where it is."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CpuForCuda(TorchFunctionMode):
    """``.cuda()``, ``.to("cuda")`` and ``device="cuda"`` mean the CPU while the mode is on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with every CUDA device replaced."""
        if func is Tensor.cuda:
            return args[0]
        named = {name: _on_cpu(item) for name, item in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **named)


def _on_cpu(item: Any) -> Any:
    """The argument, or the CPU if it names a CUDA device."""
    if isinstance(item, torch.device):
        return torch.device("cpu") if item.type == "cuda" else item
    return "cpu" if isinstance(item, str) and item.split(":")[0] == "cuda" else item
