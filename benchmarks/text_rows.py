"""What reading a token's row costs in a language model as the text grows, and the last rows of all layers in one pass.

Time and memory of the rows are what comes on top of the traced pass, whose records hold what the rows are read from.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.language_models import build, quiet, texts
from benchmarks.measure import Spread, interleave, peak_memory, slope
from benchmarks.report import Figure, figure, show
from mamba_attn import trace

LENGTHS = (1024, 4096, 16384, 65536)
NARROW = {"hidden_size": 64, "state_size": 16, "time_step_rank": 4, "num_hidden_layers": 2}
WHOLE = {"hidden_size": 768, "state_size": 16, "time_step_rank": 48, "num_hidden_layers": 24}  # mamba-130m's
LONG = 4096


def rows(length: int, **options: Any) -> Callable[[], list[torch.Tensor]]:
    """The last rows of all layers, of a pass that was traced before."""
    quiet()
    model, ids = build("Mamba", **(options or NARROW)), texts(tokens=length)[0][:1]
    with torch.no_grad(), trace(model) as record:
        model(ids, use_cache=False)
    return lambda: [layer.row(length - 1) for layer in record.layers]


def passed(traced: bool, **options: Any) -> Callable[[], Any]:
    """A pass of mamba-130m's width; traced, with the last rows of all layers."""
    quiet()
    model, ids = build("Mamba", **(options or WHOLE)), texts(tokens=LONG)[0][:1]

    def call() -> Any:
        with torch.no_grad():
            if not traced:
                return model(ids, use_cache=False).logits
            with trace(model) as record:
                model(ids, use_cache=False)
            return [layer.row(LONG - 1) for layer in record.layers]

    return call


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
        details["mamba-130m, 4,096 tokens, bytes"] = {
            "rows of a traced pass": peak_memory("benchmarks.text_rows:rows", length=LONG, **WHOLE),
            "traced pass and rows": peak_memory("benchmarks.text_rows:passed", traced=True),
            "transformers' own pass": peak_memory("benchmarks.text_rows:passed", traced=False),
        }
        print(details["mamba-130m, 4,096 tokens, bytes"])
        figures.append(figure("text rows", "", details["mamba-130m, 4,096 tokens, bytes"]["rows of a traced pass"]))
    return figures, details
