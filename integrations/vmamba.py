"""VMamba (arXiv 2401.10166) and the forks of its code: SS2D, four routes over the grid of each stage.

VMamba's variants and the forks of its code give the same names to their parameters and differ in their equations. The
adapter identifies a module by its children, parameters, settings and code: it must know everything that may change the
equations, and refuses the rest by name.
"""

import functools
import inspect
from types import CodeType
from typing import Any, ClassVar, NamedTuple, NoReturn

from torch import Tensor, nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import ss2d
from mamba_attn.tracing.adapters import Adapter, Seen

_OTHERS = {  # attributes of modules with SS2D's parameters but other equations
    "multi_scan": "LocalVMamba, whose routes walk windows",
    "step_size": "EfficientVMamba, whose routes walk quarters of the grid",
    "conv2d_b1": "MSVMamba, whose routes walk grids of two resolutions",
    "v2d_out_norm": "2DMamba, whose scans may run along both axes at once",
}
_SCANS: dict[Any, str] = {
    "cross2d": "cross",
    0: "cross",
    "CrossScan": "cross",
    "CrossScanTriton": "cross",
    "unidi": "one way",
    1: "one way",
    "CrossScan_Ab_1direction": "one way",
    "bidi": "both ways",
    2: "both ways",
    "CrossScan_Ab_2direction": "both ways",
}
_BACKENDS = (None, "oflex", "mamba", "core", "torch")
_CORES = ("forward_core", "forward_corev0", "forward_corev0_seq", "forward_corev1", "forward_corev2")
_PARTS = ("in_proj", "act", "out_norm", "out_proj")
_CHILDREN = (*_PARTS, "conv2d", "out_act", "dropout", "x_proj", "dt_projs", "parametrizations")
_PARAMETERS = ("A_logs", "Ds", "dt_projs_bias", "dt_projs_weight", "x_proj_weight", "x_proj_bias")
_SETTINGS = (
    "training",
    "forward",
    "forward_core",
    "selective_scan",
    "k_group",
    "d_model",
    "d_state",
    "d_inner",
    "dt_rank",
    "d_conv",
    "expand",
    "K",
    "K2",
    "channel_first",
    "with_dconv",
    "disable_force32",
    "disable_z",
    "disable_z_act",
    "oact",
    "out_norm_shape",
    "ssm_low_rank",
)
_ARGUMENTS = (
    "x",
    "kwargs",
    "seq",
    "force_fp32",
    "ssoflex",
    "no_einsum",
    "selective_scan_backend",
    "scan_mode",
    "scan_force_torch",
    "nrows",
    "to_dtype",
    "channel_first",
    "cross_selective_scan",
    "SelectiveScan",
    "CrossScan",
    "CrossMerge",
)
_NAMES = (
    "A_logs",
    "act",
    "append",
    "apply",
    "cat",
    "channel_first",
    "chunk",
    "contiguous",
    "conv1d",
    "conv2d",
    "cross_merge_fn",
    "cross_scan_fn",
    "cross_selective_scan",
    "d_conv",
    "d_inner",
    "d_state",
    "dict",
    "disable_z",
    "disable_z_act",
    "dropout",
    "Ds",
    "dt_projs",
    "dt_projs_bias",
    "dt_projs_weight",
    "dt_rank",
    "dtype",
    "einsum",
    "exp",
    "F",
    "flatten",
    "flip",
    "float",
    "float32",
    "forward_core",
    "get",
    "getattr",
    "hasattr",
    "in_proj",
    "in_rank",
    "int",
    "isinstance",
    "k_group",
    "layer_norm",
    "out_act",
    "out_norm",
    "out_proj",
    "out_rank",
    "partial",
    "permute",
    "range",
    "reshape",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_fn_v1",
    "SelectiveScan",
    "setattr",
    "shape",
    "silu",
    "size",
    "softplus",
    "split",
    "squeeze",
    "ssm_low_rank",
    "stack",
    "str",
    "sum",
    "Tensor",
    "to",
    "torch",
    "training",
    "transpose",
    "unsqueeze",
    "view",
    "with_dconv",
    "x_proj",
    "x_proj_bias",
    "x_proj_weight",
)


