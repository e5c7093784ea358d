"""Import torchvision next to a CPU build of torch.

torchvision's wheel links CUDA; where torch has none, its compiled operators do not load and ``import torchvision``
(hence ``import timm``) stops with ``RuntimeError: operator torchvision::nms does not exist`` (pytorch/vision #8985,
#9077). Declaring the schemas of the two operators named at import is enough: everything that is plain PyTorch works,
and calling ``nms`` raises torchvision's own error.
"""

import importlib
import importlib.util
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a schema lives as long as its Library object


def import_torchvision() -> ModuleType:
    """Import torchvision; declare the missing schemas if its import fails for lack of CUDA.

    A sound installation is never touched: nothing is declared unless the import failed and torch has no CUDA.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: torchvision fails for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not declare(error):
            raise
    return importlib.import_module("torchvision")


def declare(error: RuntimeError) -> bool:
    """Declare the missing schemas if their absence made an import fail; return whether to try again."""
    if "torchvision::" not in str(error) or torch.version.cuda is not None or _declared:
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _declared.append(library)
    return True


def prepare() -> None:
    """Make ``import timm`` possible; call it first. Does nothing if torchvision is absent."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
