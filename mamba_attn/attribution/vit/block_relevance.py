"""Layer-wise relevance propagation through timm's ViT and DeiT (arXiv 2012.09838), from the logits to the attention.

Nothing is installed on the model: its tokens are computed once more, module by module, and relevance is taken back the
same way. Parts without a rule in this file raise an error that names them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.errors import UnsupportedModelError

_MODELS = ("VisionTransformer", "VisionTransformerDistilled")
_CHILDREN = {
    "": {
        "patch_embed",
        "pos_drop",
        "patch_drop",
        "norm_pre",
        "blocks",
        "norm",
        "fc_norm",
        "head_drop",
        "head",
        "head_dist",
    },
    "block": {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"},
    "attn": {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"},
    "mlp": {"fc1", "act", "drop1", "norm", "fc2", "drop2"},
}
# layers by what they are, by name: timm has norms, activations and scales of its own under these names
_ELEMENT_WISE = {
    "LayerNorm",
    "Identity",
    "GELU",
    "GELUTanh",
    "QuickGELU",
    "ReLU",
    "SiLU",
    "LayerScale",
    "Dropout",
    "DropPath",
}
_LINEAR = ("qkv", "proj", "fc1", "fc2", "head", "head_dist")
_NESTED = ("patch_embed", "patch_drop", "blocks", "attn", "mlp")  # looked into, or before the attention
_POOLS = ("token", "avg")
_SMALL = 1e-9


@dataclass(frozen=True)
class Kept:
    """What one block computed, all (batch, tokens, features) but query, key, value: (batch, heads, tokens, width)."""

    x: Tensor
    normed: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    probabilities: Float[Tensor, "batch heads tokens tokens"]
    heads: Tensor  # side by side, after the norm that some have: what proj receives
    attended: Tensor  # the branch, as it is added
    middle: Tensor
    normed2: Tensor
    hidden: Tensor  # what fc2 receives
    transformed: Tensor


def require_known(call: str, model: Any) -> None:
    """Refuse a model with parts that have no rule here.

    Raises:
        UnsupportedModelError: it is no ViT of timm, or has other parts; they are named.
    """
    instead = "; use variant='gradient_x_attention', which needs the attention alone."
    if type(model).__name__ not in _MODELS or not hasattr(model, "_pos_embed"):
        raise UnsupportedModelError(
            f"{call}: relevance is propagated through timm's {' and '.join(_MODELS)}, but this is "
            f"{type(model).__name__}{instead}"
        )
    foreign = list(_foreign("", model, ""))
    for index, block in enumerate(model.blocks):
        where = f"blocks.{index}"
        if type(block).__name__ != "Block":
            foreign.append(f"{where} ({type(block).__name__})")
            continue
        foreign += _foreign("block", block, where)
        foreign += _foreign("attn", block.attn, f"{where}.attn")
        foreign += _foreign("mlp", block.mlp, f"{where}.mlp")
    if model.global_pool not in _POOLS:
        foreign.append(f"global_pool={model.global_pool!r}")
    if foreign:
        shown = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise UnsupportedModelError(f"{call}: no relevance rule is known for {shown}{instead}")


def _foreign(kind: str, module: nn.Module, where: str) -> Iterator[str]:
    """Yield the names of parts that are unknown or of an unexpected type."""
    for name, child in module.named_children():
        own = f"{where}.{name}".lstrip(".")
        if name not in _CHILDREN[kind]:
            yield own
            continue
        linear = name in _LINEAR and type(child) is not nn.Linear
        other = name not in (*_LINEAR, *_NESTED) and type(child).__name__ not in _ELEMENT_WISE
        if linear or other:
            yield f"{own} ({type(child).__name__})"


def run(model: Any, images: Tensor) -> tuple[list[Kept], Tensor]:
    """Run the model; return the intermediate values of every block, and the tokens after the last norm."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    kept = []
    for block in model.blocks:
        kept.append(_block(block, x))
        x = kept[-1].middle + kept[-1].transformed
    return kept, model.norm(x)


def _block(block: Any, x: Tensor) -> Kept:
    attention, mlp = block.attn, block.mlp
    normed = block.norm1(x)
    joint = rearrange(
        attention.qkv(normed),
        "batch tokens (three heads width) -> three batch heads tokens width",
        three=3,
        heads=attention.num_heads,
    )
    query, key = attention.q_norm(joint[0]), attention.k_norm(joint[1])
    probabilities = attention.attn_drop((query * attention.scale @ key.mT).softmax(-1))
    heads = rearrange(probabilities @ joint[2], "batch heads tokens width -> batch tokens (heads width)")
    heads = getattr(attention, "norm", nn.Identity())(heads)
    attended = block.drop_path1(block.ls1(attention.proj_drop(attention.proj(heads))))
    middle = x + attended
    normed2 = block.norm2(middle)
    hidden = mlp.norm(mlp.drop1(mlp.act(mlp.fc1(normed2))))
    transformed = block.drop_path2(block.ls2(mlp.drop2(mlp.fc2(hidden))))
    return Kept(x, normed, query, key, joint[2], probabilities, heads, attended, middle, normed2, hidden, transformed)


