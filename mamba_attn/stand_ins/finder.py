"""The import finder for stand-ins: which modules to serve, with which contents, and what to repair in real modules.

Real modules that import but would not run on a CPU tensor keep their own classes; only their functions that launch
kernels are replaced.
"""

import functools
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mamba_attn.errors import nearest

# Libraries that run without the stand-ins and outlive them: imported in the block, they see the machine as it is.
_LIBRARIES = ("torch", "torchvision", "timm", "transformers")


def _all_of(module: str, *names: str) -> dict[str, str]:
    return {name: f"{module}.{name}" for name in names}


_CONV = _all_of("conv", "causal_conv1d_fn", "causal_conv1d_update")
_SCAN = _all_of("mamba_ssm", "selective_scan_fn", "mamba_inner_fn")
_MAMBA = _all_of("mamba_ssm", "Mamba")
_CHUNKS = _all_of("ssd", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
_NORM = _all_of("triton", "RMSNorm", "layer_norm_fn", "rms_norm_fn")
_CORE = {"fwd": "scan.core_fwd", "bwd": "scan.core_bwd"}
# The compiled extensions, and triton: served in the block whatever is installed.
ALWAYS: dict[str, dict[str, str]] = {
    "selective_scan_cuda": _all_of("scan", "fwd", "bwd"),
    "selective_scan_cuda_oflex": {"fwd": "scan.oflex_fwd", "bwd": "scan.core_bwd"},
    "selective_scan_cuda_core": _CORE,
    "selective_scan_cuda_nrow": _CORE,
    "selective_scan_cuda_ndstate": {"fwd": "scan.ndstate_fwd", "bwd": "scan.ndstate_bwd"},
    "selective_scan_cuda_oflex_rh": {"fwd": "scan.states_fwd", "bwd": "scan.states_bwd"},  # Spatial-Mamba's
    "selective_scan_vmamba": {},  # EfficientVMamba's, by the release of torch
    "selective_scan_vmamba.selective_scan_cuda_core": _CORE,
    "selective_scan_vmamba_pt202": {},
    "selective_scan_vmamba_pt202.selective_scan_cuda_core": _CORE,
    "v2dmamba_scan": {"fwd": "scan.grid_fwd", "bwd": "scan.grid_bwd"},  # 2DMamba's
    "causal_conv1d_cuda": {
        **_all_of("conv", "causal_conv1d_fwd", "causal_conv1d_bwd"), "causal_conv1d_update": "conv.extension_update"
    },
    "triton": _all_of(
        "triton", "__version__", "jit", "autotune", "heuristics", "Config", "cdiv", "next_power_of_2", "set_allocator"
    ),  # and every module below it
    "triton.language": _all_of("triton", "constexpr"),
}  # fmt: skip
# Language models only: served where importing the real one fails.
FAILING: dict[str, dict[str, str]] = {
    "mamba_ssm.utils.generation": _all_of("mamba_ssm", "GenerationMixin", "InferenceParams"),
    "mamba_ssm.utils.hf": _all_of("mamba_ssm", "load_config_hf", "load_state_dict_hf"),
}
# Python packages: served where the whole package cannot be found.
MISSING: dict[str, dict[str, str]] = {
    "causal_conv1d": {**_CONV, **_all_of("conv", "__version__")},
    "causal_conv1d.causal_conv1d_interface": {
        **_CONV, **_all_of("conv", "causal_conv1d_ref", "causal_conv1d_update_ref")
    },
    "causal_conv1d.cpp_functions": _all_of(
        "conv", "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function"
    ),
    "mamba_ssm": {**_SCAN, **_MAMBA},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {**_MAMBA, **_all_of("mamba_ssm", "Block")},  # Block: of mamba_ssm 1
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        **_SCAN,
        **_all_of("mamba_ssm", "selective_scan_ref", "mamba_inner_ref", "mamba_inner_fn_no_out_proj"),
        **_all_of("mamba_ssm", "bimamba_inner_fn", "bimamba_inner_ref"),
    },
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORM,
    "mamba_ssm.ops.triton.layernorm": {
        **_NORM, "layer_norm_fn": "triton.old_layer_norm_fn", "rms_norm_fn": "triton.old_rms_norm_fn"
    },
    "mamba_ssm.ops.triton.ssd_combined": _CHUNKS,
    "mamba_ssm.ops.triton.layernorm_gated": {**_all_of("ssd", "RMSNorm", "rmsnorm_fn", "layernorm_fn")},
    "mamba_ssm.ops.triton.selective_state_update": _all_of("triton", "selective_state_update"),
    "mamba_ssm.utils": {},
    **FAILING,
}  # fmt: skip
PACKAGES = ("causal_conv1d", "mamba_ssm")


