"""What a family of models must say about itself to be traced, and the registry of those that do.

An adapter is small, and used where its output is the module's own. The families' adapters stand in
``mamba_attn.integrations`` and are found by name; ``register_adapter`` adds one of your own.
``mamba_attn.testing.check_adapter`` tests it.
"""

import importlib
import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.rules import Rules
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.tracing.running import modules_of

_OF_SCANS = ("A_log", "A_logs", "dt_bias")
_NAMES = ("mamba", "mamba2", "ssm", "ssd")  # with which names of classes end
# asked in this order
_FAMILIES = ("vim", "language_mixers", "mamba", "vmamba", "vssd", "mambavision", "timm_vit")


@dataclass
class Seen:
    """What a forward pass has shown so far.

    Args:
        batch: number of images.
        image_size: (rows, columns) of the model's input in pixels.
        padded_stem: whether the first convolution is padded to see around a pixel, as ``padding = (kernel - 1) / 2``.
        layout: the token frame, from the patch embedding or from the user.
        frames: the token frames of single modules, where a model's parts have their own.
        embedded: the token frame of sequences of an image's patches, as a look ahead of the pass measured it.
        real: which tokens of texts are no padding, (batch, tokens), of a model that is given texts.
    """

    batch: int | None = None
    image_size: tuple[int, int] | None = None
    padded_stem: bool = False
    layout: TokenLayout | None = None
    frames: dict[nn.Module, TokenLayout] = field(default_factory=dict)
    embedded: TokenLayout | None = None
    real: Tensor | None = None
    _warned: set[str] = field(default_factory=set, init=False, repr=False)

    def warn_once(self, sentence: str) -> None:
        """Warn of something that many mixers of a model share, once in a trace.

        Args:
            sentence: what happens, and what to do.
        """
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, UserWarning, stacklevel=2)

    def grid_layout(self, height: int, width: int, window: int | None = None) -> TokenLayout:
        """Return the layout of a pyramid's stage, whose grid is the image's divided by a power of two.

        Stages round down or up. Of the powers that give this grid, the one nearest to image / grid is taken. Where none
        does, the image may be cut into squares of another size, or divided along one axis alone; else the grid may be
        that of another of the model's inputs, and the nearest power is taken.

        Args:
            height: of the stage's grid.
            width: of the stage's grid.
            window: side of the windows that its tokens are mixed within, if they are.
        """
        rows, columns = self.image_size or (height, width)

        def distance(size: int) -> float:
            return abs(math.log2(rows / (height * size))) + abs(math.log2(columns / (width * size)))

        sizes = [2**power for power in range(max(rows, columns).bit_length() + 1)]
        fitting = [
            s for s in sizes if rows // s <= height <= -(-rows // s) and columns // s <= width <= -(-columns // s)
        ]
        each = (max(1, round(rows / height)), max(1, round(columns / width)))
        # the stages' convolutions between tokens are padded like the stem's
        offset = 0.5 if self.padded_stem else None
        squares = each[0] == each[1] and (rows, columns) == (height * each[0], width * each[1])
        if not fitting and squares:
            side: int | tuple[int, int] = each[0]
        elif not fitting and min(each) == 1 < max(each):
            side = each
        else:
            side = min(fitting or sizes, key=distance)
        return TokenLayout((height, width), side, offset=offset, window=window)

    def frame_of(self, module: nn.Module, sequences: int, length: int) -> TokenLayout | None:
        """Return the token frame of a mixer that was called on ``sequences`` of ``length`` tokens, if it is known.

        A frame with windows is one whose windows of all images the sequences are; another, one of ``length`` tokens.

        Args:
            module: the mixer.
            sequences: size of its input's first axis.
            length: size of the axis of tokens.
        """
        for layout in (self.layout, self.frames.get(module)):
            if layout is None:
                continue
            windows, inside = layout.windows().shape
            images = sequences if layout.window is None else self.batch
            if inside == length and images is not None and sequences == images * windows:
                return layout
        return None


