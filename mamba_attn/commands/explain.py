"""``mamba-attn explain``: its arguments, and the loop over the images.

Exit codes: 0 all done, 1 some images could not be explained, 2 nothing was done because of how it was called.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mamba_attn import images
from mamba_attn.core.requirements import exit_code, require_extras, subcommand, writable
from mamba_attn.errors import NonFiniteError

if TYPE_CHECKING:
    from rich.table import Table

    from mamba_attn.explanations.answer import Answer
    from mamba_attn.explanations.choices import Question

_NEEDED = {"captum": "captum", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}
_PARAMETERS_PER_THREAD = 5_000_000  # threads that share less wait for each other longer than they work
_EPILOG = """\
For every image FOLDER receives NAME.html (a page that needs no network), NAME.png (the same as one picture) and
NAME.npz (the maps in pixels, the matrices, the query's row in every layer, all probabilities); index.html lists them.

methods: raw_attention, attention_rollout, attention_rollout_signed, frozen_contribution; for selective scans
mamba_attribution, implicit_attention, mamba_lrp; for softmax attention transformer_attribution,
transformer_attribution_lrp, attention_grad_cam; grad_cam, integrated_gradients, input_x_gradient, saliency, occlusion,
whose maps do not heed --layer; as controls random, centre.
raw_attention shows what is read, not what decides: on vmamba_micro it is below random when what it marks is removed.
Options follow a colon: attention_rollout:signed, mamba_attribution:rule=paper, raw_attention:convention=hidden_mamba.
"""


class Job(NamedTuple):
    """What one call does: a question for each model, the images, where the results go."""

    questions: list["Question"]
    paths: list[Path]
    folder: Path
    command: str


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    what = "classes, attention maps and matrices of images"
    parser = subcommand(commands, "explain", what, _EPILOG)
    add = parser.add_argument
    add("image", nargs="*", metavar="IMAGE", help="files, folders or patterns; default: images of this package")
    add("--model", default="vim_micro", metavar="NAME", help="default: vim_micro")
    add("--weights", default="demo", metavar="demo|FILE|official", help="default: demo, those of this package")
    add(
        "--beside",
        metavar="NAME|none",
        help="a model with demo weights to compare with; default: vit_micro beside the others of them",
    )
    add(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD",
        help="see below; default: raw_attention, "
        "attention_rollout, mamba_attribution or, for a ViT, transformer_attribution",
    )
    add("--target", metavar="CLASS|INDEX", help="class to explain, by name or index; default: the predicted one")
    add("--query", metavar="ROW,COL", help="whose attention, in pixels; default: the class token's")
    add("--box", metavar="X0,Y0,X1,Y1", help="a box instead, columns X and rows Y: the mean of its tokens")
    add("--layer", nargs="+", action="extend", default=[], metavar="LAYER", help="indices, names, patterns; default: "
        "all, and matrices at 25, 50 and 75 %% of the depth")  # fmt: skip
    add("--out", default="mamba_attn_explain", metavar="FOLDER", help="default: ./mamba_attn_explain")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Do what the arguments say, and return the exit code."""
    return exit_code("explain", lambda: _run(args, f"mamba-attn {shlex.join(command)}"))


def _run(args: argparse.Namespace, command: str) -> int:
    require_extras(_NEEDED)
    return _explain(_job(args, command))


def _job(args: argparse.Namespace, command: str) -> Job:
    """Check everything that can be checked before the first image."""
    from mamba_attn.datasets import loaded_model
    from mamba_attn.explanations import choices

    paths = images.find(args.image) if args.image else images.samples()
    first = loaded_model.load(args.model, args.weights, args.device)
    methods = choices.parse_methods(args.method, first)
    question = choices.Question(
        first,
        methods,
        choices.parse_layers(args.layer, first),
        loaded_model.parse_target(args.target, first),
        choices.parse_query(args.query, args.box, first, methods),
    )
    beside = args.beside or (None if args.weights == "demo" else loaded_model.NO_COMPANION)
    second = loaded_model.load_companion(beside, first, args.device)
    questions = [question, *([] if second is None else [question.of_companion(second)])]
    smallest = min(each.subject.parameters for each in questions)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), smallest // _PARAMETERS_PER_THREAD)))
    return Job(questions, paths, writable(args.out), command)


def _explain(job: Job) -> int:
    """Explain images one by one; print the table of classes and where the pages are."""
    from rich.console import Console
    from rich.progress import Progress

    from mamba_attn.explanations.answer import answer
    from mamba_attn.explanations.page import index

    progress = Progress(console=Console(stderr=True))
    table, done = _table(job.questions), []
    with progress:
        for path, name in progress.track(
            list(zip(job.paths, _names(job.paths), strict=True)), description="explaining"
        ):
            try:
                answers = [answer(question, path) for question in job.questions]
            except (images.ImageError, NonFiniteError) as error:
                progress.console.print(f"skipped: {error}", markup=False, highlight=False, soft_wrap=True)
                continue
            _write(job, path.name, name, answers)
            _add_rows(table, path.name, answers)
            done.append((path.name, name))
    if done:
        (job.folder / "index.html").write_text(index(*map(list, zip(*done, strict=True))), encoding="utf-8")
    console = Console()
    if table.row_count:
        console.print(table)
    said = f"{len(done)} of {len(job.paths)} images explained"
    where = f"; open {job.folder / 'index.html'}" if done else ""
    console.print(said + where, markup=False, highlight=False, soft_wrap=True)
    return 0 if len(done) == len(job.paths) else 1


def _names(paths: Sequence[Path]) -> list[str]:
    """A name per image: its stem, numbered where another image, or the list of all, has the same."""
    names: dict[str, None] = {"index": None}
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names[name] = None
    return list(names)[1:]


def _write(job: Job, title: str, name: str, answers: Sequence["Answer"]) -> None:
    """<name>.html, .png and .npz."""
    import numpy as np

    from mamba_attn.explanations.page import page, sheet
    from mamba_attn.figures.png import save_png

    first, *others = answers
    arrays = first.arrays()
    for other in others:
        arrays |= other.arrays(f"{other.name}.")
    (job.folder / f"{name}.html").write_text(page(title, answers, job.command), encoding="utf-8")
    save_png(job.folder / f"{name}.png", sheet(answers))
    np.savez_compressed(job.folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]


def _table(questions: Sequence["Question"]) -> "Table":
    from rich.table import Table

    table = Table(title="five likeliest classes")
    table.add_column("image", overflow="fold")
    for question in questions:
        table.add_column(question.subject.name, overflow="fold")
        table.add_column("", justify="right")
    return table


def _add_rows(table: "Table", name: str, answers: Sequence["Answer"]) -> None:
    from rich.text import Text

    best = [answer.best() for answer in answers]
    count = max(len(classes) for classes in best)
    for place in range(count):
        cells = [Text(name if place == 0 else "")]
        for classes in best:
            label, probability = classes[place] if place < len(classes) else ("", None)
            cells += [Text(label), Text("" if probability is None else f"{probability:.1%}")]
        table.add_row(*cells, end_section=place + 1 == count)
