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

from benchmarks.dropin_checks import Row, measure
from benchmarks.foreign import REPOSITORIES, UNSEEN, official_pairs
from benchmarks.measure import ROOT
from benchmarks.report import Figure, figure, show

RESULTS = Path(__file__).parent / "results" / "dropin.json"
INSTALLED = ("timm",)  # run as it is installed, without a clone
COLUMNS = ("repository", "class", "variant", "input", "layers", "tokens", "law 1", "observed", "orders")


def same_weights(official: nn.Module, name: str, size: tuple[int, int]) -> dict[str, float]:
    """Our model with another one's weights, beside it: largest differences of logits, and relative ones of matrices."""
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
    """What ``run.py dropin`` can be told."""
    parser.add_argument(
        "--checkouts", type=Path, required=True, help="folder of clones, under their repositories' names"
    )
    parser.add_argument(
        "--rows", type=Path, help="folder that keeps every repository's rows: those that are there are not run again"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="OWNER/NAME", help="of the repositories; the others' results stay as they were"
    )
    parser.add_argument(
        "--cases",
        default="",
        metavar="TEXT",
        help="with --only: cases whose class and variant hold it; the others stay",
    )


def partial(args: argparse.Namespace) -> bool:
    """Never: of the repositories that do not run again, the result keeps what it had."""
    return False


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
    kept = _kept(there, args.cases) if args.only and not args.quick else {"rows": [], "same weights": {}}
    for name in there:
        found = _kept_or_run(name, folders[name], args.quick, args.rows, args.cases)
        rows += [{"repository": name, "commit": found["commit"], **row} for row in found["rows"]]
        pairs |= found["pairs"]
    show("drop-in", COLUMNS, [[_cell(row, column) for column in COLUMNS] for row in rows])
    rows, pairs = [*kept["rows"], *rows], {**kept["same weights"], **pairs}
    rows.sort(key=lambda row: list(REPOSITORIES).index(row["repository"]))  # stable: cases stay in their order
    unseen = [row for row in rows if row["repository"] in UNSEEN]  # whatever came out; no figure counts them
    rows = [row for row in rows if row["repository"] not in UNSEEN]
    worked = [row for row in rows if "law 1" in row]
    many = f"{len(worked)} modules and models"
    figures = [
        figure("drop-in law 1", many, max(row["law 1"] for row in worked)),
        figure("drop-in output", many, max(row["output"] for row in worked)),
        figure("drop-in changed", many, float(sum(not row["observed"] for row in worked))),
        figure("drop-in failed", f"{len(rows)} modules and models", float(sum("failed" in row for row in rows))),
    ]
    for name, pair in pairs.items():
        figures += [figure("drop-in logits", name, pair["logits"]), figure("drop-in matrices", name, pair["matrices"])]
    ran = {row["repository"] for row in [*rows, *unseen]}
    missing = [name for name in REPOSITORIES if name not in ran]
    return figures, {"rows": rows, "never seen before": unseen, "same weights": pairs, "not there": missing}


def _kept(again: list[str], cases: str) -> dict[str, Any]:
    """What is known of the repositories, and of the cases, that do not run again."""
    if not RESULTS.exists():
        return {"rows": [], "same weights": {}}
    details = json.loads(RESULTS.read_text())["details"]
    known = [*details["rows"], *details.get("never seen before", [])]
    rows = [
        row
        for row in known
        if row["repository"] in REPOSITORIES
        and (row["repository"] not in again or cases not in f"{row['class']} {row['variant']}")
    ]
    return {"rows": rows, "same weights": details["same weights"]}


def _cell(row: Row, column: str) -> str:
    value = row.get(column, "refused" if "refused" in row else "failed" if "failed" in row else "")
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _kept_or_run(name: str, checkout: Path, quick: bool, folder: Path | None, cases: str = "") -> Row:
    """The rows of a repository, from a run that was interrupted after it, or measured now."""
    if folder is None or cases:
        return _in_a_process(name, checkout, quick, cases)
    path = folder / f"{name.replace('/', '+')}.json"
    if not path.exists():
        found = _in_a_process(name, checkout, quick)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    kept: Row = json.loads(path.read_text())
    return kept


def _in_a_process(name: str, checkout: Path, quick: bool, only: str = "") -> Row:
    command = [sys.executable, "-m", "benchmarks.dropin", name, str(checkout), "quick" if quick else "whole", only]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        said = (child.stderr or child.stdout).strip()
        print(f"{name}: {said[-2000:]}", file=sys.stderr, flush=True)
        row = {
            "class": "",
            "variant": "",
            "input": "",
            "failed": said.splitlines()[-1] if said else f"exit status {child.returncode}",
        }
        return {"commit": _commit(name, checkout), "rows": [row], "pairs": {}}
    result: Row = json.loads(child.stdout.splitlines()[-1])
    return result


def _commit(name: str, checkout: Path) -> str:
    """Of a clone, or the version of what is installed."""
    if name in INSTALLED:
        return importlib.metadata.version(name)
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return head.stdout.strip()


def _child(name: str, checkout: str, extent: str, only: str) -> None:
    torch.set_num_threads(1)
    cases = [case for case in REPOSITORIES[name](Path(checkout)) if only in f"{case.class_name} {case.variant}"]
    rows = []
    for case in cases[: 1 if extent == "quick" else None]:
        print(case.class_name, case.variant, file=sys.stderr, flush=True)
        rows.append(measure(case))
    pairs = (
        {}
        if extent == "quick" or only
        else {key: same_weights(model, key, (224, 224)) for key, model in official_pairs(name, Path(checkout))}
    )
    print(json.dumps({"commit": _commit(name, Path(checkout)), "rows": rows, "pairs": pairs}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
