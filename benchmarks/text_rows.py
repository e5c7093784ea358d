"""What reading a token's row costs in a language model as the text grows, and the last rows of all layers.

Time and memory of the rows are what comes on top of the traced pass, whose records hold what the rows are read from;
that memory stands next to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Spread, interleave, peak_memory, slope
from benchmarks.report import Figure, figure, show
from mamba_attn import trace
from mamba_attn.models.language import MambaLanguageModel
from mamba_attn.tracing.tracer import Trace

LENGTHS = (1024, 4096, 16384, 65536)
NARROW = {"embed_dim": 64, "depth": 2, "d_state": 16}
WHOLE = {"embed_dim": 768, "depth": 24, "d_state": 16}  # mamba-130m's
LONG = 4096
VOCABULARY = 41


def _passed(length: int, options: dict[str, Any]) -> Callable[[], Trace]:
    torch.manual_seed(0)
    model = MambaLanguageModel(vocabulary=VOCABULARY, **options).eval()
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))

    def call() -> Trace:
        with torch.no_grad(), trace(model) as record:
            model(ids)
        return record

    return call


def rows(length: int, **options: Any) -> Callable[[], list[Tensor]]:
    """The last rows of all layers, of a pass that was traced before."""
    record = _passed(length, options or NARROW)()
    return lambda: [layer.row(length - 1) for layer in record.layers]


def traced(length: int, **options: Any) -> Callable[[], Trace]:
    """A traced pass, with what it keeps."""
    return _passed(length, options)


def run_text_rows(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about rows of long texts."""
    lengths = LENGTHS[:2] if quick else LENGTHS
    times = interleave({str(length): rows(length) for length in lengths}, 2 if quick else 5)
    medians = [Spread.of(sample).median for sample in times.values()]
    memory = [peak_memory("benchmarks.text_rows:rows", length=length) for length in lengths]
    shown = zip(lengths, medians, memory, strict=True)
    cells = [(str(length), f"{seconds:.4f}", f"{size:,}") for length, seconds, size in shown]
    show("last rows of all layers", ("tokens", "seconds", "bytes"), cells)
    figures = [
        figure("text row time", "2 layers of 64 features", slope(lengths, medians)),
        figure("text row memory", "2 layers of 64 features", slope(lengths, memory)),
    ]
    details: dict[str, Any] = {"lengths": lengths, "seconds": medians, "bytes": memory}
    if not quick:
        details["mamba-130m, 4,096 tokens, bytes"] = whole = {
            "rows": peak_memory("benchmarks.text_rows:rows", length=LONG, **WHOLE),
            "traced pass": peak_memory("benchmarks.text_rows:traced", length=LONG, **WHOLE),
        }
        print(whole)
        figures.append(figure("text rows", "on top of the traced pass", whole["rows"]))
    return figures, details
