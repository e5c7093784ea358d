"""Checks the laws that every adapter must obey: ``check_adapter(model, inputs)``."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import MambaAttnError, UnsupportedModelError
from mamba_attn.ops import reference
from mamba_attn.ops.arguments import at_tokens
from mamba_attn.tracing.adapters import Adapter, AnyAdapter, AttentionAdapter, find_mixers, nothing_found
from mamba_attn.tracing.agreement import latest
from mamba_attn.tracing.layers import Layer, ScanLayer
from mamba_attn.tracing.softmax_layers import AttentionLayer
from mamba_attn.tracing.tracer import Trace, trace

_ENTRIES = 2**22  # of the per-channel matrices that are built at once


class LawError(MambaAttnError):
    """An adapter does not compute what the model computes.

    Example:
        >>> issubclass(LawError, MambaAttnError)
        True
    """


@dataclass(frozen=True)
class LayerReport:
    """How exactly one layer obeys the laws; errors are largest differences over the largest value.

    Args:
        name: the layer.
        matrix_error: M @ u + D u, routes summed, against what the submodule after the scans receives; of softmax
            attention, probabilities @ value against what the submodule after it receives.
        above_diagonal: largest |M[i, j]| with j > i in any route's own order; exactly 0.
        row_sum_error: largest |sum over j of A[i, j] - 1| of softmax attention; 0 for scans, whose rows have no sum.

    Example:
        >>> LayerReport("layers.0.mixer", matrix_error=2e-7).above_diagonal
        0.0
    """

    name: str
    matrix_error: float
    above_diagonal: float = 0.0
    row_sum_error: float = 0.0


@dataclass(frozen=True)
class AdapterReport:
    """What ``check_adapter`` found.

    Args:
        output_error: traced output against the unmodified model's, largest difference over the largest value.
        observed_identical: whether mode "observe" leaves the output bit-identical.
        layers: one report per layer.

    Example:
        >>> layers = (LayerReport("a", 1e-7), LayerReport("b", 3e-7))
        >>> AdapterReport(1e-7, observed_identical=True, layers=layers).matrix_error
        3e-07
    """

    output_error: float
    observed_identical: bool
    layers: tuple[LayerReport, ...]

    @property
    def matrix_error(self) -> float:
        """The largest matrix error of all layers."""
        return max(layer.matrix_error for layer in self.layers)


def check_adapter(
    model: nn.Module,
    inputs: Tensor,
    *,
    adapters: Iterable[AnyAdapter] | None = None,
    tolerance: float = 1e-5,
    call: Callable[[nn.Module, Tensor], Any] | None = None,
) -> AdapterReport:
    """Run the laws on a model: the traced forward equals the model's own, and so do the matrices.

    For every layer the matrices are built in float64 from the record (``ops.reference``) and compared with what
    enters the submodule after the scans in the UNTOUCHED model: what a hook sees, or, where a fused forward reads that
    submodule's weight alone, what it multiplies by it. Long layers are checked on evenly spaced channels, so that the
    matrices fit in memory. Softmax attention is checked in the same way, and its rows must sum to 1.

    Args:
        model: a model that the adapter recognises; put it in eval mode if it has dropout.
        inputs: a batch of its inputs.
        adapters: tried before the installed ones.
        tolerance: largest relative error allowed.
        call: how to run the model. Default: ``model(inputs)``; the first tensor of what it returns is compared.

    Returns:
        The errors found.

    Raises:
        LawError: an error above the tolerance, a matrix that is not causal, rows that do not sum to 1, or a model left
            changed.

    Example:
        >>> from mamba_attn import models
        >>> report = check_adapter(models.create("vim_digits", weights="demo"), torch.rand(1, 3, 64, 64))
        >>> report.matrix_error < 1e-5, report.observed_identical
        (True, True)
    """
    run = call or (lambda m, x: m(x))
    adapters = list(adapters or ())
    mixers = find_mixers(model, adapters)
    if not mixers:
        raise nothing_found(model, adapters)
    with torch.no_grad():
        with _agreeing(mixers), _unchanged(model), trace(model, adapters=adapters) as record:
            routed = _first_tensor(run(model, inputs))
        mixers = {name: (module, _agreed(module, adapter)) for name, (module, adapter) in mixers.items()}
        with _spies(mixers, record) as seen:
            plain = _first_tensor(run(model, inputs))  # a model's own forward may set attributes
        with _unchanged(model), trace(model, adapters=adapters, mode="observe"):
            observed = _first_tensor(run(model, inputs))
        adapted = [(name, mixers[mixer]) for name in record if (mixer := _mixer_of(name, mixers)) in mixers]
        layers = tuple(_check_layer(name, *mixer, record, seen) for name, mixer in adapted)  # others come from doors
    report = AdapterReport(_relative(routed, plain), torch.equal(observed, plain), layers)
    _require(report, tolerance)
    return report


@contextmanager
def _agreeing(mixers: Mapping[str, tuple[nn.Module, AnyAdapter]]) -> Iterator[None]:
    """Raise LawError for a mixer whose own output is another than its adapter's."""
    failed: UnsupportedModelError | None = None
    try:
        with warnings.catch_warnings():  # of a mixer that its adapter does not compute: an error here, see below
            warnings.filterwarnings("ignore", r"trace: .*this adapter", UserWarning)
            yield
    except UnsupportedModelError as error:
        failed = error
    for name, (module, adapter) in mixers.items():
        verdict = latest(module)
        if verdict is not None and not verdict.agrees and verdict.adapter is not None:
            raise LawError(verdict.sentence(name, module, adapter.family)) from failed
    if failed is not None:
        raise failed


