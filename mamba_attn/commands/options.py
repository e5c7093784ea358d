"""The parser of a command, options shared by several commands, and their checks."""

import argparse
import ast
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Commands = Any  # argparse's object that takes new commands; its class is private

_MODEL = """\
SPEC: a name that `mamba-attn models` lists; timm:NAME; hf:FOLDER, a model of
transformers with its image processor; or your own code, FILE.py:FUNCTION or
PACKAGE.MODULE:FUNCTION, which is run, because you name it, and returns the
model. The file's folder (for a module, this one) comes first on sys.path, as
where python runs it, so a file there called like a library hides the library.
Default: {default}."""
_PARAMETERS_PER_THREAD = 5_000_000  # with less work, threads wait for each other longer than they compute


class CommandParser(argparse.ArgumentParser):
    """A parser whose help may end with the result of a function, called only when help is printed."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the help, with its lazy last part."""
        if self.more is not None:
            self.epilog, self.more = f"{self.epilog}\n{self.more()}", None
        return super().format_help()


_SEEDS = 2**32  # what every generator takes


def command(
    commands: Commands,
    name: str,
    what: str,
    *,
    examples: str,
    notes: str,
    run: Callable[[argparse.Namespace], int],
    stopped: str = "stopped.",
    more: Callable[[], str] | None = None,
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: of ``mamba-attn``.
        name: of the command.
        what: what it does, in one line.
        examples: one call per line, without ``mamba-attn``; comments after #.
        notes: printed verbatim below, at most 80 columns wide.
        run: runs the command with its arguments.
        stopped: printed after Ctrl+C.
        more: returns the end of the help; called when help is printed.
    """
    shown = "\n".join(f"  mamba-attn {name} {line}".rstrip() for line in examples.splitlines())
    parser: CommandParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"examples:\n{shown}\n\n{notes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.more = more
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is decided: backend, device, batches")
    parser.set_defaults(run=run, stopped=stopped)
    return parser


def add_model(parser: argparse.ArgumentParser, default: str | None = "vim_micro") -> None:
    """Add ``--model`` and everything that says how it is built and what it sees.

    Args:
        parser: of the command.
        default: the model where none is named; None: no model.
    """
    group = parser.add_argument_group("the model", _MODEL.format(default=default or "none"))
    add = group.add_argument
    add("--model", default=default, metavar="SPEC", help="see above")
    add("--weights", metavar="FILE|official|demo|random", help="a checkpoint, or FILE:ENTRY of one; default: demo")
    add("--classes", metavar="FILE", help="names of the outputs: one per line, or JSON")
    add("--head", choices=("softmax", "sigmoid", "none"), help="what the outputs are; default: softmax")
    add("--size", metavar="PIXELS|ROWS,COLUMNS", help="of the images; default: the model's")
    add("--mean", metavar="M|R,G,B", help="of pixels in 0..1; default: the model's")
    add("--std", metavar="S|R,G,B", help="of pixels in 0..1; default: the model's")
    add("--range", metavar="LOW,HIGH", help="black and white in files of more than 8 bits")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of the model's builder; may be repeated")
    add("--stand-ins", default="auto", choices=("auto", "on", "off"), help="CPU stand-ins of CUDA code; default: auto")
    add("--trust-remote-code", action="store_true", help="let hf:FOLDER run the code in that folder")
    add_device(group)


def load_model(args: argparse.Namespace, reads: str = "images") -> Any:
    """Return the model that the options of ``add_model`` describe, a ``LoadedModel``.

    Args:
        args: of the command.
        reads: what it must read, "images" or "text".

    Raises:
        ValueError: a model that reads something else.
    """
    from mamba_attn.datasets.loading import load

    found = load(args.model, args.weights, **model_arguments(args), device=args.device)
    if found.reads != reads:
        instead = "give --text TEXT to mamba-attn explain" if reads == "images" else "leave --text out"
        raise ValueError(f"--model {args.model}: this model reads {found.reads}; {instead}.")
    return found


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of ``add_model`` say beyond the model, its weights and device, for ``load``.

    Raises:
        ValueError: an option without a value.
    """
    found: dict[str, Any] = {}
    for name in ("classes", "head", "size", "mean", "std", "range"):
        text = getattr(args, name)
        if text is not None and name in ("classes", "head"):
            found[name] = text
        elif text is not None:
            found[name] = (_size if name == "size" else _numbers)(f"--{name} {text}", text)
    if len(found.get("range", (0, 1))) != 2:
        raise ValueError(f"--range {args.range}: expected two numbers, LOW,HIGH.")
    if args.stand_ins != "auto":
        found["stand_ins"] = args.stand_ins
    if args.trust_remote_code:
        found["trust_remote_code"] = True
    for text in args.option:
        key, given, value = text.partition("=")
        if not given or not key.isidentifier():
            raise ValueError(f"--option {text}: expected KEY=VALUE, e.g. num_classes=7.")
        if key in found or key in ("transform", "layout", "device", "weights"):
            raise ValueError(f"--option {text}: this is not of the builder; use --{key}, or Python.")
        found[key] = _value(value)
    return found


def open_stores(paths: Sequence[Any], args: argparse.Namespace) -> list[Any]:
    """Open stores; the model of ``add_model``, if one is named, is that of every store with its weights.

    Args:
        paths: of the stores.
        args: of a command with ``add_model``.

    Raises:
        StoreError: none of them is of this model; or as ``AttentionStore.open``.
    """
    from mamba_attn.analytics import AttentionStore
    from mamba_attn.errors import StoreError

    if args.model is None:
        return [AttentionStore.open(path) for path in paths]
    model, stores, refused = load_model(args), [], []
    for path in paths:
        try:
            stores.append(AttentionStore.open(path, model=model))
        except StoreError as error:
            stores.append(AttentionStore.open(path))  # raises again if the model is not why
            refused.append(error)
    if len(refused) == len(stores):
        raise refused[0]
    return stores


def spelt_model(args: argparse.Namespace) -> str:
    """Return the options of ``add_model`` that were given, as typed; for the next command to type."""
    words = []
    for name in ("model", "weights", "classes", "head", "size", "mean", "std", "range"):
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", value]
    for text in args.option:
        words += ["--option", text]
    words += ["--stand-ins", args.stand_ins] if args.stand_ins != "auto" else []
    words += ["--trust-remote-code"] if args.trust_remote_code else []
    return shlex.join(words)


def _value(text: str) -> Any:
    """Read a value as Python writes it; else it is text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _numbers(call: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{call}: expected numbers with commas between them.") from None


def _size(call: str, text: str) -> tuple[int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{call}: expected ROWS,COLUMNS in pixels, or one number for both.")
    return int(parts[0]), int(parts[-1])


def add_device(parser: Any) -> None:
    """Add ``--device``, by default the CPU."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the image files, as arguments without a flag."""
    what = "files, folders or patterns; default: six sample photos"
    parser.add_argument("image", nargs="*", metavar="IMAGE", help=what)


def add_limit(parser: argparse.ArgumentParser, what: str = "use the first N images; default: all") -> None:
    """Add ``--limit``, the number of images."""
    parser.add_argument("--limit", type=int, metavar="N", help=what)


def add_folder(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--out``, a folder."""
    parser.add_argument("--out", default=default, metavar="FOLDER", help=f"default: ./{default}")


def require_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers that are too small; options that were not given pass.

    Args:
        args: of the command.
        least: the smallest number by option.

    Raises:
        ValueError: a number is too small.
    """
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value}: expected a number from {smallest} on.")
        if name == "seed" and value is not None and value >= _SEEDS:
            raise ValueError(f"seed={value}: expected a number below {_SEEDS}.")


def settle_threads(parameters: Iterable[int], workers: int = 1, cores: int | None = None) -> None:
    """Limit threads to what the smallest model can keep busy.

    Args:
        parameters: of every model.
        workers: processes that share the machine.
        cores: at most; default: what torch sees, shared by the workers.
    """
    import torch

    useful = min(parameters) // _PARAMETERS_PER_THREAD
    most = torch.get_num_threads() // workers if cores is None else min(torch.get_num_threads(), cores)
    torch.set_num_threads(max(1, min(most, useful)))
