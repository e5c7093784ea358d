"""``mamba-attn explain``: arguments, and the loop over images."""

import argparse
import inspect
import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mamba_attn.commands.exit_codes import as_flags
from mamba_attn.commands.options import (
    Commands,
    add_folder,
    add_images,
    add_model,
    command,
    load_model,
    settle_threads,
    spelt_model,
)
from mamba_attn.core.requirements import require_extras, writable

if TYPE_CHECKING:
    from rich.table import Table

    from mamba_attn.explanations.choices import Question
    from mamba_attn.explanations.explaining import Explained

_NEEDED = {"captum": "captum", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}
_NAME, _LEAST = 22, 16  # columns of a table: an image's name, what a model says of it
_HALF = 0.5  # of a picture: less shown is said
_EXAMPLES = """\
                                   # six sample photos
photo.jpg --model vmamba_micro --target hat
scan.png --model net.py:build --weights best.pth --mean 0.5
--text 'A B C . ? ?' --model mamba_copy
--text 'It is in' --model hf:FOLDER --target ' Paris'
'photos/*.jpg' --method raw_attention mamba_lrp"""
_NOTES = """\
IMAGE: a folder stands for the images in it or, if it holds none, for those in
the folders below it (one per class; of train/ and val/, only val/ is used).

With --text it writes index.html (one offline page) and text.npz. Otherwise it
writes to FOLDER, for every image: NAME.html (an offline page), NAME.png (the
same as a picture) and NAME.npz (the maps in pixels, the matrices, the query's
row in every layer, all probabilities); and index.html, which lists them, 200 on
a page. Images from several folders go into folders of the same names. Files
that an earlier call wrote for the same image, model and options are kept.
"""


class Job(NamedTuple):
    """A run of the command: a question per model, the images, the folder for results, the model's options as typed."""

    questions: list["Question"]
    paths: list[Path]
    folder: Path
    call: str
    model: str


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands,
        "explain",
        "draw attention maps of your images or of a text, with classes and matrices",
        examples=_EXAMPLES,
        notes=_NOTES,
        run=run,
        stopped="stopped; the same command resumes here.",
        more=_methods,
    )
    add = parser.add_argument
    add_images(parser)
    add("--text", metavar="TEXT", help="explain what a language model reads instead of images")
    add_model(parser, default="vmamba_micro")
    add(
        "--beside",
        metavar="NAME[,NAME]|none",
        help="bundled models to show alongside; default, for a *_micro model: the other two",
    )
    add(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD",
        help="see below; default: mamba_lrp, raw_attention, attention_rollout and mamba_attribution or, for a ViT, "
        "attn_lrp and transformer_attribution in place of the first and last",
    )
    add(
        "--target",
        metavar="CLASS|INDEX|TOKEN",
        help="class to explain, by name or index, or token after the text; default: the predicted one",
    )
    add("--query", metavar="ROW,COL", help="show the attention of this pixel; default: of the class token")
    add("--box", metavar="X0,Y0,X1,Y1", help="show the mean attention of a box instead, columns X and rows Y")
    add(
        "--layer",
        nargs="+",
        action="extend",
        default=[],
        metavar="LAYER",
        help="indices, names, patterns; default: all, and matrices at 25, 50 and 75 %% of the depth",
    )
    add_folder(parser, "mamba_attn_explain")


def run(args: argparse.Namespace) -> int:
    """Explain the images, and return the exit code."""
    require_extras(_NEEDED)
    return _explain(_job(args)) if args.text is None else _explain_text(args)


def _explain_text(args: argparse.Namespace) -> int:
    """Explain a text, and return the exit code."""
    from mamba_attn.explanations.texts import explain_text

    others = {"image": args.image, "query": args.query, "box": args.box, "beside": args.beside, "layer": args.layer}
    wrong = ", ".join(name if name == "image" else f"--{name}" for name, value in others.items() if value)
    if wrong:
        raise ValueError(f"--text {args.text!r}: {wrong} {'are' if ',' in wrong else 'is'} for images; leave it out.")
    loaded = load_model(args, reads="text")
    settle_threads([loaded.parameters])
    found = explain_text(loaded, args.text, args.out, target=args.target, methods=args.method, command=args.call)
    for number, name, probability in found.best():
        print(f"{'*' if number == found.explained else ' '} {probability:7.2%}  {name!r}")
    print(f"{len(found.words)} tokens, {len(found.layers)} layers; open {Path(args.out) / 'index.html'}")
    return 0


def _methods() -> str:
    """List the methods for the help, by the layers they apply to."""
    from mamba_attn.attribution.catalogue import ANY, METHODS, TRACED
    from mamba_attn.tracing.layer_kinds import SCANS, SOFTMAX

    titles = {(SCANS,): SCANS, (SOFTMAX,): f"{SOFTMAX} (ViT)", TRACED: "both", ANY: "any model"}
    lines = ["methods, by the layers they apply to (`random` and `centre` are baselines):"]
    for made_of, title in titles.items():
        names = ", ".join(name for name, entry in METHODS.items() if entry.made_of == made_of)
        lines.append(textwrap.fill(f"{title}: {names}", 78, initial_indent="  ", subsequent_indent="    "))
    deaf = [name for name, its in METHODS.items() if "layers" not in inspect.signature(its.method.__init__).parameters]
    lines.append(textwrap.fill(f"These ignore --layer: {', '.join(deaf)}.", 78))
    lines.append("raw_attention shows what is read, not what drives the prediction: on")
    lines.append("vmamba_micro, removing the patches it ranks highest does no more harm than")
    lines.append("removing random ones.")
    lines.append("Options follow a colon: attention_rollout:signed,")
    lines.append("mamba_attribution:rule=paper, raw_attention:convention=hidden_mamba.")
    return "\n".join(lines)


