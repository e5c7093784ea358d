"""What can be timed: models, sizes, and what a row of the table stands for."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.kernel import counting
from benchmarks.kernel.counting import Scans, Work
from benchmarks.kernel.timing import Call
from mamba_attn import models, ops
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.tracing.layers import ScanLayer
from mamba_attn.tracing.tracer import trace

MODELS = (
    "vim_tiny",
    "vim_small",
    "vim_base",
    "vmamba_tiny_s1l8",
    "vmamba_small_s1l20",
    "vmamba_base_s1l20",
)
TRANSFORMERS = {"deit_tiny_patch16_224": (192, 12), "deit_small_patch16_224": (384, 12)}  # features, layers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Unavailable(Exception):  # noqa: N818 - no error: the row says so and the others continue
    """A subject cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Configuration:
    """A model at a size.

    Args:
        model: its name.
        pixels: side of the image.
        batch: number of images.
        dtype: of weights, images and activations, a key of ``DTYPES``.
    """

    model: str
    pixels: int
    batch: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.model}, {self.pixels} pixels, batch {self.batch}, {self.dtype}"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Part:
    """A call for the layers of one shape; the row's time is the sum of ``times`` calls of every part.

    Args:
        scans: the layers; None for a whole forward pass.
        make: returns the call, ready to run.
        times: how many such calls all layers take.
    """

    scans: Scans | None
    make: Callable[[], Call]
    times: float = 1.0


@dataclass(frozen=True)
class Subject:
    """One row before it is measured.

    Args:
        what: "forward", "forward + attention", "attention" (the operator alone, all layers) or "scan".
        how: backend or library.
        parts: the calls.
        memory: bytes it needs, estimated.
        least: work that one call of each part cannot avoid, for the time budget.
        note: what else is to be known.
        extrapolated: what was measured instead of all of it.
    """

    what: str
    how: str
    parts: Sequence[Part] = ()
    memory: int = 0
    least: Work = counting.NOTHING
    note: str = ""
    extrapolated: str = ""


def grid(
    names: Sequence[str], pixels: Sequence[int], batches: Sequence[int], dtypes: Sequence[str]
) -> list[Configuration]:
    """Return all combinations: small images first, batches of one model side by side.

    Args:
        names: of models.
        pixels: sides of images.
        batches: numbers of images.
        dtypes: keys of ``DTYPES``.
    """
    every = itertools.product(sorted(pixels), names, dtypes, sorted(batches))
    return [Configuration(name, side, batch, dtype) for side, name, dtype, batch in every]


class Model:
    """A model of the grid on its device, built when first asked for.

    Args:
        its: what is wanted of it; the batch is of no account.
        device: where it runs.
    """

    def __init__(self, its: Configuration, device: torch.device) -> None:
        self.its, self.device = its, device
        self.transformer = its.model in TRANSFORMERS
        self.scans: list[Scans] = []
        if self.transformer:
            features, layers = TRANSFORMERS[its.model]
            self.parameters = 12 * layers * features**2
        else:
            paper = counting.on_paper(its.model, its.pixels)
            self.scans = counting.scans_of(paper, its.pixels)
            self.parameters = sum(parameter.numel() for parameter in paper.parameters())
        self._module: nn.Module | None = None

    def fits(self, its: Configuration) -> bool:
        """Whether a configuration is of this model, at another batch perhaps."""
        return dataclasses.replace(self.its, batch=its.batch) == its

    @property
    def module(self) -> nn.Module:
        """The model, with random weights.

        Raises:
            ImportError: a transformer without timm.
        """
        if self._module is None:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                built = _transformer(self.its) if self.transformer else _mamba(self.its)
            self._module = built.eval().to(self.device, DTYPES[self.its.dtype])
        return self._module

    def images(self, batch: int) -> Tensor:
        """Noise, the same for every call."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(batch, 3, self.its.pixels, self.its.pixels, generator=generator)
        return noise.to(self.device, DTYPES[self.its.dtype])

    def records(self, batch: int) -> list[ScanRecord]:
        """The records of one layer per shape, from a forward pass."""
        names = [each.layer for each in self.scans]
        with torch.no_grad(), trace(self.module, layers=names) as found:
            self.module(self.images(batch))
        return [_scan(found[name]) for name in names]

    @property
    def backend(self) -> str:
        """The backend that runs this model's scans here by default; for a transformer "timm"."""
        if self.transformer:
            return "timm"
        narrow, wide = DTYPES[self.its.dtype], torch.float32
        u, delta = (torch.ones(1, 1, 16, 2, device=self.device, dtype=dtype) for dtype in (narrow, wide))
        B = torch.ones(1, 1, 1, 2, 2, device=self.device, dtype=narrow)
        return default_backend(ScanRecord.from_scan(u, delta, -torch.ones(1, 16, 2, device=self.device), B, B))


def default_backend(record: ScanRecord) -> str:
    """Return the name of the backend that ``backend=None`` takes for a record."""
    from mamba_attn.ops.arguments import as_record
    from mamba_attn.ops.dispatch import choose

    chosen = choose(as_record("bench", None, record, None, None, None), None)
    return next(name for name, backend in ops.BACKENDS.items() if backend is chosen)


def _mamba(its: Configuration) -> nn.Module:
    return models.create(its.model, image_size=its.pixels)


def _transformer(its: Configuration) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm is not installed: pip install 'mamba_attn[timm]'") from error
    built: nn.Module = timm.create_model(its.model, img_size=its.pixels)
    return built


def _scan(layer: object) -> ScanRecord:
    if not isinstance(layer, ScanLayer):
        raise TypeError(f"expected a traced scan, got {type(layer).__name__}.")
    return layer.scan.map_tensors(Tensor.detach)
