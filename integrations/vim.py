"""Vim (arXiv 2401.09417), its forks, and Mamba-Reg (arXiv 2405.14858): Mamba mixers that may run in both directions."""

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.models import vim_mixer
from mamba_attn.tracing.adapters import Seen

from .mamba import MambaAdapter, is_ours

_MARKS = ("A_b_log", "bimamba_type", "biscan")
_BACKWARD = ("A_b_log", "D_b", "conv1d_b", "x_proj_b", "dt_proj_b")
_PRESENT = {"v1": _BACKWARD[:1], "v2": _BACKWARD, "none": ()}  # by bimamba_type
_MODEL_SETTINGS = {
    "if_rope": "rotates tokens between its layers",
    "if_rope_residual": "rotates tokens between its layers",
    "if_bidirectional": "gives every second layer the tokens backwards",
}


class VimAdapter(MambaAdapter):
    """Mixers with Vim's names: bimamba_type v1, v2 or none, with or without division of the summed directions."""

    family: ClassVar[str] = "Vim"
    treats: ClassVar[str] = "mixers with the parts of Vim's bimamba v1, v2 and none alone"
    children: ClassVar[tuple[str, ...]] = (*MambaAdapter.children, "conv1d_b", "x_proj_b", "dt_proj_b")
    parameters: ClassVar[tuple[str, ...]] = (*MambaAdapter.parameters, "A_b_log", "D_b", "gamma")
    settings: ClassVar[tuple[str, ...]] = (
        *MambaAdapter.settings,
        "bimamba_type",
        "biscan",
        "if_divide_out",
        "if_devide_out",
        "init_layer_scale",
        # forks that keep maps in addition to the output
        "compute_diff_maps",
        "compute_attn_gradients",
        "saveAttnMat",
        "saveAttnVec",
    )

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module has projections, and attributes of a second direction."""
        projections = hasattr(module, "in_proj") and hasattr(module, "out_proj")
        return projections and any(hasattr(module, name) for name in _MARKS)

    def refusal(self, module: nn.Module, model: nn.Module) -> str | None:
        """Refuse unknown parts, directions other than Vim's, and models that move tokens between layers."""
        reason = super().refusal(module, model)
        return reason if reason or is_ours(module) else _other_directions(module) or next(_moving(model), None)

    def project(self, module: nn.Module, *args: Any, rules: Rules, seen: Seen, **kwargs: Any) -> ScanRecord:
        """Return everything before the scans, and warn if the model's own code skips one of them."""
        if hasattr(module, "A_b_log") and len(vim_mixer.scans(module)) == 1:
            seen.warn_once(
                f"{type(module).__name__} has use_fast_path=False: Vim's own code then runs the forward direction "
                "alone and halves nothing, and so does this trace. Set use_fast_path = True on its mixers for both."
            )
        return super().project(module, *args, rules=rules, seen=seen, **kwargs)


def _other_directions(module: nn.Module) -> str | None:
    """Return why the directions of a mixer with known parts are unsupported, or None."""
    kind: object = getattr(module, "bimamba_type", None)
    if kind is None:
        kind = {True: "v2", False: "none"}.get(getattr(module, "biscan", None))  # type: ignore[arg-type]
    if not isinstance(kind, str) or kind not in _PRESENT:
        return f"its bimamba_type is {kind!r}; this adapter knows {', '.join(_PRESENT)} (and biscan=True or False)."
    present = tuple(name for name in _BACKWARD if hasattr(module, name))
    if present != _PRESENT[kind]:
        return f"its bimamba_type is {kind!r} and of {', '.join(_BACKWARD)} it has {', '.join(present) or 'none'}."
    names = inspect.unwrap(type(module).forward).__code__.co_names
    unread = [name for name in present if name not in names]
    if "A_log" in names and unread:  # a forward that reads its own parts, like ARM's
        return f"its bimamba_type is {kind!r} and its forward does not read {', '.join(unread)}."
    divides = {bool(getattr(module, name)) for name in ("if_divide_out", "if_devide_out") if hasattr(module, name)}
    return "its if_divide_out and if_devide_out differ." if len(divides) == 2 else None


def _moving(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        for name, what in _MODEL_SETTINGS.items():
            if vars(module).get(name):
                yield f"{type(module).__name__} has {name}=True, which {what}; that is not treated exactly yet."


ADAPTER = VimAdapter()