def _job(args: argparse.Namespace) -> Job:
    """Parse and check everything possible before the first image."""
    from mamba_attn import images
    from mamba_attn.datasets import loading
    from mamba_attn.datasets.class_names import parse_target
    from mamba_attn.explanations import choices

    paths = images.find(args.image) if args.image else images.samples()
    first = load_model(args)
    methods = choices.parse_methods(args.method, first, place=bool(args.query or args.box))
    question = choices.Question(
        first,
        methods,
        choices.parse_layers(args.layer, first),
        parse_target(args.target, first),
        choices.parse_query(args.query, args.box, first, methods),
        by_default=not args.method,
    )
    default = None if first.weights == "demo" else [loading.NO_COMPANION]
    beside = [name.strip() for name in args.beside.split(",")] if args.beside else default
    others = loading.load_companions(beside, first, args.device)
    questions = [question, *map(question.of_companion, others)]
    settle_threads(each.subject.parameters for each in questions)
    return Job(questions, paths, writable(args.out), args.call, spelt_model(args))


def _explain(job: Job) -> int:
    """Explain images one by one; print the table of predictions, and the next command."""
    from rich.console import Console
    from rich.progress import Progress

    from mamba_attn import images
    from mamba_attn.errors import NonFiniteError
    from mamba_attn.explanations.answer import answer
    from mamba_attn.explanations.explaining import Kept, Pages, about, titles

    progress = Progress(console=Console(stderr=True))
    console = Console()
    table, pages = _table(job.questions, console.width), Pages(job.folder, job.call)
    kept = Kept(job.folder, [about(question) for question in job.questions])
    named = [(path, title, kept.get(path, title)) for path, title in zip(job.paths, titles(job.paths), strict=True)]
    for _, _, known in named:
        if known is not None:
            pages.names.take(known.name)
    try:
        with progress:
            for path, title, found in progress.track(named, description="explaining"):
                if found is None:
                    try:
                        answers = [answer(question, path) for question in job.questions]
                    except (images.ImageError, NonFiniteError) as error:
                        reason = as_flags(str(error), ("range",))
                        progress.console.print(f"skipped: {reason}", markup=False, highlight=False, soft_wrap=True)
                        continue
                    kept.add(path, pages.add(title, answers))
                else:
                    pages.all.append(found)
                if pages.all[-1].left_out > _HALF:
                    share = f"{pages.all[-1].left_out:.0%}"
                    progress.console.print(
                        f"{path}: {share} of the picture is cut off, as the page shows", soft_wrap=True
                    )
                _add_rows(table, pages.all[-1])
    finally:  # after an interruption too: of what is there, also of what comes later
        listed = {each.name for each in pages.all}
        pages.finish([found for _, _, found in named if found is not None and found.name not in listed])
    there, done = sum(found is not None for _, _, found in named), len(pages.all)
    if table.row_count:
        console.print(table)
    again = f", {there} of them by an earlier call" if there else ""
    lines = [f"{done} of {len(job.paths)} images explained{again}"]
    lines[0] += f"; open {job.folder / 'index.html'}" if done else ""
    right = [each.verdict == "correct" for each in pages.all if each.verdict]
    if right:
        lines.insert(0, f"{sum(right)} of {len(right)} predicted correctly")
    if done:
        folder = shlex.quote(_folder(job.paths))
        lines.append(f"next: mamba-attn collect {job.model} --data {folder} --out store".replace("  ", " "))
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0 if done == len(job.paths) else 1


def _folder(paths: Sequence[Path]) -> str:
    """Return the folder that holds all images, in their own spelling where it can be."""
    folders = [path.parent for path in paths]
    alike = len({folder.is_absolute() for folder in folders}) == 1
    return str(Path(os.path.commonpath(folders if alike else [folder.absolute() for folder in folders])))


def _table(questions: Sequence["Question"], width: int) -> "Table":
    """Return a table with a column per model; names that do not fit are cut, and never their probabilities."""
    from rich import box
    from rich.table import Table

    share = (width - _NAME - 2 * (len(questions) + 1)) // len(questions)
    table = Table(title="Top 5 predictions", box=box.SIMPLE_HEAD)
    table.add_column("image", overflow="ellipsis", no_wrap=True, min_width=_NAME)
    for question in questions:
        table.add_column(question.subject.name, overflow="ellipsis", no_wrap=True, max_width=max(_LEAST, share))
    return table


def _add_rows(table: "Table", found: "Explained") -> None:
    from rich.text import Text

    count = max(1, *(len(classes) for classes in found.best))
    for place in range(count):
        truth = found.truth
        cells = [Text(found.title if place == 0 else f"label: {truth}" if place == 1 and truth else "")]
        for classes in found.best:
            label, value = classes[place] if place < len(classes) else ("no classes" if not classes else "", "")
            cells.append(Text(f"{value:>5} {label}" if value else label))
        table.add_row(*cells, end_section=place + 1 == count)