def thing(path: str) -> Any:
    """Return the object that a table above names."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"mamba_attn.stand_ins.{module}"), name)


class StandIn(ModuleType):
    """A module that stands in for a compiled, CUDA-only or missing one."""

    def __getattr__(self, name: str) -> Any:
        """Raise and suggest names that exist; triton accepts any name, because kernels only mention it."""
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if self.__name__.split(".")[0] == "triton":
            return thing("triton.Symbol")(f"{self.__name__}.{name}")
        there = [key for key in vars(self) if not key.startswith("_")]
        raise AttributeError(
            f"{self.__name__}.{name} has no stand-in in mamba_attn.cpu_stand_ins(). {nearest(name, there)}"
        )


class StandInLoader(Loader):
    """Makes a stand-in.

    Args:
        things: name in the module -> what it is, as ``thing`` reads it.
    """

    def __init__(self, things: dict[str, str]) -> None:
        self.things = things

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return an empty stand-in module."""
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Put the stand-in's objects into the module."""
        fill(module, self.things)


def fill(module: ModuleType, things: dict[str, str]) -> None:
    """Put the objects that the tables name into a module."""
    module.__doc__ = f"Stand-in of mamba_attn.cpu_stand_ins() for {module.__name__}."
    module.__file__ = __file__  # shown by `cannot import name` errors
    vars(module).update({name: thing(path) for name, path in things.items()})


class AroundLoader(Loader):
    """Runs a real module through its own loader, with an action around it.

    Args:
        inner: the module's own loader, which it keeps.
        action: called with the module and a function that runs its code.
    """

    def __init__(self, inner: Loader, action: Callable[[ModuleType, Callable[[], None]], None]) -> None:
        self.inner, self.action = inner, action

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # e.g. get_source

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Delegate to the module's own loader."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own loader, and run the module."""
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.action(module, lambda: self.inner.exec_module(module))


def overrides(name: str) -> bool:
    """Whether a stand-in replaces this module even if it is installed."""
    return name in ALWAYS or name.startswith("triton.")


