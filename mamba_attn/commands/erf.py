"""``mamba-attn erf``: arguments, the images, its files."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_attn.commands.compare_texts import write_files
from mamba_attn.commands.exit_codes import as_flags
from mamba_attn.commands.options import (
    Commands,
    add_folder,
    add_images,
    add_limit,
    add_model,
    command,
    load_model,
    require_least,
    settle_threads,
)
from mamba_attn.commands.ranks import left_to_others, ranks_bar
from mamba_attn.commands.terminal import show
from mamba_attn.core.requirements import parse_place, require_extras, writable
from mamba_attn.errors import nearest

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mamba_attn.core.loaded_model import LoadedModel
    from mamba_attn.core.transform import Transform
    from mamba_attn.datasets import Data
    from mamba_attn.erf.fields import ReceptiveField
    from mamba_attn.erf.parts import FieldParts

_NEEDED = {"captum": "captum", "matplotlib": "matplotlib", "plotly": "plotly", "PIL": "pillow", "rich": "rich"}
_UNTRAINED = "untrained"
_Picture = Callable[["Transform"], "np.ndarray"]
_EXAMPLES = """\
photo.jpg --untrained             # next to random weights
--data photos.zip --limit 50 --model vmamba_micro
photo.jpg --query class --layer 3"""
_NOTES = """\
Writes to FOLDER: erf.html (an offline page), erf.png and erf.npz, with the
gradient of the token's features with respect to the pixels, averaged over the
images; what the token reads in every layer; the attention rollout.

For 20, 30, 50 and 99 % of the gradient, the table gives the smallest square
around the token that contains this share: its side in pixels and its share of
the image. It also gives mean distances in pixels. Images of a collection
(--data) come in the order of the hashes of their names: the first N are a fair
sample.

