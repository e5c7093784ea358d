"""Other people's model code, as it stands in their repositories, traced: errors of outputs, of law 1, and refusals.

Nothing of that code is here, and nothing is fetched: ``--checkouts`` names a folder of clones, each under its
repository's own name. Every repository runs in a process of its own, since several of them bring a package of the same
name. Parameters are moved from their initial values at random, so that scans which start alike differ; those of whole
published models by a tenth as much, since deep random networks amplify float32's rounding, their own forward's too.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.case import Case, build
from benchmarks.foreign import REPOSITORIES, official_pairs
from benchmarks.measure import ROOT
from benchmarks.report import Figure, figure, show

Row = dict[str, Any]
INSTALLED = ("timm",)  # run as it is installed, without a clone
COLUMNS = ("repository", "class", "variant", "input", "output", "law 1", "observed")


def measure(case: Case) -> Row:
    """Run one case by ``check_adapter``.

    Raises:
        SystemExit: a case that must be refused was not, or for another reason.
    """
    import mamba_attn
    from mamba_attn.errors import UnsupportedModelError
    from mamba_attn.testing import check_adapter

    model, inputs = build(case)
    row: Row = {"class": case.class_name, "variant": case.variant, "input": "x".join(map(str, case.shape))}
    if case.refused is not None:
        try:
            with torch.no_grad(), mamba_attn.trace(model):
                (case.call or (lambda m, x: m(x)))(model, inputs)
        except UnsupportedModelError as error:
            if case.refused in str(error):
                return {**row, "refused": str(error)}
            raise SystemExit(f"{row}: expected {case.refused!r} in {error}") from error
        raise SystemExit(f"{row}: was not refused.")
    report = check_adapter(model, inputs, tolerance=float("inf"), call=case.call)
    return {
        **row, "layers": len(report.layers), "output": report.output_error, "law 1": report.matrix_error,
        "above diagonal": max(layer.above_diagonal for layer in report.layers),
        "observed": report.observed_identical,
    }  # fmt: skip


def same_weights(official: nn.Module, name: str, size: tuple[int, int]) -> dict[str, float]:
    """Compare our model with another of the same weights: largest differences of logits, relative ones of matrices."""
    import mamba_attn

    torch.manual_seed(0)
    images = torch.randn(2, 3, *size)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": official.state_dict()}, f"{folder}/official.pth")
        ours = mamba_attn.models.create(name, weights=f"{folder}/official.pth").eval()
    with torch.no_grad(), mamba_attn.trace(official.eval()) as theirs:
        expected = official(images)
    with torch.no_grad(), mamba_attn.trace(ours) as own:
        logits = ours(images)
    errors = []
    for a, b in zip(own.layers, theirs.layers, strict=True):
        truth = b.attention()
        errors.append(float((a.attention() - truth).abs().max() / truth.abs().max()))
    return {"logits": float((logits - expected).abs().max()), "matrices": max(errors), "layers": len(errors)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run.py dropin``."""
    parser.add_argument(
        "--checkouts", type=Path, required=True, help="folder of clones, under their repositories' names"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="OWNER/NAME", help="repositories to run; default: all that are there"
    )


def partial(args: argparse.Namespace) -> bool:
    """Whether the options leave repositories out, so that the result is not the committed one."""
    return args.only is not None


def run_dropin(args: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """All repositories that are there.

    Raises:
        SystemExit: none is there, or a process failed.
    """
    wanted = args.only or list(REPOSITORIES)
    unknown = [name for name in wanted if name not in REPOSITORIES]
    if unknown:
        raise SystemExit(f"--only {' '.join(unknown)}: unknown; expected some of {', '.join(REPOSITORIES)}.")
    folders = {name: args.checkouts / name.rpartition("/")[2] for name in wanted}
    there = [name for name in wanted if name in INSTALLED or folders[name].is_dir()]
    if not there:
        raise SystemExit(f"--checkouts {args.checkouts}: no clone of any of {', '.join(wanted)}.")
    rows: list[Row] = []
    pairs: dict[str, dict[str, float]] = {}
    for name in there:
        found = _in_a_process(name, folders[name], args.quick)
        rows += [{"repository": name, "commit": found["commit"], **row} for row in found["rows"]]
        pairs |= found["pairs"]
    show("drop-in", COLUMNS, [[_cell(row, column) for column in COLUMNS] for row in rows])
    worked = [row for row in rows if "law 1" in row]
    many = f"{len(worked)} modules and models"
    figures = [
        figure("drop-in law 1", many, max(row["law 1"] for row in worked)),
        figure("drop-in output", many, max(row["output"] for row in worked)),
        figure("drop-in changed", many, float(sum(not row["observed"] for row in worked))),
    ]
    for name, pair in pairs.items():
        figures += [figure("drop-in logits", name, pair["logits"]), figure("drop-in matrices", name, pair["matrices"])]
    missing = [name for name in REPOSITORIES if name not in there]
    return figures, {"rows": rows, "same weights": pairs, "not there": missing}


def _cell(row: Row, column: str) -> str:
    value = row.get(column, "refused")
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _in_a_process(name: str, checkout: Path, quick: bool) -> Row:
    command = [sys.executable, "-m", "benchmarks.dropin", name, str(checkout), "quick" if quick else "whole"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"{name}: {(child.stderr or child.stdout).strip()[-2000:]}")
    result: Row = json.loads(child.stdout.splitlines()[-1])
    return result


def _child(name: str, checkout: str, extent: str) -> None:
    torch.set_num_threads(1)
    if name in INSTALLED:
        commit = importlib.metadata.version(name)
    else:
        head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commit = head.stdout.strip()
    cases = REPOSITORIES[name](Path(checkout))
    rows = []
    for case in list(cases)[: 1 if extent == "quick" else None]:
        print(case.class_name, case.variant, file=sys.stderr, flush=True)
        rows.append(measure(case))
    pairs = {} if extent == "quick" else {
        key: same_weights(model, key, (224, 224)) for key, model in official_pairs(name, Path(checkout))
    }  # fmt: skip
    print(json.dumps({"commit": commit, "rows": rows, "pairs": pairs}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
