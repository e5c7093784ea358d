"""Texts: what a model that is given ids shows of their tokens, and how it is run on embeddings in their place."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn._types import Bool, Float, Int
from mamba_attn.errors import TraceError, UnsupportedModelError

_MASK, _EMBEDDINGS = "attention_mask", "inputs_embeds"
SEVERAL = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")  # say where texts begin that lie in one row
ONE_EACH = (
    "several texts in one row, whose states begin anew inside it: give each text a row of its own, with an "
    "attention_mask."
)
_CACHES = ("past_key_values", "cache", "cache_params")


def is_text(value: object) -> bool:
    """Whether a value is a batch of ids: integers, (batch, tokens)."""
    return isinstance(value, Tensor) and value.ndim == 2 and not _is_real(value.dtype)


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex or dtype == torch.bool


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has an argument of a name."""
    return name in inspect.signature(model.forward).parameters


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's call by the names in its forward; further ones by their number.

    Args:
        model: that is called.
        args: of the call.
        kwargs: of the call.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    names += [str(number) for number in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def real_tokens(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Bool[Tensor, "batch tokens"] | None:
    """Return which tokens of a call's texts are no padding; None for a call without texts.

    A text is what the call's first tensor holds: ids, or as ``inputs_embeds`` their embeddings. Padding is where its
    ``attention_mask`` of (batch, tokens) is 0; other masks say of pairs of tokens what may be read, and not of tokens.

    Args:
        model: that is called.
        args: of the call.
        kwargs: of the call.

    Raises:
        ValueError: ids that no embedding of the model has, or no tokens at all.
        UnsupportedModelError: weights that cannot be computed with here.
    """
    if not any(map(is_text, (*args, *kwargs.values()))) and _EMBEDDINGS not in kwargs:
        return None
    given = named_arguments(model, args, kwargs)
    name, first = next(((name, v) for name, v in given.items() if isinstance(v, Tensor)), ("", None))
    if not isinstance(first, Tensor) or not (is_text(first) or (name == _EMBEDDINGS and first.ndim == 3)):
        return None
    require_weights(model)
    if is_text(first):
        require_ids(model, first)
    mask = given.get(_MASK)
    if isinstance(mask, Tensor) and mask.shape == first.shape[:2]:
        return mask.detach() != 0
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)


def require_ids(model: nn.Module, ids: Int[Tensor, "batch tokens"]) -> None:
    """Refuse ids that no embedding of a model has.

    Args:
        model: that is given them.
        ids: of its texts.

    Raises:
        ValueError: no tokens at all, or an id below 0 or above those of the largest embedding.
    """
    if ids.numel() == 0:
        raise ValueError(
            f"ids{tuple(ids.shape)}: the text is empty; give at least one token, e.g. the one that begins."
        )
    rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    low, high = (int(end) for end in ids.aminmax())
    if rows and (low < 0 or high >= max(rows)):
        raise ValueError(
            f"ids{tuple(ids.shape)}: {low if low < 0 else high} is no token of this {type(model).__name__}, whose ids "
            f"are 0..{max(rows) - 1}; use the tokenizer that belongs to the model."
        )


def require_weights(model: nn.Module) -> None:
    """Refuse weights that cannot be computed with here.

    Args:
        model: that reads text.

    Raises:
        UnsupportedModelError: 8-bit numbers on a CPU, or a quantised ``dt_proj``, whose weight is no tensor.
    """
    for name, value in model.named_parameters():
        if value.dtype.is_floating_point and value.dtype.itemsize < 2 and value.device.type == "cpu":
            raise UnsupportedModelError(
                f"{name} is {str(value.dtype).removeprefix('torch.')}, which PyTorch does not compute with on a CPU: "
                "load the model with dtype=torch.bfloat16 or float32."
            )
    for name, module in model.named_modules():
        if name.endswith("dt_proj") and not isinstance(getattr(module, "weight", None), Tensor):
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, quantised: take the model as it was before, loaded without a "
                "quantization_config."
            )


def require_prefill(kwargs: Mapping[str, Any]) -> None:
    """Refuse a call with a cache that holds tokens, or with several texts in one row.

    Args:
        kwargs: of the call.

    Raises:
        UnsupportedModelError: it is a step of generating, with the states of earlier tokens; or packed sequences.
    """
    packed = [name for name in SEVERAL if kwargs.get(name) is not None]
    if packed:
        raise UnsupportedModelError(f"trace: the model is called with {packed[0]}, {ONE_EACH}")
    for name in _CACHES:
        try:
            length = getattr(kwargs.get(name), "get_seq_length", int)()
        except ValueError:  # a cache of scans alone does not count; what the mixers return tells
            length = 0
        if length:
            raise UnsupportedModelError(
                f"trace: the model is called with {name}, which holds {length} tokens, so that this is a step of "
                "generating, and what its tokens read is not all here: generate first, then trace the whole text in "
                "one forward; a causal model gives the same rows."
            )


class Embedded:
    """A model whose ids are looked up by an embedding, and that can be run on other embeddings.

    Args:
        model: the model.
        args: of a call with ids.
        kwargs: of that call.
        ids: among them.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], ids: Tensor) -> None:
        self.model = model
        self.args = args
        self.kwargs = dict(kwargs)
        self.ids = ids

    @cached_property
    def _looked_up(self) -> tuple[nn.Embedding, Tensor]:
        """The embedding that is given the ids, and what it returns.

        Raises:
            TraceError: none is.
        """
        found: list[tuple[nn.Embedding, Tensor]] = []

        def keep(module: nn.Embedding, args: tuple[Any, ...], output: Tensor) -> None:
            if not found and args and isinstance(args[0], Tensor) and torch.equal(args[0], self.ids):
                found.append((module, output.detach()))

        hooks = [m.register_forward_hook(keep) for m in self.model.modules() if isinstance(m, nn.Embedding)]
        try:
            with torch.no_grad():
                self.model(*self.args, **self.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            raise TraceError(
                f"{type(self.model).__name__} looks its ids up in no torch.nn.Embedding, so that embeddings cannot be "
                "given in their place; use a method that reads scans (RawAttention, MambaLRP)."
            )
        return found[0]

    @property
    def values(self) -> Float[Tensor, "batch tokens features"]:
        """The embeddings of the ids."""
        return self._looked_up[1]

    def of(self, ids: Tensor) -> Float[Tensor, "*ids features"]:
        """Return the embeddings of other ids."""
        weight = self._looked_up[0].weight.detach()
        return weight[ids.to(weight.device)]

    def run(self, model: nn.Module, values: Float[Tensor, "copies tokens features"]) -> Any:
        """Call a model with embeddings in the place of those of the ids.

        Args:
            model: the model, or a copy that has the same embedding.
            values: of as many texts as there were, or of several copies of them, one behind the other.
        """
        copies = len(values) // len(self.ids)

        def repeated(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self.ids)
            return value.repeat(copies, *[1] * (value.ndim - 1)) if batched and copies > 1 else value

        with self._given(values):
            return model(*map(repeated, self.args), **{name: repeated(v) for name, v in self.kwargs.items()})

    @contextmanager
    def _given(self, values: Tensor) -> Iterator[None]:
        hook = self._looked_up[0].register_forward_hook(lambda module, args, output: values)
        try:
            yield
        finally:
            hook.remove()
