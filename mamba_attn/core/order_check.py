"""Checks that an order's tokens exist and do not repeat: once per tensor, because the check waits for the GPU.

A matrix entry has one place in the token frame only if a route reads and writes each token at most once; an order that
repeats one would silently break y = W u + D u.
"""

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class _Seen(NamedTuple):
    tokens: int
    version: int
    padded: bool


_SEEN: MutableMapping[Tensor, _Seen] = WeakIdKeyDictionary()


def require_distinct(what: str, order: Tensor, tokens: int, *, padding: bool = False) -> bool | None:
    """Refuse an order that repeats a token on one route or visits one that does not exist.

    Args:
        what: name of the order in the message: "ScanRecord: write_order".
        order: (..., length), integers. Not checked: one seen before and unchanged since, one without values (meta),
            one inside a CUDA graph's capture or torch.compile's tracing, where the operators check at run time.
        tokens: number of tokens in the token frame.
        padding: whether -1 is allowed, a step that has no token; it may repeat.

    Returns:
        Whether there are steps without a token; None if unchecked.

    Raises:
        ValueError: the order is invalid; the message names the first offence.
    """
    if torch.compiler.is_compiling():
        return None
    known = _known(order, tokens)
    if known is not None and (padding or not known.padded):
        return known.padded
    if order.is_meta or not order.numel() or capturing(order):
        return None
    steps = order.detach().sort(dim=-1).values
    repeats = (steps[..., 1:] == steps[..., :-1]) & (steps[..., 1:] >= 0)
    found = torch.stack([steps[..., 0].min(), steps[..., -1].max(), repeats.any().to(steps.dtype)])
    transformed = torch._C._are_functorch_transforms_active()  # torch 2.5 then has no tolist()
    smallest, largest, repeated = map(int, found) if transformed else found.tolist()  # waits once
    if smallest < (-1 if padding else 0):
        allowed = ", and -1 is a step without one" if padding else ""
        raise ValueError(f"{what} visits {smallest}..{largest}; tokens count from 0 to {tokens - 1}{allowed}.")
    if largest >= tokens:
        raise ValueError(f"{what} visits {smallest}..{largest}, but there are {tokens} tokens; pass tokens= too.")
    if repeated:
        twice = int(steps[..., 1:][repeats][0])
        raise ValueError(f"{what} visits token {twice} more than once on one route; list it at most once.")
    remember(order, tokens, padded=smallest < 0)
    return bool(smallest < 0)


def is_known(order: Tensor, tokens: int) -> bool:
    """Whether an order was checked, or vouched for, and is unchanged since."""
    return _known(order, tokens) is not None


def remember(order: Tensor, tokens: int, *, padded: bool = False) -> None:
    """Vouch for an order that is valid by construction."""
    if not order.is_inference():  # inference tensors do not count their changes
        _SEEN[order] = _Seen(tokens, order._version, padded)


def _known(order: Tensor, tokens: int) -> _Seen | None:
    """Return what is known of an order; None if it changed since, or for another number of tokens."""
    seen = None if order.is_inference() else _SEEN.get(order)
    if seen is None or seen.tokens != tokens or seen.version != order._version:
        return None
    return seen


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which must not wait for values; kernels skip missing tokens anyway."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
