"""Let torchvision be imported next to a CPU build of torch; ``import mamba_attn`` does this.

torchvision's wheel links CUDA; where torch has none, its compiled operators do not load and ``import torchvision``
(hence ``import timm``, and transformers' models) stops with ``RuntimeError: operator torchvision::nms does not exist``
(pytorch/vision #8985, #9077). Declaring the schemas of the two operators named at import is enough: everything that is
plain PyTorch works, and calling ``nms`` raises torchvision's own error. A sound installation is never touched.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME = "torchvision"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a schema lives as long as its Library object


def install() -> None:
    """Repair the import of torchvision when somebody imports it; nothing is imported before."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision as the other finders do, and runs it twice if it fails for lack of CUDA."""

    def __init__(self) -> None:
        self._asked = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of torchvision, and of nothing else."""
        if name != _NAME or self._asked:
            return None
        self._asked = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asked = False
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(_run, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _run(own: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        own(module)
    except RuntimeError as error:
        if not _declare(error):
            raise
        own(module)


def _declare(error: RuntimeError) -> bool:
    """Declare the missing schemas if their absence made an import fail; return whether to try again."""
    import torch

    if "torchvision::" not in str(error) or torch.version.cuda is not None or _declared:
        return False
    library = torch.library.Library(_NAME, "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _declared.append(library)
    return True
