"""Mamba (arXiv 2312.00752) as mamba_ssm builds it: one direction, from the first token to the last."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.models import vim_mixer
from mamba_attn.tracing import patch_embedding
from mamba_attn.tracing.adapters import Adapter, LayoutSource, Seen

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")
_NAMES_SHOWN = 6


class MambaAdapter(Adapter):
    """Mixers with exactly mamba_ssm's names, on the fast path or off it."""

    family: ClassVar[str] = "Mamba"
    treats: ClassVar[str] = "mixers with the parts of mamba_ssm's Mamba alone"
    children: ClassVar[tuple[str, ...]] = ("in_proj", "conv1d", "act", "x_proj", "dt_proj", "out_proj")
    parameters: ClassVar[tuple[str, ...]] = ("A_log", "D")
    settings: ClassVar[tuple[str, ...]] = (
        "d_model",
        "d_state",
        "d_conv",
        "expand",
        "d_inner",
        "dt_rank",
        "use_fast_path",
        "layer_idx",
        "activation",
        # forks that keep maps in addition to the output
        "compute_attn_matrix",
        "compute_attn_vector",
        "old_attention",
        "ablate_attn_mat",
        "ablate_attn_vec",
        "ablate_dict",
    )

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has the parts of a Mamba mixer."""
        return all(hasattr(module, name) for name in _PARTS)

    def refusal(self, module: nn.Module, model: nn.Module) -> str | None:
        """Refuse unknown parts, settings and inputs, and parts that are not plain."""
        if is_ours(module):
            return None
        foreign = list(dict.fromkeys(self._foreign(module)))
        if foreign:
            shown = ", ".join(foreign[:_NAMES_SHOWN])
            more = f" and {len(foreign) - _NAMES_SHOWN} more" if len(foreign) > _NAMES_SHOWN else ""
            return f"it has {shown}{more}, which this adapter does not know; it treats {self.treats}."
        return _not_plain(module)

    def project(self, module: nn.Module, *args: Any, rules: Rules, seen: Seen, **kwargs: Any) -> ScanRecord:
        """Return everything before the scans, from the arguments of the mixer's forward.

        Raises:
            UnsupportedModelError: a call with a cache of states, for generating one token after another, or on
                something else than (batch, tokens, features).
        """
        given = _given(module, *args, **kwargs)
        (_, x), *others = given.items()
        foreign = [name for name, value in others if name != "orders" and value is not None]
        if foreign:
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} was called with {', '.join(foreign)}, which this "
                "adapter does not know; it treats whole sequences, one in a row, without the cache (inference_params) "
                "for inference step by step."
            )
        if x.ndim != 3:
            raise UnsupportedModelError(
                f"family {self.family}: {type(module).__name__} got an input of shape {tuple(x.shape)}; this adapter "
                "knows (batch, tokens, features)."
            )
        layout = seen.layout if seen.layout is not None and seen.layout.tokens == x.shape[1] else None
        return vim_mixer.project(module, x, orders=given.get("orders"), rules=rules, layout=layout)

    def finish(self, module: nn.Module, record: ScanRecord, y: Tensor, rules: Rules) -> Tensor:
        """Return the gated, projected output."""
        return vim_mixer.finish(module, record, y, rules)

    def scan_output(self, module: nn.Module, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return out_proj, which receives the gated sum of the directions."""
        gated = y if record.gate is None else y * record.gate
        out_proj: nn.Module = module.get_submodule("out_proj")
        return out_proj, gated.mT

    def layout_sources(self, model: nn.Module) -> Iterable[LayoutSource]:
        """Return the patch embedding and the first layer, if the model has them."""
        return patch_embedding.layout_sources(model)

    def _foreign(self, module: nn.Module) -> Iterator[str]:
        """Yield names of unknown inputs, submodules, parameters, buffers and settings."""
        signature = inspect.signature(type(module).forward)
        known = ("inference_params", "orders", *_open_ended(signature))
        yield from (name for name in list(signature.parameters)[2:] if name not in known)
        yield from (name for name, _ in module.named_children() if name not in self.children)
        yield from (name for name, _ in module.named_parameters(recurse=False) if name not in self.parameters)
        yield from (name for name, _ in module.named_buffers(recurse=False))
        for name, value in vars(module).items():
            own = name.startswith("_") or name in ("training", "forward", *self.settings)
            if not own and value is not None and not isinstance(value, Tensor):  # tensors are results that forks keep
                yield name


def is_ours(module: nn.Module) -> bool:
    """Whether the library's own forward runs: it calls its parts as modules, and nothing else of the mixer matters.

    Args:
        module: a mixer.
    """
    return type(module).forward is vim_mixer.VimMixer.forward


def _given(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a mixer's forward by name; also if the forward was set on the instance."""
    signature = inspect.signature(module.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name in _open_ended(signature):
        given.update(given.pop(name, {}))
    for name in [name for name, value in signature.parameters.items() if value.kind is value.VAR_POSITIONAL]:
        given.update({f"{name}[{index}]": value for index, value in enumerate(given.pop(name, ()))})
    return given


def _open_ended(signature: inspect.Signature) -> list[str]:
    """Return the name of ``**`` arguments, if any; their contents are checked in every call."""
    return [name for name, value in signature.parameters.items() if value.kind is value.VAR_KEYWORD]


def _not_plain(module: nn.Module) -> str | None:
    """Return why a part of a foreign mixer is not plain, or None.

    Forwards of mamba_ssm and Vim read ``weight`` of most parts and never call them.
    """
    for name, child in module.named_children():
        kind = nn.SiLU if name == "act" else nn.Conv1d if name.startswith("conv1d") else nn.Linear
        if type(child).forward is not kind.forward:
            return (
                f"its {name} is a {type(child).__module__}.{type(child).__name__} instead of torch's {kind.__name__}. "
                f"Mamba's own forward reads {name}.weight and may never call {name}, so what wraps it may not act; "
                "merge it into the weights first, e.g. LoRA by model = model.merge_and_unload()."
            )
        if isinstance(child, nn.Conv1d) and not _is_causal(child):
            return f"its {name}, {child}, is not causal and depthwise with padding=kernel_size - 1 at the front."
        if name.startswith("x_proj") and child.bias is not None:
            return f"its {name} has a bias, which mamba_ssm's fast path leaves out."
        if name.startswith("dt_proj") and child.bias is None:
            return f"its {name} has no bias, which mamba_ssm's mixers read."
    if getattr(module, "activation", "silu") not in ("silu", "swish"):
        return f"its activation is {module.activation!r}, not SiLU."
    return None


def _is_causal(convolution: nn.Conv1d) -> bool:
    """Whether the convolution, cut to the input's length, is that of a Mamba mixer."""
    width = convolution.kernel_size[0]
    depthwise = convolution.groups == convolution.in_channels == convolution.out_channels
    usual = convolution.stride == convolution.dilation == (1,) and convolution.padding_mode == "zeros"
    return depthwise and usual and convolution.padding == (width - 1,)


ADAPTER = MambaAdapter()