def _agreed(module: nn.Module, adapter: AnyAdapter) -> AnyAdapter:
    """Of the adapter's alternatives the one that computes what the module does."""
    verdict = latest(module)
    return adapter if verdict is None or verdict.adapter is None else verdict.adapter


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Raise LawError if the model is left changed."""
    before = _state(model)
    yield
    if _state(model) != before:
        raise LawError("the model was left changed: hooks, attributes, training mode or requires_grad differ.")


def _require(report: AdapterReport, tolerance: float) -> None:
    if not report.layers:
        raise LawError("no recognised layer ran during the forward pass.")
    if not report.output_error <= tolerance:
        raise LawError(f"traced output differs from the model's own by {report.output_error:.3g} (relative).")
    if not report.observed_identical:
        raise LawError("mode='observe' changed the model's output.")
    for layer in report.layers:
        if not layer.matrix_error <= tolerance:
            raise LawError(
                f"{layer.name}: the matrices times what they mix are off by {layer.matrix_error:.3g} (relative): law 1."
            )
        if not layer.row_sum_error <= tolerance:
            raise LawError(f"{layer.name}: a row of probabilities misses 1 by {layer.row_sum_error:.3g}: law 9.")
        if layer.above_diagonal != 0:
            raise LawError(f"{layer.name}: a matrix reaches {layer.above_diagonal:.3g} above the diagonal: law 2.")


@contextmanager
def _spies(mixers: dict[str, tuple[nn.Module, AnyAdapter]], record: Trace) -> Iterator[dict[str, Tensor]]:
    """Record the input of the submodule after every mixer's scans, called as a module or by its weight alone."""
    seen: dict[str, Tensor] = {}
    runs: dict[str, int] = {}
    weights: dict[int, str] = {}

    def starts(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        runs[name] = runs.get(name, 0) + 1

    def keep(name: str, value: Tensor) -> None:
        seen[name if runs.get(name, 1) == 1 else f"{name}#{runs[name]}"] = value

    with ExitStack() as stack:
        for name in dict.fromkeys(_mixer_of(each, mixers) for each in record):
            if name not in mixers:
                continue  # seen at a door
            module, adapter = mixers[name]
            stack.callback(module.register_forward_pre_hook(partial(starts, name)).remove)
            receiver, _ = _received(module, adapter, record[name])
            stack.callback(receiver.register_forward_pre_hook(partial(_first_input, keep, name)).remove)
            if isinstance(receiver, nn.Linear):
                weights[id(receiver.weight)] = name
        stack.enter_context(_Products(weights, keep))
        yield seen


def _mixer_of(layer: str, mixers: dict[str, tuple[nn.Module, AnyAdapter]]) -> str:
    """The mixer that a layer is of; one that a forward calls again has layers mixer, mixer#2, ..."""
    return layer if layer in mixers else layer.rpartition("#")[0]


def _first_input(keep: Callable[[str, Tensor], None], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    keep(name, args[0])


class _Products(TorchFunctionMode):
    """Shows what is multiplied by some weights: fused forwards read them and call no module."""

    def __init__(self, names: dict[int, str], keep: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.names = names
        self.keep = keep

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = self.names.get(id(args[1])) if func is F.linear and len(args) > 1 else None
        if name is not None:
            self.keep(name, args[0])
        return func(*args, **(kwargs or {}))


def _received(module: nn.Module, adapter: AnyAdapter, layer: Layer) -> tuple[nn.Module, Tensor]:
    """The submodule after the mixing, and what it receives, from the layer's own record."""
    if isinstance(adapter, AttentionAdapter) and isinstance(layer, AttentionLayer):
        return adapter.mixed_values(module, layer.record, layer.record.probabilities)
    if isinstance(adapter, Adapter) and isinstance(layer, ScanLayer):
        return adapter.scan_output(module, layer.scan, layer.y)
    raise TypeError(f"{layer.name}: {type(adapter).__name__} does not fit {type(layer).__name__}.")


def _check_layer(
    name: str, module: nn.Module, adapter: AnyAdapter, record: Trace, seen: dict[str, Tensor]
) -> LayerReport:
    layer = record[name]
    if name not in seen:
        raise LawError(f"{name}: no hook saw its matrices' product; scan_output must name a submodule that is used.")
    if isinstance(adapter, Adapter) and isinstance(layer, ScanLayer):
        return _check_scans(layer, module, adapter, seen[name])
    received = _received(module, adapter, layer)[1]
    sums = layer.attention("each").double().sum(-1)
    return LayerReport(name, _relative(received, seen[name]), row_sum_error=float((sums - 1).abs().max()))


def _check_scans(layer: ScanLayer, module: nn.Module, adapter: Adapter, seen: Tensor) -> LayerReport:
    scan = layer.scan
    count = max(1, _ENTRIES // (scan.batch * scan.length**2))
    channels = torch.linspace(0, scan.channels - 1, min(count, scan.channels)).round().long()
    y, above = _by_matrices(scan, channels), max(_above_diagonal(layer, route) for route in range(scan.routes))
    full = layer.y.double().index_copy(1, channels, y)
    # of alternatives with equal outputs one may hand it over in another form
    alike = [adapter, *(each for each in adapter.alternatives(module) if isinstance(each, Adapter))]
    forms = [each.scan_output(module, scan, full)[1] for each in alike]
    expected = next((form for form in forms if form.shape == seen.shape), forms[0])
    return LayerReport(layer.name, _relative(expected, seen), above)


def _above_diagonal(layer: ScanLayer, route: int) -> float:
    """The largest entry of a route's attention above the diagonal of its own order."""
    matrix = layer.attention(routes=route)
    rows, columns = (order[..., route, None, :] for order in (layer.scan.write_order, layer.scan.read_order))
    in_order = at_tokens(at_tokens(matrix, columns).mT, rows).mT
    return float(in_order.triu(1).abs().max())


def _by_matrices(scan: ScanRecord, channels: Tensor) -> Tensor:
    """The scans' merged output, for some channels, from explicit matrices."""
    part = _some_channels(scan, channels)
    total = torch.zeros(scan.batch, len(channels), scan.tokens, dtype=torch.float64)
    for route in range(scan.routes):
        own = part.select_routes(slice(route, route + 1))
        M = reference.channel_matrices(own)
        y = torch.einsum("brcij,brcj->brci", M, own.u.double())
        if own.D is not None and own.D.ndim == 2:
            y = y + own.D.double().unsqueeze(-1) * own.u.double()
        total = total + reference.add_skip(own, reference.merge_tokens(own, y)).cpu()
    return total.to(scan.source_u.device)


def _some_channels(scan: ScanRecord, channels: Tensor) -> ScanRecord:
    width, groups = scan.channels // scan.heads, scan.channels // scan.source_B.shape[2]
    heads, group = channels // width, channels // groups
    return scan.replace(
        source_u=scan.source_u[:, :, channels],
        source_delta=scan.source_delta[:, :, heads],
        A=scan.A[:, heads],
        source_B=scan.source_B[:, :, group],
        source_C=scan.source_C[:, :, group],
        D=None if scan.D is None else scan.D[:, channels],
        gate=None,
        source_gain=None if scan.source_gain is None else scan.source_gain[:, :, heads],
    )


def _relative(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value; models may flatten the grid."""
    difference = (value.double().reshape(truth.shape) - truth.double()).abs().max()
    return float(difference / truth.double().abs().max().clamp(min=1e-30))


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return [
        (
            name,
            module.training,
            tuple(sorted(vars(module))),
            tuple(len(getattr(module, kind)) for kind in kinds),
            tuple((key, value.requires_grad, value.grad is None) for key, value in module.named_parameters()),
        )
        for name, module in model.named_modules()
    ]
