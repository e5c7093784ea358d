"""Measure operators, models, attribution and its maps, kernels, foreign code: tables, and JSON under results/.

    python benchmarks/run.py ops
    python benchmarks/run.py models
    python benchmarks/run.py attribution
    python benchmarks/run.py passes
    python benchmarks/run.py threads
    python benchmarks/run.py maps --data FOLDER
    python benchmarks/run.py compare --data FOLDER
    python benchmarks/run.py fills --data FOLDER
    python benchmarks/run.py two-digits --data FOLDER
    python benchmarks/run.py kernel [--device cuda]
    python benchmarks/run.py heads
    python benchmarks/run.py texts
    python benchmarks/run.py text-rows
    python benchmarks/run.py build
    python benchmarks/run.py slots
    python benchmarks/run.py dropin --checkouts FOLDER
    python benchmarks/run.py doors --checkouts FOLDER
    python benchmarks/run.py collect --data FOLDER
    python benchmarks/run.py scale --data FOLDER
    python benchmarks/run.py embed --data FOLDER
    python benchmarks/run.py findings --data FOLDER
    python benchmarks/run.py content --data FOLDER
    python benchmarks/run.py retrain --data FOLDER
    python benchmarks/run.py explore
    python benchmarks/run.py text-truth
    python benchmarks/run.py text-perturbation --data ARCHIVE

One thread, CPU time, the competitors in turn (A B A B) in one process; peak memory in child processes. On a GPU
``kernel`` measures between CUDA events; ``threads`` measures wall seconds.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import torch

from benchmarks import (
    analytics,
    cases,
    comparison,
    content,
    doors,
    dropin,
    embedding,
    explorer,
    fills,
    findings,
    lens,
    many_ranks,
    maps,
    retrain,
    text_perturbation,
    text_rows,
    text_truth,
    texts,
    threads,
    two_digits,
    verify,
    without_gpu,
)
from benchmarks.cases import Shape
from benchmarks.kernel import heads, slots
from benchmarks.kernel import job as kernel
from benchmarks.measure import Spread, interleave, paired, peak_memory, slope
from benchmarks.report import Figure, figure, finish, show

RESULTS = Path(__file__).parent / "results"
WHAT = {
    "ops": "operators: speed and errors against published code, growth with the length",
    "models": "models: time and memory of a forward pass and of its attention",
    "attribution": "attribution: time and memory of MambaAttribution, compared with one forward + backward",
    "passes": "several maps of one traced pass, compared with the dearest of them",
    "threads": "attention with one, two and four threads, wall seconds; first calls with a prebuilt kernel and without",
    "maps": "maps: energy in boxes, deletion, time of the command",
    "compare": "attribution methods judged on one scale: perturbation, boxes, digits, sanity, cost",
    "two-digits": "attribution methods asked about either of two digits in an image",
    "fills": "attribution methods under several fills of removed cells",
    "collect": "mamba-attn collect: memory against images, time, means against explicit ones",
    "scale": "several processes, many images: speed, equal bits, kills, lists of a million images, planning, memory",
    "embed": "t-SNE and UMAP of attention, with PCA before them and without",
    "findings": "mamba-attn findings: the paper's findings, trained, with random weights, in other patch orders",
    "content": "what the image-dependent part of attention is worth: matrices of other images, of none, and cut short",
    "retrain": "what models learn from images that have lost what a method marks",
    "explore": "mamba-attn explore in a real browser: from a gesture to the picture",
    "text-truth": "attribution of text: ranks of the token that an answer was copied from",
    "text-perturbation": "attribution of text: what reviews lose when words are replaced, in an order of relevance",
    "kernel": "hidden attention and what it costs: models, backends, ceilings, on a CPU or a GPU",
    "lens": "matrices of TransformerLens and ours: difference, time and memory (pip install transformer-lens)",
    "text-rows": "language models: rows of a token in long texts, time and memory",
    "texts": "language models of transformers: errors of traced passes, padding, half precision, time",
    "heads": "a Mamba-2 layer, folded per head and channel by channel",
    "dropin": "other people's model code, as it stands in clones of their repositories, traced",
    "doors": "what tracing such code costs: a pass, the look ahead, measuring the tokens' orders",
    "slots": "instructions that the CUDA kernels issue, counted on the host",
    "build": "the CUDA kernels without a GPU: registers, spills, and the error of their source on the host",
}
ON_DATA: dict[str, tuple[Any, Any]] = {  # the module with the options, and what measures
    "maps": (maps, maps.run_maps),
    "compare": (comparison, comparison.run_comparison),
    "fills": (fills, fills.run_fills),
    "two-digits": (two_digits, two_digits.run_two_digits),
    "collect": (analytics, analytics.run_collect),
    "scale": (many_ranks, many_ranks.run_scale),
    "embed": (embedding, embedding.run_embed),
    "findings": (findings, findings.run_findings),
    "content": (content, content.run_content),
    "retrain": (retrain, retrain.run_retrain),
    "dropin": (dropin, dropin.run_dropin),
    "doors": (doors, doors.run_doors),
    "text-perturbation": (text_perturbation, text_perturbation.run_text_perturbation),
}


def measure_speed(shape: Shape, rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """Our channel mean by every backend, the published loops (run whole, once) and VMamba's formula."""
    values = cases.inputs(shape)
    backends = cases.usable_backends()
    calls = {name: cases.attention(shape, name) for name in backends}
    calls["formula"] = cases.formula(shape)
    details: dict[str, Any] = {"shape": str(shape), "error": {}, "milliseconds": {}}
    for name in backends:
        details["error"][name] = verify.term_error(calls[name](), *values)
        verify.require_exact(name, details["error"][name])
    details["formula_relative_error"] = verify.norm_error(calls["formula"](), *values)
    outputs: list[torch.Tensor] = []
    published = cases.loop(shape)
    calls["loop"] = lambda: outputs.append(published())
    times = interleave(calls, rounds, once=("loop",))
    details["error"]["loop"] = verify.term_error(outputs[0], *values)
    verify.require_exact("loop", details["error"]["loop"])
    details["milliseconds"] = {name: Spread.of([1e3 * t for t in sample]) for name, sample in times.items()}
    figures = [figure("loop", name, paired(times["loop"], times[name])) for name in backends]
    figures += [figure("formula", name, paired(times[name], times["formula"])) for name in backends]
    return figures, details