class StandInFinder(MetaPathFinder):
    """Serves stand-ins by exact name, from ``install`` to ``remove``."""

    def __init__(self) -> None:
        self._real: dict[str, ModuleType] = {}  # hidden by stand-ins
        self._failed: list[ModuleType] = []  # real modules that could not be run, filled with stand-ins
        self._cuda: dict[str, Any] = {}  # replaced functions that need a missing CUDA device

    def install(self) -> None:
        """Hide the real modules, and become the first finder."""
        if not torch.cuda.is_available():
            self._cuda = {name: getattr(torch.cuda, name) for name in CUDA}
            vars(torch.cuda).update(CUDA)
        self._real = {name: sys.modules.pop(name) for name in list(sys.modules) if overrides(name)}
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Remove all stand-ins from ``sys.modules``, and restore what they hid."""
        vars(torch.cuda).update(self._cuda)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in sys.modules.copy().items():
            if isinstance(module, StandIn) or any(module is failed for failed in self._failed):
                del sys.modules[name]
                _forget(name, module)
        for name, module in self._real.items():
            sys.modules.setdefault(name, module)
        self._real, self._failed = {}, []

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a stand-in, or of a real module with an action around its loading; else None."""
        root, _, _ = fullname.partition(".")
        if overrides(fullname):
            return _spec(fullname, ALWAYS.get(fullname, {}), package=root == "triton" or _holds(ALWAYS, fullname))
        if root in PACKAGES and self._stands_in_for(root):
            return self._missing(fullname)
        if root in _LIBRARIES:
            return self._around(fullname, path, target, self._run_library)
        if fullname in FAILING:
            return self._around(fullname, path, target, self._run_or_fill)
        if fullname.rpartition(".")[2] in REPAIRS:
            return self._around(fullname, path, target, _run_and_repair)
        return None

    def _stands_in_for(self, root: str) -> bool:
        """Whether a package is missing; one that was served before counts as missing."""
        present = sys.modules.get(root)
        return self._elsewhere(root, None, None) is None if present is None else isinstance(present, StandIn)

    def _missing(self, fullname: str) -> ModuleSpec:
        if fullname not in MISSING:
            root = fullname.partition(".")[0]
            raise ModuleNotFoundError(
                f"{fullname} has no stand-in in mamba_attn.cpu_stand_ins(), and the package {root} cannot be found: "
                f"put its source on sys.path before importing (it needs no compiling inside the block).",
                name=fullname,
            )
        return _spec(fullname, MISSING[fullname], _holds(MISSING, fullname))

    def _elsewhere(self, fullname: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        """Return what the finders after this one find."""
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None

    def _around(
        self,
        fullname: str,
        path: Any,
        target: ModuleType | None,
        action: Callable[[ModuleType, Callable[[], None]], None],
    ) -> ModuleSpec | None:
        spec = self._elsewhere(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module") and spec.loader is not None:
            spec.loader = AroundLoader(spec.loader, action)
        return spec

    def _run_library(self, module: ModuleType, run: Callable[[], None]) -> None:
        with self._suspended():
            run()

    def _run_or_fill(self, module: ModuleType, run: Callable[[], None]) -> None:
        try:
            run()
        except ImportError:
            fill(module, FAILING[module.__name__])
            self._failed.append(module)

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        """Suspend the stand-ins during an import."""
        if self not in sys.meta_path:  # inside another suspension
            yield
            return
        sys.meta_path.remove(self)
        served = {name: module for name, module in sys.modules.copy().items() if isinstance(module, StandIn)}
        for name in served:
            del sys.modules[name]
        sys.modules.update(self._real)
        try:
            yield
        finally:
            self._real = {name: sys.modules.pop(name) for name in list(sys.modules) if overrides(name)}
            sys.modules.update(served)
            sys.meta_path.insert(0, self)


def _run_and_repair(module: ModuleType, run: Callable[[], None]) -> None:
    run()
    repair(module)


def _holds(table: dict[str, dict[str, str]], fullname: str) -> bool:
    """Whether a name is a package: the table has names below it."""
    return any(name.startswith(f"{fullname}.") for name in table)


def _spec(fullname: str, things: dict[str, str], package: bool) -> ModuleSpec:
    return ModuleSpec(fullname, StandInLoader(things), is_package=package)


def _forget(name: str, module: ModuleType) -> None:
    """Remove a stand-in from its parent, if the parent is a real module that stays."""
    parent, _, child = name.rpartition(".")
    holder = sys.modules.get(parent)
    if holder is not None and vars(holder).get(child) is module:
        delattr(holder, child)


def repair(module: ModuleType) -> None:
    """Replace the kernel-launching functions of a module that just ran, if they are the known ones."""
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
        _replace(module, "layer_norm_fn", "triton.layer_norm_fn")
        _replace(module, "rms_norm_fn", "triton.rms_norm_fn")


def _gated_norms(module: ModuleType) -> None:
    """The norms of mamba_ssm's Mamba-2, whose RMSNorm calls ``rmsnorm_fn`` of the same module."""
    _replace(module, "rmsnorm_fn", "ssd.rmsnorm_fn")
    _replace(module, "layernorm_fn", "ssd.layernorm_fn")


def _chunk_scans(module: ModuleType) -> None:
    """mamba_ssm's chunk scans: its autograd function calls the two below, the fused mixer more kernels."""
    for name in (
        "_mamba_chunk_scan_combined_fwd",
        "_mamba_chunk_scan_combined_bwd",
        "mamba_split_conv1d_scan_combined",
    ):
        _replace(module, name, f"ssd.{name}")


def _step(module: ModuleType) -> None:
    """mamba_ssm's step with a cache."""
    _replace(module, "selective_state_update", "triton.selective_state_update")


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


def _scan_of_cpu_tensors(module: ModuleType) -> None:
    """VMamba's Python loop, which MobileMamba takes on CPU tensors: through the extension's stand-in instead."""
    loop, compiled = getattr(module, "selective_scan_torch", None), getattr(module, "SelectiveScanCuda", None)
    if not inspect.isfunction(loop) or compiled is None:
        return

    @functools.wraps(loop)
    def through_extension(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: object = True,
        oflex: object = True,
        *rest: Any,
        **more: Any,
    ) -> Any:
        given = (u, delta, A, B, C, D, delta_bias, delta_softplus, oflex)
        if getattr(module, "WITH_SELECTIVESCAN_OFLEX", False) and not u.is_cuda:
            return compiled.apply(*given, "oflex")
        return loop(*given, *rest, **more)

    module.selective_scan_torch = through_extension  # type: ignore[attr-defined]


# by the last part of the module's name: checkouts are imported under many
REPAIRS: dict[str, Callable[[ModuleType], None]] = {
    "layer_norm": _norms,
    "layernorm": _norms,
    "layernorm_gated": _gated_norms,
    "ssd_combined": _chunk_scans,
    "selective_state_update": _step,
    "csm_triton": _cross_scans,
    "csms6s": _scan_of_cpu_tensors,
}


class Event:
    """``torch.cuda.Event`` on the CPU, which computes in order: it keeps the time.

    Args:
        enable_timing: without effect.
        options: blocking, interprocess, external; without effect.
    """

    def __init__(self, enable_timing: object = False, **options: object) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        """Keep the time."""
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Milliseconds from this event to another."""
        return 1e3 * (end_event._seconds - self._seconds)


def synchronize(device: object = None) -> None:
    """``torch.cuda.synchronize``: nothing to wait for."""


CUDA = {"Event": Event, "synchronize": synchronize}  # replaced in torch.cuda where there is no CUDA device


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
