"""The selective scan and its hidden attention."""

from collections.abc import Callable, Sequence
from typing import overload

from torch import Tensor

from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import Call, Weights, as_record, check_fold, scan_weight
from mamba_attn.ops.dispatch import choose, require_memory
from mamba_attn.ops.reference import add_skip


def hidden_attention(
    delta: Tensor | ScanRecord,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    col_weight: Tensor | None = None,
    fold: str = "mean",
    orders: Tensor | None = None,
    tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the hidden attention of a selective scan, channels folded.

    Per channel, M[i, j] = sum_n C[n, i] exp(A[n] (S[i] - S[j])) B[n, j] delta[j] for j <= i, S = cumsum(delta)
    (arXiv 2403.01590, eq. 11); exactly zero above the diagonal. D is not part of it.

    Args:
        delta: (batch, channels, length) or (batch, routes, channels, length), after bias and softplus; or a
            ScanRecord, which replaces everything up to ``C`` and brings its orders and scale.
        A: (channels, states) or (routes, channels, states), negative; states may be 1 and shared.
        B: (batch, states, length) or (batch, routes, states, length); (batch, routes, groups, states, length) too.
        C: as B.
        row_weight: (batch, channels, tokens) or (batch, routes, channels, length); multiplies row i of channel c.
        col_weight: (batch, channels, tokens) or (batch, routes, channels, length); multiplies column j of channel c.
        fold: "mean" or "sum" over channels of the weighted matrices; "positive" and "absolute": max(., 0) and |.| of
            each weighted channel, then the mean; "each": no fold.
        orders: (routes, length) or (batch, routes, length) token visited at each step, -1 for none; merges
            the routes in the token frame.
        tokens: tokens in that frame. Default: the largest index + 1.
        backend: "fused", "native", "blocked" or "reference"; a named one never falls back. Default: the fastest.

    Returns:
        (batch, [routes,] [channels,] length, length) in scan order; with orders or a record (batch, [channels,] tokens,
        tokens) in the token frame, routes summed. float64 if delta, A, B or C is, else float32.

    Raises:
        ValueError: shapes that disagree, A >= 0, an unknown fold or backend.
        MatrixTooLargeError: the result would not fit into memory.
        BackendUnavailableError: the requested backend cannot run.

    Example:
        >>> delta, A, B, C = torch.rand(2, 8, 5), -torch.ones(8, 4), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
        >>> hidden_attention(delta, A, B, C).shape
        torch.Size([2, 5, 5])
    """
    call = as_record("hidden_attention", None, delta, A, B, C, orders=orders, tokens=tokens)
    (attention,) = _folded(call, [(row_weight, col_weight)], [fold], backend)
    return attention if call.merged or call.route_axis else attention.squeeze(1)


def hidden_attentions(
    record: ScanRecord, weights: Sequence[Weights], folds: Sequence[str], *, backend: str | None = None
) -> list[Tensor]:
    """Return several hidden attentions of one selective scan; on a CPU two cost hardly more than one.

    The native backend sums over the states once for each pair of matrices whose folds are "mean" or "sum".

    Args:
        record: the scan.
        weights: (row_weight, col_weight) of every matrix, as in ``hidden_attention``.
        folds: of every matrix.
        backend: see ``hidden_attention``.

    Returns:
        (batch, [channels,] tokens, tokens) each.

    Raises:
        ValueError: a fold too many or too few; or as ``hidden_attention``.
        MatrixTooLargeError: a result would not fit into memory.
        BackendUnavailableError: the requested backend cannot run.

    Example:
        >>> u, delta, A = torch.rand(1, 2, 8, 5), torch.rand(1, 2, 8, 5), -torch.rand(2, 8, 4)
        >>> B = C = torch.rand(1, 2, 1, 4, 5)
        >>> record = ScanRecord.from_scan(u, delta, A, B, C)
        >>> mean, absolute = hidden_attentions(record, [(None, None)] * 2, ["mean", "absolute"])
        >>> mean.shape == absolute.shape
        True
    """
    call = as_record("hidden_attentions", None, record, None, None, None)
    if len(weights) != len(folds):
        raise ValueError(f"{call.text}: {len(folds)} folds for {len(weights)} pairs of weights; expected one for each.")
    return _folded(call, weights, folds, backend)


def _folded(call: Call, weights: Sequence[Weights], folds: Sequence[str], backend: str | None) -> list[Tensor]:
    for fold in folds:
        check_fold(call, fold)
    chosen = choose(call, backend)
    checked = []
    for rows, columns in weights:
        gather = not chosen.gathers_weights
        checked.append(
            (scan_weight(call, "row_weight", rows, gather), scan_weight(call, "col_weight", columns, gather))
        )
    for fold in folds:
        require_memory(call, fold)
    if len(folds) == 1:
        return [chosen.hidden_attention(call.record, *checked[0], folds[0], call.merged)]
    return chosen.hidden_attentions(call.record, checked, folds, call.merged)


@overload
def selective_scan(
    u: Tensor | ScanRecord,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    attention: None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor | ScanRecord,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    attention: str,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor | ScanRecord,
    delta: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    *,
    attention: str | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a selective scan: h = exp(delta A) h + delta B u, y = C h + D u (arXiv 2312.00752, eq. 2, Euler for B).

    Args:
        u: (batch, channels, length) or (batch, routes, channels, length); or a ScanRecord in place of all tensors.
        delta: like u, after bias and softplus.
        A: (channels, states) or (routes, channels, states), negative.
        B: (batch, states, length) or (batch, routes, states, length).
        C: as B.
        D: (channels) or (routes, channels), or None.
        attention: a fold of ``hidden_attention``; also returns that matrix.
        backend: see ``hidden_attention``.

    Returns:
        y, shaped like u, or for a record (batch, channels, tokens): routes summed in the token frame, times scale.
        With attention, (y, attention).

    Raises:
        ValueError: shapes that disagree, A >= 0, an unknown fold or backend.
        BackendUnavailableError: the requested backend cannot run.

    Example:
        >>> u, delta, A = torch.rand(2, 8, 5), torch.rand(2, 8, 5), -torch.rand(8, 4)
        >>> B = C = torch.rand(2, 4, 5)
        >>> y, matrix = selective_scan(u, delta, A, B, C, attention="mean")
        >>> y.shape, matrix.shape
        (torch.Size([2, 8, 5]), torch.Size([2, 5, 5]))
    """
    if isinstance(u, ScanRecord):
        if delta is not None:
            raise TypeError("selective_scan(ScanRecord): the record already holds delta; leave it out.")
        call = as_record("selective_scan", None, u, A, B, C, D)
    else:
        if not isinstance(delta, Tensor):
            raise TypeError(f"selective_scan: delta must be a floating-point tensor, got {type(delta).__name__}.")
        call = as_record("selective_scan", u, delta, A, B, C, D)
    chosen = choose(call, backend)
    if attention is not None:
        check_fold(call, attention)
        require_memory(call, attention)
    squeeze: Callable[[Tensor], Tensor] = (lambda x: x) if call.merged or call.route_axis else lambda x: x.squeeze(1)
    scans = call.record
    if scans.D is not None and scans.D.ndim == 3:  # per token: added after routes merge
        scans = scans.replace(D=None)
    if attention is None:
        return squeeze(add_skip(call.record, chosen.selective_scan(scans, call.merged)))
    y, matrix = chosen.scan_and_attention(scans, attention, call.merged)
    return squeeze(add_skip(call.record, y)), squeeze(matrix)