class VMambaAdapter(Adapter):
    """Mixers with SS2D's parameter names, of either naming scheme, channels first or last."""

    family: ClassVar[str] = "VMamba"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has SS2D's parameters."""
        return all(hasattr(module, name) for name in ("A_logs", "Ds", "dt_projs_bias"))

    def refusal(self, module: nn.Module, model: nn.Module) -> str | None:
        """Refuse modules that are not known to compute SS2D's equations."""
        try:
            check_parts(module)
            variant(module)
        except UnsupportedModelError as reason:
            return str(reason)
        return None

    def project(self, module: nn.Module, x: Tensor, *, rules: Rules, seen: Seen, **ignored: Any) -> ScanRecord:
        """Return everything before the scans; like SS2D, ignores other keyword arguments.

        Raises:
            UnsupportedModelError: an input that is not a grid of tokens.
        """
        if x.ndim != 4:
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} got an input of shape {tuple(x.shape)}; this adapter "
                "knows (batch, height, width, features), or features first where the module's channel_first is true."
            )
        x = x.movedim(1, 3) if channel_first(module) else x
        height, width = x.shape[1:3]
        layout = seen.layout
        if layout is None or layout.grid != (height, width):
            layout = seen.grid_layout(height, width)
        return ss2d.project(module, x, orders=_orders(module, height, width, x), rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the normed, gated, projected output."""
        _, frame, precision = variant(module)
        output = ss2d.finish(module, record, y, rules, norm_frame=frame, precision=precision)
        return output.movedim(3, 1) if channel_first(module) else output

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_norm, which receives the sum of the routes."""
        frame = ss2d.frame_of_norm(module, variant(module).norm_frame)
        return module.get_submodule("out_norm"), ss2d.framed(record.on_grid(y), frame)


def _orders(module: nn.Module, height: int, width: int, x: Tensor) -> Tensor:
    """Return the token visited at each step of the four routes."""
    if isinstance(module, ss2d.SS2D) and is_ours(module):
        return module.routes(height, width)
    scan = variant(module).scan
    if scan == "cross":
        return ss2d.cross_scan(height, width, x.device)
    return ss2d.raster_scan(height, width, x.device, scan == "both ways")


ADAPTER = VMambaAdapter()


class Variant(NamedTuple):
    """The differences between variants: scan is "cross", "one way" or "both ways", the rest as in ``ss2d.finish``."""

    scan: str = "cross"
    norm_frame: str | None = None
    precision: str = "norm"


def is_ours(module: nn.Module) -> bool:
    """Whether the module runs ``mamba_attn.models.SS2D``'s forward."""
    return type(module).forward is ss2d.SS2D.forward


def channel_first(module: nn.Module) -> bool:
    """Whether the module gets and returns (batch, channels, height, width)."""
    return bool(getattr(module, "channel_first", False)) and not is_ours(module)


def variant(module: nn.Module) -> Variant:
    """Return the variant that the module's code computes.

    Raises:
        UnsupportedModelError: the variant is unknown.
    """
    if is_ours(module):
        return Variant(precision="features")
    forward, core = _Function(module.forward), _Function(getattr(module, "forward_core", None))
    v0 = forward.name == "forwardv0"
    if not v0 and (forward.name not in ("forward", "forwardv2") or core.name not in _CORES):
        _refuse(f"its forward is {forward.name}, its forward_core {core.name}, which this adapter does not know.")
    foreign = forward.foreign() + ([] if v0 else core.foreign())
    if foreign:
        _refuse(f"the code of its forward has {', '.join(foreign)}, which this adapter does not know.")
    if getattr(module, "x_proj_bias", None) is not None and not (forward if v0 else core).mentions("x_proj_bias"):
        _refuse("it has an x_proj_bias, which its code does not read.")
    if v0:
        return Variant(norm_frame="flat", precision="scan")
    if forward.mentions("silu") and not isinstance(module.act, nn.SiLU):
        _refuse(f"its gate is SiLU, its act is {type(module.act).__name__}; this adapter knows them equal.")
    if not core.given:  # forks of the code of January and February 2024
        frame = "last" if forward.mentions("out_norm") else "flat"
        return Variant(norm_frame=frame, precision="norm" if core.name == "forward_corev2" else "scan")
    shape = getattr(module, "out_norm_shape", None)  # of April 2024
    old = "first" if shape == "v1" else "last" if channel_first(module) else "flat"
    return Variant(_scan(core), None if shape is None else old)


def check_parts(module: nn.Module) -> None:
    """Raise UnsupportedModelError for parts, parameters, buffers and settings that may change the equations."""
    other = next((name for name in _OTHERS if hasattr(module, name)), None)
    if other:
        _refuse(f"it is {_OTHERS[other]} (it has {other}), which this adapter does not know.")
    if not hasattr(module, "x_proj_weight") and not hasattr(module, "x_proj"):
        _refuse("it has no x_proj (VMamba's variants xv, whose in_proj gives u, dt, B and C), so it is another mixer.")
    absent = [name for name in _PARTS if not hasattr(module, name)]
    if absent:
        _refuse(f"it has no {' and no '.join(absent)}, so it is another mixer.")
    _check_shapes(module)
    names = [name for name, _ in module.named_children() if name not in _CHILDREN]
    names += [name for name, _ in module.named_parameters(recurse=False) if name not in _PARAMETERS]
    names += [name for name, _ in module.named_buffers(recurse=False)]
    known = (*_SETTINGS, "order", "second") if is_ours(module) else _SETTINGS
    names += [n for n, value in vars(module).items() if n[0] != "_" and value is not None and n not in known]
    if names:
        _refuse(f"it has {', '.join(names)}, which this adapter does not know.")


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedModelError(reason)


def _check_shapes(module: nn.Module) -> None:
    """Raise UnsupportedModelError unless the parameters are those of four routes of scalar states per channel."""
    parts: Any = module
    if parts.Ds.ndim != 1:
        _refuse("it is the Mamba-2 variant (m0), which this adapter does not know.")
    routes, channels = parts.dt_projs_bias.shape
    if routes != ss2d.ROUTES:
        _refuse(f"it has {routes} routes; the cross-scan has {ss2d.ROUTES}.")
    if parts.A_logs.ndim != 2 or not len(parts.A_logs) == len(parts.Ds) == routes * channels:
        _refuse("its routes share A_logs or Ds, which this adapter does not know.")
    if getattr(parts, "x_proj_weight", None) is not None:
        return
    for name in ("x_proj", "dt_projs"):  # of the one-file VMamba: they see the tokens in another order
        part = getattr(parts, name, None)
        plain = isinstance(part, nn.Linear) and {*part.state_dict()} <= {"weight", "bias"}
        if not plain or getattr(part, "groups", 1) != routes:
            kind = f"{type(part).__module__}.{type(part).__name__}"
            _refuse(f"its {name} is a {kind}; this adapter knows plain linear layers in {routes} groups.")


def _scan(core: "_Function") -> str:
    """Return which scan a core was bound to."""
    backend, mode = core["selective_scan_backend"], core["scan_mode"]
    allowed = next((c for c in core.constants if isinstance(c, tuple) and "oflex" in c), _BACKENDS)
    if backend not in {*allowed}.intersection(_BACKENDS):
        why = "its own code refuses" if backend in _BACKENDS else "this adapter does not know"
        _refuse(f"it is bound to selective_scan_backend={backend!r}, which {why}.")
    if core["ssoflex"] is False:
        _refuse("its scans round their output (ssoflex=False), which this adapter does not know.")
    if "scan_mode" not in core.taken:  # older code gets classes
        inner = _Function(core["cross_selective_scan"])
        mode, merge = (getattr(core.given.get(k, inner[k]), "__name__", None) for k in ("CrossScan", "CrossMerge"))
        mode = mode if str(mode).replace("Scan", "Merge") == merge else f"{mode} and {merge}"
    if mode in ("cascade2d", -1):
        _refuse("a norm stands between its scans of rows and of columns (cascade2d, v052dc).")
    if mode not in _SCANS:
        _refuse(f"its scan is {mode!r}; this adapter knows cross2d, unidi and bidi.")
    return _SCANS[mode]


class _Function:
    """A function that a module is bound to, and the arguments that it was bound with."""

    def __init__(self, bound: Any) -> None:
        bound, self.given = inspect.unwrap(bound), dict[str, Any]()
        if isinstance(bound, functools.partial):
            bound, self.given = inspect.unwrap(bound.func), bound.keywords
        code = getattr(bound, "__code__", None)
        self.name: str = getattr(bound, "__name__", str(bound))
        self.taken = {key: p.default for key, p in inspect.signature(bound).parameters.items()} if code else {}
        self.names, self.constants = _contents(code) if code else (frozenset(), frozenset())

    def __getitem__(self, argument: str) -> Any:
        return self.given.get(argument, self.taken.get(argument))

    def mentions(self, name: str) -> bool:
        return name in self.names or name in self.constants

    def foreign(self) -> list[str]:
        """Names that it takes or uses and that are unknown."""
        arguments = [name for name in dict.fromkeys([*self.taken, *self.given]) if name not in _ARGUMENTS]
        return arguments + sorted(self.names.difference(_NAMES))


@functools.lru_cache(maxsize=64)
def _contents(code: CodeType) -> tuple[frozenset[str], frozenset[Any]]:
    """Return the names and constants that a function, and functions inside it, use."""
    names, constants = frozenset(code.co_names), frozenset(code.co_consts)
    for inner in (const for const in code.co_consts if isinstance(const, CodeType)):
        names, constants = names | _contents(inner)[0], constants | _contents(inner)[1]
    return names, constants