@dataclass(frozen=True)
class LayoutSource:
    """A submodule whose call shows the token frame.

    Args:
        module: the submodule.
        read: function of what was seen so far and the submodule's (inputs, output) that returns the layout, or None
            when it is not known.
        before: whether the inputs are read, when the submodule starts, with None for the output.
        inside: whether the frame is that of the modules inside the submodule, and not of the whole model.
    """

    module: nn.Module
    read: Callable[[Seen, tuple[Any, ...], Any], TokenLayout | None]
    before: bool = False
    inside: bool = False


class MixerAdapter(ABC):
    """What the adapters of scans and of softmax attention have in common."""

    family: ClassVar[str]

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether the module is a mixer of this family, by its attributes; never by names of classes alone."""

    def alternatives(self, module: nn.Module) -> "Iterable[AnyAdapter]":
        """Return adapters for what this module may compute; the first whose output agrees is used.

        Args:
            module: the mixer.
        """
        if not isinstance(self, Adapter | AttentionAdapter):
            raise TypeError(f"{type(self).__name__}: expected a subclass of Adapter or AttentionAdapter.")
        return (self,)

    def refusal(self, module: nn.Module, model: nn.Module) -> str | None:
        """Return why this variant cannot be treated exactly, or None; its output is compared with the module's anyway.

        Args:
            module: the mixer.
            model: the model that holds it.
        """
        return None

    def layout_sources(self, model: nn.Module) -> Iterable[LayoutSource]:
        """Return where the token frame of this family's model can be read, when the mixers' inputs do not show it."""
        return ()


class Adapter(MixerAdapter):
    """A family of mixers of selective scans; subclass it, give ``family`` a name, register an instance.

    Example:
        >>> from mamba_attn.integrations.vim import ADAPTER
        >>> isinstance(ADAPTER, Adapter), ADAPTER.recognises(model.layers[0].mixer)
        (True, True)
    """

    @abstractmethod
    def project(self, module: Any, *args: Any, **kwargs: Any) -> ScanRecord:
        """Return everything before the scans, from the arguments of the mixer's forward.

        Two keyword arguments come with them: ``rules`` (Rules), what an attribution method changes, and ``seen``
        (Seen), what the forward pass has shown of the image so far.
        """

    @abstractmethod
    def finish(self, module: Any, record: ScanRecord, y: Tensor, rules: Rules) -> Any:
        """Return the mixer's output from the scans' merged output y (batch, channels, tokens)."""

    @abstractmethod
    def scan_output(self, module: Any, record: ScanRecord, y: Tensor) -> tuple[nn.Module, Tensor]:
        """Return the submodule that receives y, and y in the form it receives: what law 1 is checked against."""


class AttentionAdapter(MixerAdapter):
    """A family of softmax-attention modules; subclass it, give ``family`` a name, register an instance.

    Example:
        >>> from mamba_attn.integrations.timm_vit import ADAPTER
        >>> isinstance(ADAPTER, AttentionAdapter), ADAPTER.recognises(vit.blocks[0].attn)
        (True, True)
    """

    @abstractmethod
    def project(self, module: Any, *args: Any, **kwargs: Any) -> AttentionRecord:
        """Return everything up to the softmax, from the arguments of the module's forward.

        The keyword arguments ``rules`` and ``seen`` come with them, as for ``Adapter``.
        """

    @abstractmethod
    def finish(self, module: Any, record: AttentionRecord, probabilities: Tensor, rules: Rules) -> Any:
        """Return the module's output from the probabilities (batch, heads, tokens, tokens)."""

    @abstractmethod
    def mixed_values(self, module: Any, record: AttentionRecord, probabilities: Tensor) -> tuple[nn.Module, Tensor]:
        """Return the submodule that receives probabilities @ value, and these in the form it receives."""


AnyAdapter = Adapter | AttentionAdapter


class _Integration(Protocol):
    ADAPTER: AnyAdapter


_registered: list[AnyAdapter] = []


def has_parts(module: nn.Module, names: Iterable[str]) -> bool:
    """Return whether a module has all of some attributes, without the errors that ``hasattr`` raises inside.

    Every trace asks this of every module of a model.

    Args:
        module: any.
        names: of the attributes.
    """
    kind = type(module)
    if kind.__getattr__ is not nn.Module.__getattr__:  # a wrapper that passes on what it has not
        return all(hasattr(module, name) for name in names)
    own = vars(module)
    parameters, buffers, modules = own["_parameters"], own["_buffers"], own["_modules"]
    for name in names:
        kept = name in own or name in parameters or name in modules or name in buffers
        if not kept and not (hasattr(kind, name) and hasattr(module, name)):
            return False
    return True


