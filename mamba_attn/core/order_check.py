"""Orders whose tokens exist and do not repeat: a tensor is looked at once, because a look waits for the GPU.

A matrix entry has one place in the token frame only if a route reads and writes each token at most once; an order that
repeats one would break y = W u + D u in silence.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_SEEN: MutableMapping[Tensor, tuple[int, int]] = WeakIdKeyDictionary()


def require_distinct(what: str, order: Tensor, tokens: int) -> None:
    """Refuse an order that repeats a token on one route or visits one that does not exist.

    Args:
        what: whose order it is, for the message: "ScanRecord: write_order".
        order: (..., length), integers. Not looked at: one seen before and unchanged since, one without values (meta),
            one inside a CUDA graph's capture or torch.compile's tracing; there the operators look at run time.
        tokens: number of tokens in the token frame.

    Raises:
        ValueError: with the first offence.
    """
    if torch.compiler.is_compiling() or is_known(order, tokens):
        return
    if order.is_meta or not order.numel() or capturing(order):
        return
    steps = order.detach().sort(dim=-1).values
    repeats = steps[..., 1:] == steps[..., :-1]
    found = torch.stack([steps[..., 0].min(), steps[..., -1].max(), repeats.any().to(steps.dtype)])
    smallest, largest, repeated = found.tolist()  # waits once
    if smallest < 0:
        raise ValueError(f"{what} visits {smallest}..{largest}; tokens count from 0 to {tokens - 1}.")
    if largest >= tokens:
        raise ValueError(f"{what} visits {smallest}..{largest}, but there are {tokens} tokens; pass tokens= too.")
    if repeated:
        twice = int(steps[..., 1:][repeats][0])
        raise ValueError(f"{what} visits token {twice} more than once on one route; each may stand in a route once.")
    remember(order, tokens)


def is_known(order: Tensor, tokens: int) -> bool:
    """Whether an order was looked at, or vouched for, and is unchanged since."""
    state = _state(order, tokens)
    return state is not None and _SEEN.get(order) == state


def remember(order: Tensor, tokens: int) -> None:
    """Vouch for an order that is right by the way it was made."""
    state = _state(order, tokens)
    if state is not None:
        _SEEN[order] = state


def _state(order: Tensor, tokens: int) -> tuple[int, int] | None:
    """What a look stays valid for; None for inference tensors, which do not count their changes."""
    return None if order.is_inference() else (tokens, order._version)


def capturing(order: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which must not wait; kernels skip what does not exist anyway."""
    return order.is_cuda and torch.cuda.is_current_stream_capturing()
