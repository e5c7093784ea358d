"""The conventions of published code: which there are, and the class token's row as two of them compute it.

"hidden_mamba" is the code published with arXiv 2403.01590, "implicit_unified" that with arXiv 2405.16504; both are for
Vim. "vmamba_analysis" is VMamba's own (arXiv 2401.10166). "exact" is none of them: the true matrices.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.attribution._queries import Query
from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import nearest
from mamba_attn.tracing.layers import ScanLayer

EXACT = "exact"
CLASS_TOKEN = ("hidden_mamba", "implicit_unified")
ANALYSIS = {"vmamba_analysis": "CwBw", "vmamba_analysis_dt": "CwBdtw"}  # and the names of their formulas there
ALL = (EXACT, *CLASS_TOKEN, *ANALYSIS)


class Watch(Rules):
    """Changes nothing; keeps what the records of a forward pass do not hold.

    Attributes:
        activated: per record, the inputs of the mixer's activations: for Vim one per route, then the gate's.
        gated: per record, the scans' output after the mixer's norm and gate, as far as it has them, in its own shape.
    """

    def __init__(self) -> None:
        self.activated: dict[ScanRecord, list[Tensor]] = {}
        self.gated: dict[ScanRecord, Tensor] = {}
        self._pending: list[Tensor] = []
        self._record: ScanRecord | None = None

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Keep the input."""
        self._pending.append(x)
        return super().activation(function, x)

    def scan(self, record: ScanRecord) -> ScanRecord:
        """Assign what came since the last scan to this one."""
        self.activated[record], self._pending = self._pending, []
        self._record = record
        return super().scan(record)

    def norm(self, module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Keep the output."""
        return self._keep(super().norm(module, x, call))

    def gate(self, y: Tensor, gate: Tensor) -> Tensor:
        """Keep the product."""
        return self._keep(super().gate(y, gate))

    def _keep(self, output: Tensor) -> Tensor:
        if self._record is not None:
            self.gated[self._record] = output
        return output


def check_convention(call: str, convention: str, known: Sequence[str], *, signed: bool = False) -> None:
    """Refuse an unknown convention, and a published one with ``signed=True``.

    Args:
        call: the name of the method, for the message.
        convention: what was asked for.
        known: the conventions of that method.
        signed: what was asked for beside it.

    Raises:
        ValueError: see above.
    """
    if convention not in known:
        raise ValueError(f"{call}(convention={convention!r}): no such convention. {nearest(convention, known)}")
    if signed and convention != EXACT:
        raise ValueError(
            f"{call}(convention={convention!r}, signed=True): published code takes the positive part; signed maps need "
            "convention='exact'."
        )


def require_class_token(call: str, model: nn.Module, layers: Sequence[ScanLayer], query: Query | None) -> int:
    """Return the class token's index.

    Raises:
        ValueError: a model without a class token, such as VMamba, or with several; a pixel or box, which these
            conventions have no row for.
    """
    tokens = layers[0].layout.class_tokens
    if len(tokens) != 1:
        raise ValueError(
            f"{call}: this convention reads the class token's row, and {type(model).__name__} has "
            f"{len(tokens) or 'no'} class token{'s' if len(tokens) > 1 else ''}; use convention='exact'."
        )
    if query is not None:
        raise ValueError(
            f"{call}: this convention computes the class token's row alone, so it has none for {query}; leave "
            f"{query.kind} out, or use convention='exact'."
        )
    return tokens[0]


def late_layers(layers: Sequence[ScanLayer]) -> list[ScanLayer]:
    """Return the layers that published code uses: from number round(15 / 24 depth) on, at least the last.

    The published number is 15 of 24. Halves round to even, as Python's ``round`` does.
    """
    return list(layers[min(round(len(layers) * 15 / 24), len(layers) - 1) :])


def class_row(
    convention: str, model: nn.Module, layer: ScanLayer, token: int, watch: Watch
) -> Float[Tensor, "batch channels tokens"]:
    """Return the class token's row of every channel as published code computes it; no halving of the two routes.

    Args:
        convention: "hidden_mamba" or "implicit_unified".
        model: where the layer's taps are read, for "implicit_unified".
        layer: the layer.
        token: index of the class token.
        watch: what watched the forward pass, for "implicit_unified".
    """
    layer.require_finite()
    if convention == "hidden_mamba":
        return _hidden_mamba_row(layer.scan, token)
    return _implicit_unified_row(model.get_submodule(layer.name), layer, token, watch)


def _hidden_mamba_row(scan: ScanRecord, token: int) -> Float[Tensor, "batch channels tokens"]:
    """The row without its own decay and with a zero self term: delta = 0 at the class token's step does both."""
    delta = scan.source_delta.clone()
    if scan.source_frame == "tokens":
        delta[..., token] = 0
    else:
        delta[(scan.read_order == token).expand_as(delta[:, :, 0]).unsqueeze(2).expand_as(delta)] = 0
    return ops.attention_row(scan.replace(source_delta=delta, scale=1.0), row=token, fold="each")


def _implicit_unified_row(
    mixer: nn.Module, layer: ScanLayer, token: int, watch: Watch
) -> Float[Tensor, "batch channels tokens"]:
    """silu(z[c]) (alpha[c] sigmoid(p)) T per route: p enters the convolution's SiLU, T holds its taps.

    D and the convolution's bias are left out, as published; ``ImplicitAttention`` has them, and every row.
    """
    scan = layer.scan.replace(scale=1.0)
    if scan.gate is None or not all(hasattr(mixer, name) for name in ("conv1d", "conv1d_b")[: scan.routes]):
        raise ValueError(
            f"convention='implicit_unified': {layer.name} is no Vim mixer (a gate and causal convolutions before the "
            "scans, one for each), which it is made for; use convention='exact'."
        )
    total: Tensor | None = None
    for route, inner in zip(range(scan.routes), watch.activated[layer.scan], strict=False):
        order = scan.read_order[route]
        row = ops.attention_row(scan.select_routes(slice(route, route + 1)), row=token, fold="each")[..., order]
        taps = mixer.get_submodule("conv1d_b" if route else "conv1d").get_parameter("weight").to(row)
        row = F.pad(row * inner.mT.to(row).sigmoid(), (0, taps.shape[-1] - 1))
        row = F.conv1d(row, taps.flip(-1), groups=taps.shape[0])
        total = torch.zeros_like(row) if total is None else total
        total = total.index_add(-1, order, row)
    if total is None:
        raise ValueError(f"convention='implicit_unified': {layer.name} has no route.")
    return total * scan.gate[..., token : token + 1]


def min_max(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """(values - min) / (max - min) over some axes; 0 where all are equal, where published code has NaN."""
    low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
    spread = high - low
    return (values - low) / torch.where(spread > 0, spread, 1)


def broadcast_rollout(vectors: Sequence[Float[Tensor, "batch tokens"]], token: int) -> Float[Tensor, "batch tokens"]:
    """Return the class token's row of the published rollout, whose matrices hold one vector in all their rows.

    With every row of I + 1 v^T divided by its sum 1 + s, s = sum(v), and the matrices multiplied from the last layer to
    the first, that row is e / prod(1 + s_k) + sum_k v_k / prod_{m <= k}(1 + s_m).

    Args:
        vectors: one per layer, first to last.
        token: index of the class token.
    """
    total = torch.ones_like(vectors[0][:, :1])
    row = torch.zeros_like(vectors[0])
    for vector in vectors:
        total = total * (1 + vector.sum(1, keepdim=True))
        row = row + vector / total
    return row.index_add(1, torch.tensor([token], device=row.device), 1 / total)
