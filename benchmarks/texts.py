"""Language models of transformers: what a trace computes and what they compute, padding, half precision, and time."""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language_models import DECODERS, HYBRIDS, SCANS, build, quiet, texts
from benchmarks.measure import Spread, interleave, paired
from benchmarks.report import Figure, figure, show
from mamba_attn import trace
from mamba_attn.testing import check_adapter

PADDING = ("none", "left", "right")
HALF = ("Mamba", "FalconMamba", "Zamba", "Mamba2", "Bamba", "Zamba2", "FalconH1")  # those without experts
WIDE = {  # mamba-130m's, and Mamba-2's of the same size
    "Mamba": {"hidden_size": 768, "state_size": 16, "time_step_rank": 48, "num_hidden_layers": 6},
    "Mamba2": {
        "hidden_size": 768, "state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1, "chunk_size": 256,
        "num_hidden_layers": 6,
    },
}  # fmt: skip
LENGTHS = (64, 256)


def logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Those of a pass without a cache."""
    found: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return found


def relative(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((value.double() - truth.double()).abs().max() / truth.double().abs().max())


def laws(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Law 1 and traced logits of every family, without padding and with it on either side."""
    rows = []
    for name in names:
        model = build(name)
        if model is None:
            continue
        for padding in PADDING:
            ids, mask = texts(padding)
            row: dict[str, Any] = {"family": name, "padding": padding}
            with torch.no_grad():
                if name in SCANS:
                    report = check_adapter(model, ids, call=lambda m, x, mask=mask: logits(m, x, mask))
                    row["law 1"] = report.matrix_error
                own = logits(model, ids, mask)
                with trace(model) as record:
                    traced = logits(model, ids, mask)
                row["logits"] = relative(traced[mask.bool()], own[mask.bool()])
                row["layers"] = len(record)
                row["not traced"] = record.unseen_mixers
                matrices = [layer.attention("each") for layer in record.layers]
            absent = mask == 0
            row["padding's rows and columns"] = max(
                float(m.transpose(1, 2)[absent].abs().sum() + m.permute(0, 3, 1, 2)[absent].abs().sum())
                for m in matrices
            )
            rows.append(row)
    return rows


def cuts(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Matrices of a text padded on the left, cut to its tokens, against those of the text alone."""
    rows = []
    for name in names:
        model = build(name, **({"use_bias": False} if name == "Mamba" else {}))
        if model is None:
            continue
        ids, mask = texts("left")
        with torch.no_grad():
            with trace(model) as padded:
                own = logits(model, ids, mask)
            with trace(model) as alone:
                cut = logits(model, ids[1:, 4:], mask[1:, 4:])
            errors = [
                relative(a.attention("each")[1:, :, 4:, 4:], b.attention("each"))
                for a, b in zip(padded.layers, alone.layers, strict=True)
            ]
        rows.append({"family": name, "matrices": max(errors), "the model's own logits": relative(own[1:, 4:], cut)})
    return rows


def halves(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Error of traced logits in bfloat16 over the model's own, both against float64; root mean squares."""
    rows = []
    for name in names:
        model = build(name)
        if model is None:
            continue
        ids, mask = texts()
        half = copy.deepcopy(model).to(torch.bfloat16)
        with torch.no_grad():
            truth = logits(copy.deepcopy(half).double(), ids, mask)
            own = logits(half, ids, mask).double()
            with trace(half):
                traced = logits(half, ids, mask).double()
        ours, theirs = (float((each - truth).square().mean().sqrt()) for each in (traced, own))
        rows.append({"family": name, "ours": ours, "the model's own": theirs, "ratio": ours / theirs})
    return rows


def times(name: str, length: int, rounds: int) -> tuple[Spread, dict[str, Any]]:
    """A traced forward over transformers' own."""
    model = build(name, **WIDE[name])
    ids = texts(tokens=length)[0][:1]
    mask = torch.ones_like(ids)

    def own() -> Tensor:
        with torch.no_grad():
            return logits(model, ids, mask)

    def traced() -> Tensor:
        with torch.no_grad(), trace(model):
            return logits(model, ids, mask)

    calls: dict[str, Callable[[], Tensor]] = {"own": own, "traced": traced}
    error = relative(traced(), own())
    found = interleave(calls, rounds)
    milliseconds = {key: Spread.of([1e3 * t for t in sample]) for key, sample in found.items()}
    return paired(found["traced"], found["own"]), {"milliseconds": milliseconds, "logits": error}


def run_texts(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about language models."""
    quiet()
    version = str(importlib.import_module("transformers").__version__)
    names = ("Mamba", "Mamba2", "Llama") if quick else (*SCANS, *DECODERS)
    found = laws(names)
    cut, half = cuts(tuple(n for n in names if n != "GPT2")), halves(HALF[:1] if quick else HALF)
    for title, rows in (("laws", found), ("cuts", cut), ("halves", half)):
        show(title, list(rows[0]), [[_cell(row.get(key, "")) for key in rows[0]] for row in rows])
    how = f"transformers {version}"
    whole = [row for row in found if row["family"] in HYBRIDS and not row["not traced"]]
    figures = [
        figure("text law", how, max(row["law 1"] for row in found if "law 1" in row)),
        figure("text logits", how, max(row["logits"] for row in found)),
        figure("text padding", how, max(row["padding's rows and columns"] for row in found)),
        figure("text cut", how, max(row["matrices"] for row in cut)),
        figure("text half", how, max(row["ratio"] for row in half)),
    ]
    figures += [figure("text hybrids", how, max(row["logits"] for row in whole))] if whole else []
    details: dict[str, Any] = {"transformers": version, "laws": found, "cuts": cut, "bfloat16": half, "times": {}}
    for name in WIDE:
        for length in LENGTHS[: 1 if quick else None]:
            spread, detail = times(name, length, 2 if quick else 7)
            figures.append(figure("text time", f"{name}, {length} tokens, {how}", spread))
            details["times"][f"{name}, {length} tokens"] = detail
    return figures, details


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
