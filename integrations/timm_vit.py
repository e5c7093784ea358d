"""ViT and DeiT as timm builds them (arXiv 2010.11929, 2012.12877): plain softmax attention, class tokens first.

MambaVision's attention is the same, of the tokens of one window at a time.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.ops import require_bytes
from mamba_attn.tracing.adapters import AttentionAdapter, LayoutSource, Seen, has_parts

_PARTS = ("qkv", "proj", "num_heads", "scale")


class TimmViTAdapter(AttentionAdapter):
    """Modules with the attributes of timm's Attention, fused or not, with or without norms of queries and keys."""

    family: ClassVar[str] = "timm ViT"

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has a joint projection to queries, keys and values, and heads."""
        return has_parts(module, _PARTS)

    def project(
        self,
        module: nn.Module,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        rules: Rules,
        seen: Seen,
    ) -> AttentionRecord:
        """Return the probabilities and the values.

        Raises:
            UnsupportedModelError: a mask, or an input that is not (batch, tokens, features).
            MatrixTooLargeError: the matrix of all windows together would not fit into memory.
        """
        if attn_mask is not None or is_causal:
            given = "is_causal=True" if attn_mask is None else "an attn_mask"
            raise UnsupportedModelError(
                f"family {self.family}: the model calls its attention with {given}, which this adapter does not know."
            )
        if x.ndim != 3:
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} got an input of shape {tuple(x.shape)}; this adapter "
                "knows attention over (batch, tokens, features)."
            )
        joint = rearrange(
            module.get_submodule("qkv")(x),
            "batch tokens (three heads width) -> three batch heads tokens width",
            three=3,
            heads=cast(int, module.num_heads),
        )
        query, key = _norm(module, "q_norm", joint[0], rules), _norm(module, "k_norm", joint[1], rules)
        # the fused kernel scales by the heads' width, whatever the module's scale
        scale = joint.shape[-1] ** -0.5 if getattr(module, "fused_attn", False) else cast(float, module.scale)
        gate = getattr(module, "gate", None)
        gate = None if gate is None else rules.activation(torch.sigmoid, gate(x)).mT
        probabilities, layout = ((query * scale) @ key.mT).softmax(-1), seen.frame_of(module, *x.shape[:2])
        if layout is None:
            return AttentionRecord(probabilities=probabilities, value=joint[2], gate=gate)
        if layout.tokens > x.shape[1]:
            _require_memory(probabilities, layout)
        return AttentionRecord.from_windows(probabilities, joint[2], gate, layout)

    def finish(self, module: nn.Module, record: AttentionRecord, probabilities: Tensor, rules: Rules) -> Tensor:
        """Return the projected output."""
        mixed = _mixed(module, record, probabilities, rules, getattr(module, "attn_drop", None))
        output: Tensor = module.get_submodule("proj")(mixed)
        dropout: nn.Module | None = getattr(module, "proj_drop", None)
        return output if dropout is None else dropout(output)

    def mixed_values(
        self, module: nn.Module, record: AttentionRecord, probabilities: Tensor
    ) -> tuple[nn.Module, Tensor]:
        """Return proj, which receives the heads' concatenated output."""
        return module.get_submodule("proj"), _mixed(module, record, probabilities, Rules())

    def layout_sources(self, model: nn.Module) -> Iterable[LayoutSource]:
        """Return the patch embedding's convolution: its output is the grid."""
        for module in model.modules():
            projection = getattr(getattr(module, "patch_embed", None), "proj", None)
            if isinstance(projection, nn.Conv2d) and hasattr(module, "blocks"):
                return [LayoutSource(projection, _LayoutReader(module, projection))]
        return []


def _norm(module: nn.Module, name: str, x: Tensor, rules: Rules) -> Tensor:
    norm: nn.Module | None = getattr(module, name, None)
    if norm is None:
        return x
    result: Tensor = norm(x) if isinstance(norm, nn.Identity) else rules.norm(norm, x)
    return result


def _mixed(
    module: nn.Module, record: AttentionRecord, probabilities: Tensor, rules: Rules, dropout: nn.Module | None = None
) -> Float[Tensor, "sequences length channels"]:
    """Return the heads' concatenated output, normed and gated if the module does that."""
    heads = record.mixed(probabilities, dropout or nn.Identity())
    mixed = _norm(module, "norm", rearrange(heads, "batch heads tokens width -> batch tokens (heads width)"), rules)
    if record.gate is None:
        return mixed
    return rules.gate(mixed, record.gate.mT if record.layout is None else record.layout.to_windows(record.gate.mT, 1))


def _require_memory(probabilities: Tensor, layout: TokenLayout) -> None:
    """Refuse windows whose probabilities would not fit into memory as one matrix of the image."""
    sequences, heads, length = probabilities.shape[:3]
    images, side = sequences * length // layout.tokens, layout.tokens
    require_bytes(
        f"the probabilities of {heads} heads over all windows ({images} images, {side} x {side})",
        images * heads * side**2 * probabilities.element_size(),
        probabilities.device,
        "Trace fewer images at once, smaller ones, or other layers, with layers=.",
    )


class _LayoutReader:
    def __init__(self, model: nn.Module, projection: nn.Conv2d) -> None:
        self.model = model
        self.projection = projection

    def __call__(self, seen: Seen, inputs: tuple[Any, ...], output: Tensor) -> TokenLayout | None:
        embed = self.model.patch_embed
        ratio = getattr(embed, "feature_ratio", None) if hasattr(embed, "backbone") else 1  # of a hybrid's features
        ratio = (ratio, ratio) if isinstance(ratio, int) else ratio
        kernel, stride = self.projection.kernel_size, self.projection.stride
        if ratio is None or kernel[0] != kernel[1] or stride[0] != stride[1] or ratio[0] != ratio[1]:
            return None  # patches that are not square
        # timm's order: class token, distillation token, registers, patches
        classes = sum(getattr(self.model, name, None) is not None for name in ("cls_token", "dist_token"))
        registers = getattr(self.model, "reg_token", None)
        total = getattr(self.model, "num_prefix_tokens", classes + (0 if registers is None else registers.shape[1]))
        if getattr(self.model, "global_pool", "token") not in ("token", ""):
            classes = 0  # the head does not read the class token, so it is a register
        return TokenLayout(
            grid=(output.shape[-2], output.shape[-1]),
            patch_size=kernel[0] * ratio[0],
            stride=stride[0] * ratio[0],
            class_tokens=tuple(range(classes)),
            registers=tuple(range(classes, total)),
        )


ADAPTER = TimmViTAdapter()