What is measured is saved in FOLDER/measured, 16 images at a time: after an
interruption the same command resumes there, and with a larger --limit goes on
there. Parts of images that have changed are removed, and those of all but the
last four models or tokens. Started by torchrun, by srun or as a job array,
every process measures some of the images.
"""


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(
        commands,
        "erf",
        "measure how far a token sees, in pixels",
        examples=_EXAMPLES,
        notes=_NOTES,
        run=run,
        stopped="stopped; the same command resumes at the last part.",
    )
    add = parser.add_argument
    add_images(parser)
    add("--data", metavar="DIR|ZIP[:PART]", help="a collection instead, as for collect; --limit takes a fair sample")
    add_model(parser)
    add("--untrained", action="store_true", help="add the same model with random weights")
    add("--query", metavar="ROW,COL|class", help="measure the field of this pixel or token; default: the central patch")
    add("--box", metavar="X0,Y0,X1,Y1", help="measure a box instead, columns X and rows Y: the mean of its tokens")
    add("--layer", metavar="LAYER", help="index or name; default: the last layer's output")
    add_limit(parser)
    add("--seed", type=int, default=0, metavar="N", help="seed of the random weights; default: 0")
    add_folder(parser, "mamba_attn_erf")


def run(args: argparse.Namespace) -> int:
    """Measure every model on all images; write and print."""
    require_extras(_NEEDED)
    from mamba_attn.attribution.queries import Query, require_inside
    from mamba_attn.datasets.untrained import untrained
    from mamba_attn.distributed import Ranks
    from mamba_attn.erf.fields import ReceptiveField
    from mamba_attn.erf.parts import tidy_questions

    ranks = Ranks.here()
    args.device = ranks.device(args.device)
    require_least(args, limit=1)
    pictures, identities, everything = _pictures(args)  # before the model, which takes longer
    subject, place = load_model(args), _place(args)
    if ranks.launcher:
        settle_threads([subject.parameters], cores=ranks.cores)
    for kind, numbers in place.items():
        if not isinstance(numbers, str):
            require_inside("query" if kind == "pixel" else kind, Query(kind, (numbers,)), subject.transform.size)
    layer, models = _layer(args.layer, subject), {subject.name: subject}
    if args.untrained:
        models[_UNTRAINED] = untrained(subject, args.seed)
    folder = writable(args.out)
    parts = {name: _parts(folder, each, pictures, identities, layer, place) for name, each in models.items()}
    left = 0
    for name, each in parts.items():
        what, whole = f"receptive field, {name}", len(pictures)
        with ranks_bar(ranks, what) as advance:
            left += each.measure(ranks, lambda more: advance(ranks.count(what, more), whole))  # noqa: B023
    if left or not ranks.reports:
        return left_to_others(ranks, left, folder)
    damaged = list(dict.fromkeys(reason for each in parts.values() for reason in each.damaged))
    for reason in damaged:
        print(f"skipped: {as_flags(reason, ('range',))}", file=sys.stderr)
    fields: dict[str, ReceptiveField] = {name: each.result() for name, each in parts.items()}
    _write(folder, fields, args.call)
    for each in parts.values():
        each.tidy(everything)
    tidy_questions(folder / "measured")
    _table(fields)
    skipped = sum(len(each.skipped) for each in fields.values())
    for name, found in fields.items():
        if found.skipped:
            print(f"{name}: {len(found.skipped)} images gave NaN or Inf and were left out")
    print(f"open {folder / 'erf.html'}")
    return 1 if (damaged or skipped) and ranks.launcher != "torchrun" else 0  # which would start all again


def _pictures(args: argparse.Namespace) -> "tuple[list[_Picture], list[str], Callable[[], list[str]]]":
    """Return a function per image, which reads it through a transform; what each is; what all are without a limit."""
    from mamba_attn import images
    from mamba_attn.datasets import open_data

    if args.data is None:
        all_paths = images.find(args.image) if args.image else images.samples()
        paths = all_paths[: args.limit]
        return [partial(_of_file, path) for path in paths], [*map(_file, paths)], lambda: [*map(_file, all_paths)]
    if args.image:
        raise ValueError(f"--data {args.data}: give a collection or IMAGE ({args.image[0]}), not both.")
    data = open_data(args.data)
    chosen = data.chosen(limit=args.limit)
    return (
        [partial(_of_data, data, index) for index in chosen],
        [*map(data.identity_of, chosen)],
        lambda: [*map(data.identity_of, data.chosen())],
    )


def _of_file(path: Path, transform: "Transform") -> "np.ndarray":
    return transform.pixels(path)


def _file(path: Path) -> str:
    about = path.stat()
    return f"{path.resolve()}\0{about.st_size}\0{about.st_mtime_ns}"


def _of_data(data: "Data", index: int, transform: "Transform") -> "np.ndarray":
    return data.pixels(index, transform)


def _parts(
    folder: Path,
    subject: "LoadedModel",
    pictures: Sequence[_Picture],
    identities: list[str],
    layer: str | None,
    place: dict[str, Any],
) -> "FieldParts":
    """Return the field of one model in parts."""
    from mamba_attn.erf.fields import FieldSum
    from mamba_attn.erf.parts import FieldParts

    transform, device = subject.transform, subject.device

    def read(picture: _Picture) -> "torch.Tensor":
        images: torch.Tensor = transform.normalise(picture(transform)[None])
        return images.to(device)

    named = place.get("query")
    weights_and_code = [subject.fingerprint, subject.code_fingerprint]
    of = [subject.name, *weights_and_code, dict(subject.options), transform.as_dict(), layer, place]
    return FieldParts(
        folder / "measured",
        of,
        identities,
        [partial(read, picture) for picture in pictures],
        lambda: FieldSum(subject.model, named, place.get("pixel"), place.get("box"), layer),
    )


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``receptive_field`` that choose the token or box."""
    if args.query == "class" and args.box is None:
        return {"query": "class"}
    return dict(parse_place(args.query, args.box, ", or class"))


def _layer(text: str | None, subject: "LoadedModel") -> str | None:
    from mamba_attn.datasets.made_of import traced_layers

    layers = [] if text is None else traced_layers(subject)
    if text is None or text in layers:
        return text
    if text.removeprefix("-").isdecimal() and -len(layers) <= int(text) < len(layers):
        return layers[int(text)]
    known = f"{subject.name} has {len(layers)} layers, 0..{len(layers) - 1}. "
    raise ValueError(f"--layer {text}: no such layer; {known}{nearest(text, layers)}")


def _write(folder: Path, fields: "dict[str, ReceptiveField]", command: str) -> None:
    """Write erf.html, erf.png and erf.npz; several jobs of an array may do so at once."""
    import numpy as np

    from mamba_attn.analytics.places import LocalPlace
    from mamba_attn.erf.page import page, panels
    from mamba_attn.figures.png import reach_rgb, save_png

    drawn = panels(fields)
    write_files(folder, {"erf.html": page(fields, command)})
    save_png(folder / "erf.png", reach_rgb(**drawn))
    first = next(iter(fields))
    arrays = {"command": np.array(command)}
    for name, each in fields.items():
        arrays |= each.arrays("" if name == first else f"{name}.")
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    LocalPlace(folder).replace("erf.npz", file.getvalue())


def _table(fields: "dict[str, ReceptiveField]") -> None:
    from mamba_attn.erf.page import HEADER, table

    first = next(iter(fields.values()))
    title = f"effective receptive field of {first.reader} at the output of {first.layer}; distances in pixels"
    show(title, HEADER, table(fields))
