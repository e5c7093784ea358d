"""The convolution and gate of a mixer whose scans are seen at doors, found by number among what is computed around it.

A convolution feeds a scan if its output, after an activation, is what the scan takes in, step by step (Mamba, Vim) or
token by token (VMamba). A gate follows if the scans' output is multiplied by it before anything else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.door_layers import DoorLayer

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, lambda x: x, F.gelu, F.relu)
_ROUNDING = 64  # of the type that the model computed in


class ConvolutionCall(NamedTuple):
    """One call of a depthwise convolution: its input x and output p."""

    module: nn.Conv1d | nn.Conv2d
    x: Tensor
    p: Tensor


@dataclass(eq=False)
class Around:
    """What was computed around one scan at a door.

    Args:
        convolutions: depthwise ones since the scan before, each with its input.
        products: factors of the products until the next scan.
    """

    convolutions: list[tuple[nn.Conv1d | nn.Conv2d, Tensor]]
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def plain(parameter: Tensor, like: Tensor) -> Tensor:
    """Return a parameter's values, usable in autograd even where the model was made in inference mode."""
    return parameter.detach().to(like).clone()


def as_module(
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> nn.Conv1d | nn.Conv2d:
    """Return a depthwise convolution that was called as a function, as a module; arguments as of ``torch.conv2d``."""
    kind: Any = nn.Conv1d if weight.ndim == 3 else nn.Conv2d
    channels, _, *kernel = weight.shape
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    module: nn.Conv1d | nn.Conv2d = kind(
        channels, channels, tuple(kernel), groups=groups, bias=bias is not None, device="meta", **options
    )
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module


def at_doors(
    layer: DoorLayer, around: Mapping[object, Around], called: str
) -> tuple[ScanRecord, list[ConvolutionCall]]:
    """Return a layer's record, with its gate, and the convolutions before its scans.

    One per route, along it, with the record in scan order; or one over the grid, with the record in the token frame.

    Args:
        layer: the layer.
        around: by scan, what was computed around it.
        called: the name of the method, for messages.

    Raises:
        UnsupportedModelError: there is no such convolution; routes whose convolutions, or gates, differ.
    """
    scan = _with_gate(layer, around, called)
    everywhere = scan.length == scan.tokens and torch.equal(scan.read_order, scan.write_order)
    if everywhere and scan.heads == scan.channels:
        found = _along_routes(layer, scan, around, called)
        if found is not None:
            return scan, found
        over = _over_grid(layer, scan, around)
        if over is not None:
            return _in_token_frame(scan), [over]
    seen = sum(len(around[call].convolutions) for call in layer.calls)
    missing = (
        "its scan shares step sizes between channels"
        if scan.heads != scan.channels
        else "its scan leaves tokens out"
        if not everywhere
        else f"no depthwise convolution was seen that makes what its scan takes in, of {seen} before it"
    )
    raise UnsupportedModelError(
        f"{called}: {layer.name} was traced at the scan's door, and {missing}; use MambaAttribution or "
        "RawAttention, or name other layers with layers=."
    )


def _same(a: Tensor, b: Tensor, layer: DoorLayer) -> bool:
    """Whether two tensors differ by rounding at most."""
    if a.shape != b.shape:
        return False
    precision = torch.finfo(layer.calls[0].inputs.u.dtype).eps
    return bool((a.to(b) - b).abs().max() <= _ROUNDING * precision * b.abs().max())


def _candidates(layer: DoorLayer, around: Mapping[object, Around]) -> Iterator[tuple[nn.Conv1d | nn.Conv2d, Tensor]]:
    """Convolutions before a layer's scans, the last first."""
    for call in reversed(layer.calls):
        yield from reversed(around[call].convolutions)


def _along_routes(
    layer: DoorLayer, scan: ScanRecord, around: Mapping[object, Around], called: str
) -> list[ConvolutionCall] | None:
    """The causal convolution along each route, if there is one for each."""
    xs, ps, modules = [], [], []
    for number, call in enumerate(layer.calls):
        u = call.inputs.parts().u  # (rows, groups, width, length)
        fed = next(
            (
                (module, x, p)
                for module, given in _candidates(layer, around)
                for x in [_causal(module, given, call.length)]
                if x is not None and x.shape == (len(u), u.shape[1] * u.shape[2], call.length)
                for p in [_causally(module, x.to(u))]
                if any(_same(act(p).view_as(u), u, layer) for act in ACTIVATIONS)
            ),
            None,
        )
        if fed is None:
            return None
        module, x, p = fed
        xs.append(x.to(u).view_as(u))
        ps.append(p.view_as(u))
        grouped = layer.grouped
        parts = [module] if grouped else [_part(module, i, call.groups) for i in range(call.groups)]
        modules += parts * layer.rows_of(number)
    by_route = zip(modules, layer.by_image(xs).unbind(1), layer.by_image(ps).unbind(1), strict=True)
    calls = [ConvolutionCall(module, x, p) for module, x, p in by_route]
    frames = [_at_tokens(call.x, order, scan.tokens) for call, order in zip(calls, scan.read_order, strict=True)]
    if not all(_same(frame, frames[0], layer) for frame in frames[1:]):
        raise UnsupportedModelError(
            f"{called}: the convolutions before the scans of {layer.name} receive different tokens, so that "
            "there is no one matrix of them; use MambaAttribution or RawAttention, or name other layers with layers=."
        )
    return calls


def _causal(module: nn.Conv1d | nn.Conv2d, x: Tensor, length: int) -> Tensor | None:
    """What a causal convolution along ``length`` steps receives, without zeros in front; None: it is none."""
    if not isinstance(module, nn.Conv1d) or module.stride != (1,) or module.dilation != (1,) or x.ndim != 3:
        return None
    before = module.kernel_size[0] - 1
    if module.padding == (before,) and x.shape[2] == length:
        return x
    padded = module.padding == (0,) and x.shape[2] == length + before and not bool(x[..., :before].any())
    return x[..., before:] if padded else None


def _causally(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    weight = plain(module.weight, x)
    bias = None if module.bias is None else plain(module.bias, x)
    return F.conv1d(F.pad(x, (weight.shape[2] - 1, 0)), weight, bias, groups=len(weight))


def _part(module: nn.Conv1d | nn.Conv2d, group: int, groups: int) -> nn.Conv1d | nn.Conv2d:
    """The convolution of one group of channels, which is a route."""
    if groups == 1:
        return module
    bias = None if module.bias is None else module.bias.chunk(groups)[group]
    weight = module.weight.chunk(groups)[group]
    return as_module(weight, bias, module.stride, module.padding, module.dilation, len(weight))


def _over_grid(layer: DoorLayer, scan: ScanRecord, around: Mapping[object, Around]) -> ConvolutionCall | None:
    """The convolution over the grid of tokens that all routes read."""
    u, order = scan.source_u, scan.read_order
    for module, given in _candidates(layer, around):
        if given.ndim != 4 or given.shape[:2] != (scan.batch, scan.channels) or prod(given.shape[2:]) != scan.tokens:
            continue
        x = given.to(u)
        bias = None if module.bias is None else plain(module.bias, x)
        options: tuple[Any, ...] = (module.stride, module.padding, module.dilation, module.groups)
        p = F.conv2d(x, plain(module.weight, x), bias, *options)
        for act in ACTIVATIONS if p.shape == x.shape else ():
            tokens = act(p).flatten(2)
            if all(_same(tokens[..., own], u[:, route], layer) for route, own in enumerate(order)):
                return ConvolutionCall(module, x, p)
    return None


def _in_token_frame(scan: ScanRecord) -> ScanRecord:
    """The record of routes that share their tokens, which all of them visit."""

    def placed(source: Tensor, routes: int) -> Tensor:
        parts = source.expand(-1, scan.routes, *source.shape[2:]).unbind(1)[:routes]
        each = [
            torch.zeros_like(part).index_copy(-1, own, part) for part, own in zip(parts, scan.read_order, strict=False)
        ]
        return torch.stack(each, 1)

    return ScanRecord.from_tokens(
        placed(scan.source_u, 1),
        placed(scan.source_delta, scan.routes),
        scan.A,
        placed(scan.source_B, scan.routes),
        placed(scan.source_C, scan.routes),
        scan.D,
        order=scan.read_order,
        gate=scan.gate,
        scale=scan.scale,
        layout=scan.layout,
    )


def _with_gate(layer: DoorLayer, around: Mapping[object, Around], called: str) -> ScanRecord:
    """The record; with the gate that its output is multiplied by before anything else, if none went into the scan."""
    scan = layer.scan.map_tensors(Tensor.detach)
    if any(call.inputs.z is not None for call in layer.calls):
        if scan.gate is None:
            raise _gates_differ(layer, called)
        return scan
    each = [_factor_of(call.y, around[call].products, layer) for call in layer.calls]
    gates = [
        gate.unflatten(1, (call.groups, -1)) for gate, call in zip(each, layer.calls, strict=True) if gate is not None
    ]
    if len(gates) < len(each):
        gate = _factor_of(layer.y, around[layer.calls[-1]].products, layer)
        return scan if gate is None else scan.replace(gate=gate)
    routes = layer.by_image(gates).unbind(1)
    frames = [_at_tokens(gate, order, scan.tokens) for gate, order in zip(routes, scan.write_order, strict=True)]
    if not all(_same(frame, frames[0], layer) for frame in frames[1:]):
        raise _gates_differ(layer, called)
    return scan.replace(gate=frames[0])


def _gates_differ(layer: DoorLayer, called: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{called}: the scans of {layer.name} have gates of their own, and no one gate of its tokens; use "
        "MambaAttribution or RawAttention, or name other layers with layers=."
    )


def _at_tokens(values: Tensor, order: Tensor, tokens: int) -> Tensor:
    """(batch, channels, length) along a route, in the token frame."""
    return values.new_zeros(*values.shape[:2], tokens).index_copy(2, order, values)


def _factor_of(
    y: Float[Tensor, "batch channels tokens"], products: Sequence[tuple[Tensor, Tensor]], layer: DoorLayer
) -> Float[Tensor, "batch channels tokens"] | None:
    """What was multiplied by y; None: nothing of its size."""
    for factors in products:
        for own, other in (factors, factors[::-1]):
            for its, gate in zip(as_tokens(own, y), as_tokens(other, y), strict=False):
                if _same(its, y, layer):
                    return gate.to(y)
    return None


def as_tokens(t: Tensor, y: Float[Tensor, "batch channels tokens"]) -> list[Tensor]:
    """Return a tensor as (batch, channels, tokens), its channels last or second; where both fit, in that order.

    Args:
        t: of any shape.
        y: of the shape wanted.
    """
    if t.numel() != y.numel() or len(t) != len(y):
        return []
    batch, channels, tokens = y.shape
    last = [t.reshape(batch, tokens, channels).mT] if t.shape[-1] == channels else []
    second = [t.reshape(y.shape)] if t.shape[1] == channels else []
    return [*last, *second]