def measure_errors(shapes: tuple[Shape, ...]) -> tuple[list[Figure], dict[str, Any]]:
    """Errors of every backend at every shape and step size, and of VMamba's formula."""
    backends = cases.usable_backends()
    rows = []
    for shape in shapes:
        for scale in cases.SCALES:
            values = cases.inputs(shape, scale)
            row: dict[str, Any] = {"shape": str(shape), "delta x": scale}
            for name in backends:
                row[name] = verify.term_error(cases.attention(shape, name, scale)(), *values)
            row["formula, norm"] = verify.norm_error(cases.formula(shape, scale)(), *values)
            rows.append(row)
    show(
        "errors",
        list(rows[0]),
        [[f"{v:.2g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows],
    )
    return [figure("error", name, max(row[name] for row in rows)) for name in backends], {"rows": rows}


def measure_lines(shape: Shape, lengths: tuple[int, ...], rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """Time and peak extra memory of one row and one left product, as the sequence grows."""
    figures, details = [], {"channels": shape.channels, "states": shape.states, "lengths": lengths}
    for what in ("row", "product"):
        arguments = [{"what": what, "channels": shape.channels, "states": shape.states, "length": n} for n in lengths]
        times = interleave({str(each["length"]): cases.line(**each) for each in arguments}, rounds)
        medians = [Spread.of(sample).median for sample in times.values()]
        memory = [peak_memory("benchmarks.cases:line", **each) for each in arguments]
        figures.append(figure(f"{what} time", "", slope(lengths, medians)))
        figures.append(figure(f"{what} memory", "", slope(lengths, memory)))
        details[what] = {"seconds": medians, "bytes": memory}
    return figures, details


def measure_model(name: str, pixels: int, rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """Measure a model's forward, plain and traced, and DeiT-tiny's."""
    calls = {
        "transformer": cases.forward(cases.TRANSFORMER, pixels=pixels),
        "plain": cases.forward(name, pixels=pixels),
        "attention": cases.forward(name, True, pixels),
    }
    logits, matrices = calls["attention"]()
    torch.testing.assert_close(logits, calls["plain"](), rtol=1e-3, atol=1e-3)
    shapes = [tuple(matrix.shape) for matrix in matrices]
    del logits, matrices
    times = interleave(calls, rounds)
    added = [traced - plain for traced, plain in zip(times["attention"], times["plain"], strict=True)]
    figures = [
        figure(name, "", paired(times["plain"], times["transformer"])),
        figure(f"{name} attention", "", paired(added, times["transformer"])),
    ]
    details: dict[str, Any] = {
        "pixels": pixels,
        "matrices": shapes,
        "milliseconds": {key: Spread.of([1e3 * t for t in sample]) for key, sample in times.items()},
        "peak_bytes": {
            key: peak_memory("benchmarks.cases:forward", name=name, attention=key == "attention", pixels=pixels)
            for key in ("plain", "attention")
        },
    }
    if f"{name} memory" in cases.TARGETS:
        extra = details["peak_bytes"]["attention"] - details["peak_bytes"]["plain"]
        figures.append(figure(f"{name} memory", "", extra))
    return figures, details


def run_ops(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about operators."""
    shape, rounds = (Shape(32, 16, 33), 3) if quick else (cases.VIM, 25)
    figures, details = [], {}
    shapes = (Shape(4, 16, 197), Shape(4, 1, 197)) if quick else cases.ERRORS
    lengths = (256, 512, 1024) if quick else cases.LENGTHS
    for key, (found, detail) in {
        "speed": measure_speed(shape, rounds),
        "errors": measure_errors(shapes),
        "lines": measure_lines(cases.LINEAR, lengths, 1 if quick else 3),
    }.items():
        figures += found
        details[key] = detail
    return figures, details


def run_models(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about models."""
    figures, details = [], {}
    for name in cases.MODELS:
        found, details[name] = measure_model(name, *((64, 2) if quick else (224, 15)))
        figures += found
    return figures, details


def measure_attribution(
    name: str, pixels: int, batches: tuple[int, ...], rounds: int
) -> tuple[list[Figure], dict[str, Any]]:
    """Measure every form of MambaAttribution, and one forward + backward of the same images."""
    figures: list[Figure] = []
    details: dict[str, Any] = {"pixels": pixels}
    whole = "forward + backward"
    for batch in batches:
        arguments = {
            what: {"name": name, "what": what, "batch": batch, "pixels": pixels}
            for what in ("forward", whole, *cases.FORMS)
        }
        times = interleave({what: cases.explained(**each) for what, each in arguments.items()}, rounds)
        figures.append(figure(f"{name} rows", f"batch {batch}", paired(times["rows"], times[whole])))
        details[f"batch {batch}"] = {
            what: {
                "milliseconds": Spread.of([1e3 * t for t in sample]),
                f"/ {whole}": paired(sample, times[whole]),
                "peak_bytes": peak_memory("benchmarks.cases:explained", **arguments[what]),
            }
            for what, sample in times.items()
        }
    return figures, details


def run_attribution(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """All rows about the cost of attribution."""
    figures, details = [], {}
    for name in cases.EXPLAINED:
        found, details[name] = measure_attribution(name, *((32, (2,), 2) if quick else (128, (1, 8), 15)))
        figures += found
    return figures, details


def run_passes(quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    """Three maps of one traced pass, against the dearest of them from a pass of its own."""
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    pixels, batches, rounds = (32, (2,), 2) if quick else (128, (1, 8), 5)
    for name in cases.EXPLAINED:
        for methods in cases.TRIPLES:
            for batch in batches:
                times = interleave(cases.three_maps(name, methods, batch, pixels), rounds)
                dearest = max(methods, key=lambda method: Spread.of(times[method]).median)
                how = f"{', '.join(methods)}; batch {batch}"
                figures.append(figure(f"{name} one pass", how, paired(times["one pass"], times[dearest])))
                details[f"{name}: {how}"] = {
                    "pixels": pixels,
                    "dearest": dearest,
                    "milliseconds": {what: Spread.of([1e3 * t for t in sample]) for what, sample in times.items()},
                    "all apart / dearest": paired(
                        [sum(each) for each in zip(*(times[method] for method in methods), strict=True)], times[dearest]
                    ),
                }
    return figures, details


def run_kernel(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """The grid of models, sizes and backends; pictures too where a folder is named."""
    try:
        job = kernel.job(args)
    except ValueError as error:
        parser.error(str(error))
    folder = args.out or (None if kernel.partial(args) else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    kernel.measure(job, folder and folder / "kernel.json", args.out)


def main(argv: list[str] | None = None) -> None:
    """Run the chosen measurement, show its table and write its JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for what, text in WHAT.items():
        command = commands.add_parser(what, help=text, description=text.capitalize() + ".")
        command.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
        command.add_argument("--out", type=Path, help=f"folder; default: {RESULTS.name}, if nothing is left out")
        if what in ON_DATA:
            ON_DATA[what][0].add_options(command)
        if what == "kernel":
            kernel.add_options(command)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "kernel":
        run_kernel(args, parser)
        return
    if args.what == "maps":  # one result per model
        found, partial = maps.run_maps(args), args.quick or maps.partial(args)
    elif args.what in ON_DATA:
        module, measure = ON_DATA[args.what]
        found, partial = [(args.what.replace("-", "_"), *measure(args))], args.quick or module.partial(args)
    else:
        runs = {
            "ops": run_ops,
            "models": run_models,
            "attribution": run_attribution,
            "heads": heads.run_heads,
            "texts": texts.run_texts,
            "text-rows": text_rows.run_text_rows,
            "lens": lens.run_lens,
            "passes": run_passes,
            "threads": threads.run_threads,
            "build": without_gpu.run_build,
            "slots": slots.run_slots,
            "explore": explorer.run_explore,
            "text-truth": text_truth.run_text_truth,
        }
        found, partial = [(args.what.replace("-", "_"), *runs[args.what](args.quick))], args.quick
    folder = args.out or (None if partial else RESULTS)
    for name, figures, details in found:
        finish(name, figures, details, folder and folder / f"{name}.json", partial)


if __name__ == "__main__":
    main()