def logits_of(model: Any, tokens: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch classes"]:
    """Return the output of the head."""
    logits: Tensor = model.forward_head(tokens)
    return logits


def from_logits(model: Any, relevance: Float[Tensor, "batch classes"], tokens: Tensor) -> Tensor:
    """Relevance of the tokens after the last block, from that of the logits."""
    result = torch.zeros_like(tokens)
    if hasattr(model, "head_dist"):  # the mean of two heads, of the first two tokens
        outputs = [model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])]
        parts = through_add(relevance, *outputs)
        for index, (head, part) in enumerate(zip((model.head, model.head_dist), parts, strict=True)):
            result[:, index] = through_linear(part, tokens[:, index], head.weight)
        return result
    first = 0 if model.global_pool == "token" or getattr(model, "pool_include_prefix", False) else None
    first = model.num_prefix_tokens if first is None else first
    pooled = tokens[:, 0] if model.global_pool == "token" else tokens[:, first:].mean(1)
    part = through_linear(relevance, model.fc_norm(pooled), model.head.weight)
    if model.global_pool == "token":
        result[:, 0] = part
    else:
        result[:, first:] = through_mean(part, tokens[:, first:])
    return result


def through_block(
    block: Any, relevance: Tensor, kept: Kept
) -> tuple[Tensor, Float[Tensor, "batch heads tokens tokens"]]:
    """Relevance of a block's input, and R(A) of its probabilities, from that of its output."""
    residual, branch = through_add(relevance, kept.middle, kept.transformed)
    branch = through_linear(branch, kept.hidden, block.mlp.fc2.weight)
    relevance = residual + through_linear(branch, kept.normed2, block.mlp.fc1.weight)
    residual, branch = through_add(relevance, kept.x, kept.attended)
    branch = through_linear(branch, kept.heads, block.attn.proj.weight)
    branch = rearrange(
        branch, "batch tokens (heads width) -> batch heads tokens width", heads=kept.probabilities.shape[1]
    )
    attention, value = through_product(branch, kept.probabilities, kept.value)
    query, key = through_product(attention, kept.query, kept.key.mT)
    joint = rearrange([query, key.mT, value], "three batch heads tokens width -> batch tokens (three heads width)")
    return residual + through_linear(joint, kept.normed, block.attn.qkv.weight), attention


# How relevance goes through one operation: arXiv 2012.09838 (section 3) and its code, alpha = 1, beta = 0. Every rule
# conserves: relevance of the inputs sums to that of the outputs, except for outputs that are zero. Element-wise
# operations (activations, norms, softmax, layer scale) pass relevance on unchanged and have no function here.


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide a by b, with b moved away from zero by 1e-9; 0 where b is 0."""
    away = b + torch.where(b < 0, -_SMALL, _SMALL)
    return torch.where(b == 0, 0, a / away)


def through_linear(
    relevance: Float[Tensor, "*batch outputs"],
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
) -> Float[Tensor, "*batch inputs"]:
    """Through x @ weight^T + bias: in proportion to the positive products x_i w_ji, the bias left out."""
    high, low = weight.clamp(min=0), weight.clamp(max=0)
    positive, negative = x.clamp(min=0), x.clamp(max=0)
    share = divide(relevance, positive @ high.mT + negative @ low.mT)
    return positive * (share @ high) + negative * (share @ low)


def through_product(relevance: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Through a @ b: in proportion to each term, half to either factor."""
    share = divide(relevance, a @ b) / 2
    return a * (share @ b.mT), b * (a.mT @ share)


def through_add(
    relevance: Float[Tensor, "batch *shape"], a: Float[Tensor, "batch *shape"], b: Float[Tensor, "batch *shape"]
) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
    """Through a + b: in proportion to both, then each scaled, image by image, to |its sum| of all."""
    share = divide(relevance, a + b)
    parts = (a * share, b * share)
    sums = [part.flatten(1).sum(1) for part in parts]
    total = divide(relevance.flatten(1).sum(1), sums[0].abs() + sums[1].abs())
    first, second = (
        part * divide(own.abs() * total, own).view(-1, *[1] * (part.ndim - 1))
        for part, own in zip(parts, sums, strict=True)
    )
    return first, second


def through_mean(relevance: Float[Tensor, "batch features"], x: Float[Tensor, "batch tokens features"]) -> Tensor:
    """Through a mean over tokens: in proportion to each token's part, which conserves like the rules above."""
    return x * divide(relevance, x.sum(1)).unsqueeze(1)