def register_adapter(adapter: AnyAdapter) -> None:
    """Add an adapter; it is asked before those registered earlier and before the built-in families.

    Args:
        adapter: the adapter.

    Raises:
        TypeError: neither an Adapter nor an AttentionAdapter.

    Example:
        >>> from mamba_attn.integrations.vim import ADAPTER
        >>> register_adapter(ADAPTER)  # an instance of your own class; asked before all others
        >>> known_adapters()[0] is ADAPTER
        True
    """
    if not isinstance(adapter, AnyAdapter):
        raise TypeError(
            f"register_adapter({adapter!r}): expected an instance of a subclass of mamba_attn.Adapter or "
            "mamba_attn.AttentionAdapter."
        )
    _registered.insert(0, adapter)


def known_adapters() -> list[AnyAdapter]:
    """Return all adapters, in the order in which they are asked."""
    built_in: Iterator[_Integration] = (importlib.import_module(f"mamba_attn.integrations.{f}") for f in _FAMILIES)
    return [*_registered, *(module.ADAPTER for module in built_in)]


def find_mixers(
    model: nn.Module,
    adapters: Iterable[AnyAdapter] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> dict[str, tuple[nn.Module, AnyAdapter]]:
    """Return the mixers of a model by name, each with its adapter; mixers inside mixers are not looked for.

    Args:
        model: any model.
        adapters: asked before the known ones.
        modules: the model's modules by name, where they are known.
    """
    candidates = [*(adapters or ()), *known_adapters()]
    found: dict[str, tuple[nn.Module, AnyAdapter]] = {}
    for name, module in (modules_of(model) if modules is None else modules).items():
        torchs_own = not module._modules and type(module).__module__.startswith("torch.nn.modules.")
        if torchs_own or any(name.startswith(f"{outer}.") for outer in found if outer):
            continue
        adapter = next((adapter for adapter in candidates if adapter.recognises(module)), None)
        if adapter is not None:
            found[name] = (module, adapter)
    return found


def nothing_found(model: nn.Module, adapters: Iterable[AnyAdapter] | None = None) -> UnsupportedModelError:
    """Return the error of a model without anything that can be traced: its modules that look like scans, and families.

    Args:
        model: any model.
        adapters: that were asked before the known ones.
    """
    families = ", ".join(dict.fromkeys(adapter.family for adapter in [*(adapters or ()), *known_adapters()]))
    scans = Counter(why for module in model.modules() if (why := _looks_like_a_scan(module)))
    if scans:
        shown = [f"{why} x {count}" for why, count in scans.most_common(12)]
        seen = f"What looks like a scan in it: {', '.join(shown)}"
    else:
        types = Counter(type(module).__name__ for module in model.modules())
        seen = f"Module types seen: {', '.join(f'{name} x {count}' for name, count in types.most_common(12))}"
    return UnsupportedModelError(
        f"{type(model).__name__} has no layer that can be traced, and none of its scans went through a compiled "
        f"selective scan. Families known: {families}. {seen}. See register_adapter for a family of your own."
    )


def _looks_like_a_scan(module: nn.Module) -> str | None:
    """The type of a module that holds what scans decay by, or is named for one, or whose own code names one, and why.

    Args:
        module: any module; what its children hold is theirs.
    """
    own = [name for name in _OF_SCANS if getattr(module, name, None) is not None]
    code = getattr(type(module).forward, "__code__", None)
    own += [name for name in (code.co_names if code is not None else ()) if "scan" in name.lower()]
    name = type(module).__name__
    named = name.lower().endswith(_NAMES) and next(module.parameters(recurse=False), None) is not None
    return f"{name} (with {', '.join(dict.fromkeys(own))})" if own else name if named else None


def require_supported(name: str, module: nn.Module, adapter: AnyAdapter, model: nn.Module) -> None:
    """Raise UnsupportedModelError, with the adapter's reason, for a variant that it refuses."""
    reason = adapter.refusal(module, model)
    if reason:
        raise UnsupportedModelError(f"{name} ({type(module).__name__}, family {adapter.family}): {reason}")
