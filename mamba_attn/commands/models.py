"""``mamba-attn models``: what ``--model`` can name."""

import argparse

from mamba_attn.commands.options import Commands, command
from mamba_attn.commands.terminal import show

_EXAMPLES = """\

vmamba                    # those whose name has this in it
timm:deit"""
_NOTES = """\
Besides these, every command takes timm:NAME (with timm:PART here, its names
are listed too), hf:FOLDER, a model of transformers on this machine, and your
own code, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.
"""
_HEADER = ("name", "also called", "images", "parameters", "weights")


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = command(commands, "models", "list the models that can be named", examples=_EXAMPLES, notes=_NOTES, run=run)
    parser.add_argument("part", nargs="?", default="", metavar="PART", help="of the name; default: all")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    import torch

    from mamba_attn.models import names, official, registry

    if args.part.startswith("timm:"):
        return _of_timm(args.part.removeprefix("timm:"))
    rows = []
    for name in [*names(), *names("text")]:
        also = [alias for alias, its in registry.aliases().items() if its == name and len(alias) < 30]
        if not any(args.part in each for each in (name, *also)):
            continue
        model = registry.on_meta(name)
        count = sum(each.numel() for each in model.parameters()) / 1e6
        size = getattr(model, "image_size", (224, 224))
        reads = "text" if name in names("text") else f"{size[0]} x {size[1]}"
        demos = [*registry.demos(), *registry.demos("text")]
        weights = ["demo"] * (name in demos) + ["official"] * (name in official.PUBLISHED)
        rows.append((name, ", ".join(also), reads, f"{count:.1f} M", ", ".join(weights)))
    if not rows:
        raise ValueError(f"{args.part!r}: no name of a model has this in it.")
    show(f"{len(rows)} models; torch {torch.__version__}", _HEADER, rows)
    return 0


def _of_timm(part: str) -> int:
    from mamba_attn.core.requirements import require_extras

    require_extras({"timm": "timm"}, "timm")
    import timm

    found = timm.list_models(f"*{part}*")
    if not found:
        raise ValueError(f"timm:{part}: timm has no model with this in its name.")
    print("\n".join(f"timm:{name}" for name in found))
    return 0
