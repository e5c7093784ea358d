"""The fastest that this machine copies, exponentiates and multiplies, measured in torch in the same run."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.kernel.counting import Work
from benchmarks.kernel.timing import Clock, clock_for

_CHAIN = 256  # exponentials of one element in the GPU's kernel, so that memory does not count
# torch reads this with a regular expression: no other brackets or angles
_EXPONENTIALS = f"""
template <typename T> T chain(T x) {{
  #pragma unroll 16
  for (int i = 0; i < {_CHAIN}; ++i) x = exp2f(-x);
  return x;
}}
"""


@dataclass(frozen=True)
class Ceilings:
    """Rates per second.

    Args:
        copy: bytes, read and written ones both counted.
        exponentials: exp2 or exp of float32, whichever is faster.
        float32: operations of a matrix product in float32 itself.
        matrix: operations of a product in other types, by name: "TF32", "bfloat16".
        notes: what else is to be known of a rate, by its name.
    """

    copy: float
    exponentials: float
    float32: float
    matrix: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> float:
        """Operations per second of a product that keeps float32's digits: float32 itself, or TF32 three times."""
        return max(self.float32, self.matrix.get("TF32", 0.0) / 3)

    def floor(self, work: Work, formulation: str) -> float:
        """Return the seconds below which a formulation cannot come, were all units busy at once.

        Args:
            work: what it has to do.
            formulation: "direct" sums in float32, one entry at a time; "factored" may use ``exact``.
        """
        flops = self.float32 if formulation == "direct" else self.exact
        return max(work.bytes / self.copy, work.exponentials / self.exponentials, work.flops / flops)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return asdict(self) | {"unit": "1/s", "exact": self.exact}


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions of float32 on a GPU, and put the settings back.

    Args:
        enabled: whether it is allowed; torch allows it in convolutions by default.
    """
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 warns about the older names
        cudnn: Any = torch.backends.cudnn
        owners: list[Any] = [torch.backends.cuda.matmul, cudnn.conv]
        name, value = "fp32_precision", "tf32" if enabled else "ieee"
    else:
        owners = [torch.backends.cuda.matmul, torch.backends.cudnn]
        name, value = "allow_tf32", enabled  # type: ignore[assignment]
    before = [getattr(owner, name) for owner in owners]
    for owner in owners:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, name, old)


def measure(device: torch.device, rounds: int = 7, quick: bool = False) -> Ceilings:
    """Measure the ceilings of a device: the best of some rounds, since a ceiling is what was reached once.

    Args:
        device: a CPU, with as many threads as torch has now, or a CUDA device.
        rounds: how often each is timed.
        quick: small sizes.
    """
    clock = clock_for(device)

    def best(call: Callable[[], object], work: float) -> float:
        return work / _least(clock, call, rounds)

    copy = _copy(device, best, quick)
    exponentials, note = (_gpu if device.type == "cuda" else _cpu)(device, best)
    side = 256 if quick else 8192 if device.type == "cuda" else 1024
    with tf32(False):
        float32 = _product(device, torch.float32, side, best)
    matrix = {"bfloat16": _product(device, torch.bfloat16, side, best)}
    if device.type == "cuda":
        with tf32(True):
            matrix["TF32"] = _product(device, torch.float32, side, best)
    return Ceilings(copy, exponentials, float32, matrix, {"exponentials": note})


_Best = Callable[[Callable[[], object], float], float]


def _least(clock: Clock, call: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round, each about 10 ms long or one call."""
    call()
    repeats = max(1, int(0.01 / max(clock(call, 1), 1e-7)))
    return min(clock(call, repeats) for _ in range(rounds))


def _copy(device: torch.device, best: _Best, quick: bool) -> float:
    """Beyond the last cache: two buffers of 128 MB on a CPU, 1 GB on a GPU."""
    count = 2**20 if quick else 2**28 if device.type == "cuda" else 2**25
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    return best(lambda: target.copy_(source), 2.0 * source.nbytes)


def _cpu(device: torch.device, best: _Best) -> tuple[float, str]:
    """Exponentials of numbers that lie in a cache: enough of them that the call itself does not count."""
    rates = {}
    for count in (2**15, 2**16, 2**17, 2**18):
        x = torch.linspace(-10, 0, count, device=device)
        out = torch.empty_like(x)
        for function in (torch.exp2, torch.exp):
            call = functools.partial(function, x, out=out)
            rates[f"torch.{function.__name__} of {count} numbers"] = best(call, float(count))
    fastest = max(rates, key=rates.__getitem__)
    return rates[fastest], fastest


def _gpu(device: torch.device, best: _Best) -> tuple[float, str]:
    """A chain of exponentials per element, compiled by torch; elementwise where torch cannot."""
    x = torch.linspace(0, 1, 2**24, device=device)
    make = getattr(getattr(torch.cuda, "jiterator", None), "_create_jit_fn", None)
    if make is not None:
        try:
            chain = make(_EXPONENTIALS)
            return best(lambda: chain(x), float(x.numel() * _CHAIN)), f"exp2f, {_CHAIN} in a row per element"
        except RuntimeError as error:
            problem = str(error).strip().split("\n")[0]
    else:
        problem = "this torch has no jiterator"
    out = torch.empty_like(x)
    rate = best(lambda: torch.exp2(x, out=out), float(x.numel()))
    return rate, f"torch.exp2, bound by memory, so a lower bound of the ceiling ({problem})"


def _product(device: torch.device, dtype: torch.dtype, side: int, best: _Best) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return best(lambda: torch.mm(a, b, out=out), 2.0 * side**3)
