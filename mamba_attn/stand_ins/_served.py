"""Which module names are served, and with what: "_scan.fwd" is ``fwd`` of ``mamba_attn.stand_ins._scan``."""

import importlib
from typing import Any


def _all_of(module: str, *names: str) -> dict[str, str]:
    return {name: f"{module}.{name}" for name in names}


_CONV = _all_of("_causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update")
_SCAN = _all_of("_ssm", "selective_scan_fn", "mamba_inner_fn")
_MAMBA = _all_of("_mamba", "Mamba")
_NORM = _all_of("_norm", "RMSNorm", "layer_norm_fn", "rms_norm_fn")

# The compiled extensions, and triton: served in the block whatever is installed.
ALWAYS: dict[str, dict[str, str]] = {
    "selective_scan_cuda": _all_of("_scan", "fwd", "bwd"),
    "selective_scan_cuda_oflex": {"fwd": "_scan.oflex_fwd", "bwd": "_scan.core_bwd"},
    "selective_scan_cuda_core": {"fwd": "_scan.core_fwd", "bwd": "_scan.core_bwd"},
    "causal_conv1d_cuda": _all_of("_conv", "causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"),
    "triton": _all_of(
        "_triton", "__version__", "jit", "autotune", "heuristics", "Config", "cdiv", "next_power_of_2", "set_allocator"
    ),  # and every module below it
    "triton.language": _all_of("_triton", "constexpr"),
}  # fmt: skip
# Language models only: served where importing the real one fails.
FAILING: dict[str, dict[str, str]] = {
    "mamba_ssm.utils.generation": _all_of("_text", "GenerationMixin", "InferenceParams"),
    "mamba_ssm.utils.hf": _all_of("_text", "load_config_hf", "load_state_dict_hf"),
}
# Python packages: served where the whole package cannot be found.
MISSING: dict[str, dict[str, str]] = {
    "causal_conv1d": {**_CONV, **_all_of("_causal_conv1d", "__version__")},
    "causal_conv1d.causal_conv1d_interface": {
        **_CONV, **_all_of("_causal_conv1d", "causal_conv1d_ref", "causal_conv1d_update_ref")
    },
    "causal_conv1d.cpp_functions": _all_of(
        "_causal_conv1d", "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function"
    ),
    "mamba_ssm": {**_SCAN, **_MAMBA},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": _MAMBA,
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        **_SCAN,
        **_all_of("_ssm", "selective_scan_ref", "mamba_inner_ref", "mamba_inner_fn_no_out_proj"),
        **_all_of("_ssm", "bimamba_inner_fn", "bimamba_inner_ref"),
    },
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORM,
    "mamba_ssm.ops.triton.layernorm": {
        **_NORM, "layer_norm_fn": "_norm.old_layer_norm_fn", "rms_norm_fn": "_norm.old_rms_norm_fn"
    },
    "mamba_ssm.ops.triton.selective_state_update": _all_of("_step", "selective_state_update"),
    "mamba_ssm.utils": {},
    **FAILING,
}  # fmt: skip
PACKAGES = ("causal_conv1d", "mamba_ssm")


def thing(path: str) -> Any:
    """The object that a table above names."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"mamba_attn.stand_ins.{module}"), name)
