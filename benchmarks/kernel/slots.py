"""Issue slots that the kernels need, counted by running NVRTC's PTX on the host; no GPU takes part.

The counts are exact: every PTX instruction of every thread, a warp's 32 counted once. What the hardware's assembler
makes of one is put in by SLOTS. ``ideal`` is the time in which an H100 SXM issues them, one per scheduler and clock: no
waiting for memory, barriers or other warps. It compares two versions of a kernel; it does not predict a time.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import TARGETS
from benchmarks.report import Figure, figure, show
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.ops.arguments import as_record
from mamba_attn.ops.cuda import kernels

ISSUES = 132 * 4 * 1.755e9  # warp instructions a second: multiprocessors, schedulers, clock of an H100 SXM
# instructions of the machine for one of PTX, where it is not one
SLOTS = {
    "div.s32": 22,
    "div.u32": 18,
    "rem.s32": 24,
    "rem.u32": 20,
    "div.s64": 70,
    "cvt.rna.tf32.f32": 3,
    "mul.lo.s64": 4,
    "mad.lo.s64": 4,
    "add.s64": 2,
    "sub.s64": 2,
    "shl.b64": 2,
    "shr.s64": 2,
    "and.b64": 2,
    "or.b64": 2,
    "setp.eq.s64": 2,
    "setp.ge.s64": 2,
    "setp.gt.s64": 2,
    "setp.lt.s64": 2,
    "neg.f32": 0,  # a sign of an operand
    "abs.f32": 0,
    "cvt.u64.u32": 0,  # the zero register
    "mov.b64": 0,
    "mov.u32": 0,
    "mov.f32": 0,
    "mov.u64": 0,
    "mov.b32": 0,
    "cvta.to.global.u64": 0,
    "cvt.s64.s32": 1,
    "cvt.u32.u64": 0,
}
KINDS = {
    "division": ("div.", "rem."),
    "64-bit integers": ("mul.lo.s64", "mad.lo.s64", "add.s64", "sub.s64", "shl.b64", "shr.s64", "and.b64", "or.b64",
                        "mul.wide", "cvt.s64", "cvt.u64"),
    "float32": ("fma.", "mul.f32", "add.f32", "sub.f32", "max.f32", "abs.f32", "neg.f32"),
    "TF32": ("cvt.rna.tf32", "cvt.rn.tf32", "mma."),
    "exponentials": ("ex2.",),
    "memory": ("ld.", "st.", "atom.", "red."),
    "shuffles": ("shfl.",),
    "predicates and branches": ("setp.", "selp.", "bra", "and.pred", "or.pred", "not.pred"),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A kernel at a size whose slots grow linearly with the channels.

    Args:
        what: it is; of some there are targets.
        kernel: its name.
        length: steps of the scan.
        states: of a channel.
        channels: of the model.
        copies: launches times images times routes.
        step: channels that a block takes; one and two such lots are run.
        run: what launches it.
        width: channels of a head, whose states share a decay; 1: no heads.
    """

    what: str
    kernel: str
    length: int
    states: int
    channels: int
    copies: int
    step: int
    run: Callable[[Any, ScanRecord], object]
    width: int = 1


def _scan(launcher: Any, record: ScanRecord) -> object:
    return kernels.scan(launcher, record, merged=False)


def _factored_64(launcher: Any, record: ScanRecord) -> object:
    return kernels.attention(launcher, record, (None, None), "mean", False, kernel="attention_factored_64")


def _factored_128(launcher: Any, record: ScanRecord) -> object:
    return kernels.attention(launcher, record, (None, None), "mean", False, kernel="attention_factored_128")


def _heads(launcher: Any, record: ScanRecord) -> object:
    return kernels.attention(launcher, record, (None, None), "mean", False, kernel="attention_heads")


def _chunks(launcher: Any, record: ScanRecord) -> object:
    return kernels.scan(launcher, record, merged=False, kernel="attention_heads")


WORK = (
    Work("Vim-S attention slots", "attention_factored_64", 197, 16, 768, 24 * 8 * 2, 16, _factored_64),
    Work("Vim-S scan slots", "selective_scan", 197, 16, 768, 24 * 8 * 2, 8, _scan),
    Work("VMamba scan slots", "selective_scan", 784, 1, 192, 2 * 8 * 4, 8, _scan),
    Work("tiles of 128 slots", "attention_factored_128", 256, 1, 16, 1, 16, _factored_128),
    Work("Mamba-2 attention slots", "attention_heads", 256, 128, 1536, 24 * 8, 1024, _heads, 64),
    Work("Mamba-2 scan slots", "attention_heads", 256, 128, 1536, 24 * 8, 64, _chunks, 64),
    Work("Mamba-2 attention slots by channel", "attention_factored_64", 256, 128, 1536, 24 * 8, 16, _factored_64),
    Work("Mamba-2 scan slots by channel", "selective_scan", 256, 128, 1536, 24 * 8, 8, _scan),
)  # fmt: skip


def _record(work: Work, channels: int) -> ScanRecord:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    length, states = work.length, work.states
    if work.width > 1:
        u, delta = random(1, 1, channels, length), random(1, 1, channels // work.width, length) * 0.1
        A = -random(1, channels // work.width, 1) - 0.1
        B, C = (random(1, 1, 1, states, length) for _ in range(2))
        return ScanRecord.from_scan(u, delta, A, B, C)
    return as_record(
        "slots",
        random(1, channels, length),
        random(1, channels, length) * 0.1,
        -random(channels, states) - 0.1,
        random(1, states, length),
        random(1, states, length),
    ).record


def count(work: Work, channels: int) -> Counter[str]:
    """Instructions of one launch, one image and route, by opcode."""
    from tests.emulation import emulated
    from tests.ptx import Ptx, program

    found = program(work.kernel)
    found.counted()
    with emulated(Ptx()) as launcher:
        work.run(launcher, _record(work, channels))
    return found.counted()


def slots(counted: Mapping[str, float]) -> dict[str, float]:
    """Issue slots by kind."""
    found = dict.fromkeys((*KINDS, "other"), 0.0)
    for opcode, times in counted.items():
        kind = next((kind for kind, heads in KINDS.items() if opcode.startswith(heads)), "other")
        found[kind] += SLOTS.get(opcode, 1) * times
    return found


def run_slots(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Count all."""
    figures: list[Figure] = []
    details: dict[str, Any] = {"issues per second": ISSUES, "slots": SLOTS}
    for work in WORK[1:2] if quick else WORK:
        one, two = (slots(count(work, lots * work.step)) for lots in (1, 2))
        lots = work.channels / work.step
        layer = {kind: one[kind] + (two[kind] - one[kind]) * (lots - 1) for kind in one}
        total = sum(layer.values())
        ideal = 1e3 * total * work.copies / ISSUES
        if work.what in TARGETS:
            figures.append(figure(work.what, f"{work.kernel}, {work.length} steps, {work.states} states", ideal))
        share = {kind: value / total for kind, value in layer.items()}
        details[work.what] = {"kernel": work.kernel, "slots": total * work.copies, "ideal ms": ideal, "share": share}
        show(work.what, ["kind", "share"], [[kind, f"{value:.1%}"] for kind, value in share.items()])
    return figures, details
