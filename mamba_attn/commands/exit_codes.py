"""Exit codes of commands, and translation of library errors for the command line.

The library names arguments of calls, ``limit=0``; a command reports ``--limit 0``. Any argument written as
``name=value``, with the value as Python prints it, is translated wherever it appears in a sentence.
"""

import ast
import logging
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from mamba_attn.errors import MambaAttnError

MEANING = """\
exit codes: 0 done; 1 done, but something failed and is named; 2 refused,
nothing was done; 130 stopped by Ctrl+C; 143 by SIGTERM"""
_CALL = r"[\w.]+\((?:[^()]|\([^()]*\))*\)"
_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\([^)]*\)|[+-]?\w+(?:\.\d+)?(?:e[+-]?\d+)?"""
_ARGUMENT = re.compile(rf"{_CALL}|(?<![^\s(])(?P<name>[a-z_]+)=(?P<value>{_VALUE}|(?=[,.;\s]|$))")
_FIRST = {
    "create": "model",
    "load": "model",
    "open_data": "data",
    "open_texts": "data",
    "read": "weights",
}  # first positional arguments, by function
_OF_BUILDERS = {"image_size", "img_size", "num_classes", "stride", "class_token"}  # said after --option
_COMMAS = {"--beside", "--keep"}  # lists written with commas on the command line


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they kill: work is saved as after Ctrl+C."""


def exit_code(name: str, call: Callable[[], int], options: Collection[str] = (), stopped: str = "stopped.") -> int:
    """Run a command and return its exit code; print errors as sentences.

    Args:
        name: of the command.
        call: runs the command; returns 0 or 1.
        options: names of the command's options, for ``as_flags``.
        stopped: printed after Ctrl+C and SIGTERM.
    """
    asked: list[KeyboardInterrupt] = []
    try:
        with _terminable(asked), _notes(name, options):
            code = call()
        if not code or not asked:
            return code
        raise asked[0]  # what the signal broke off was taken for a failure, and named as one
    except BaseException as error:
        interrupt = _interrupt(error) or next(iter(asked), None)
        if interrupt is None:
            if not isinstance(error, ValueError | TypeError | OSError | ImportError | MambaAttnError):
                raise
            print(f"mamba-attn {name}: {as_flags(str(error), options)}", file=sys.stderr)
            return 2
        print(f"mamba-attn {name}: {stopped}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The signal behind an error: what tidies up after it may fail in turn, since it comes between any two steps."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


@contextmanager
def _terminable(asked: list[KeyboardInterrupt]) -> Iterator[None]:
    """Raise ``Terminated`` on SIGTERM, and keep it: C++ may make another error of it. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        asked.append(Terminated())
        raise asked[-1]

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show_decisions(name: str) -> None:
    """Print what the library decides, and how long after the start, on standard error.

    Args:
        name: of the command.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"mamba-attn {name}: %(relativeCreated)d ms: %(message)s"))
    logger = logging.getLogger("mamba_attn")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


@contextmanager
def _notes(name: str, options: Collection[str]) -> Iterator[None]:
    """Print warnings as sentences, each once."""
    shown: set[str] = set()

    def note(message: Warning | str, category: type[Warning], *_: object) -> None:
        text = as_flags(str(message), options)
        if text not in shown and issubclass(category, UserWarning):
            print(f"mamba-attn {name}: note: {text}", file=sys.stderr)
        shown.add(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = note  # type: ignore[assignment]
        yield


def as_flags(sentence: str, options: Collection[str]) -> str:
    """Rewrite a library sentence with arguments as command-line flags.

    A call at the start of the sentence becomes flags if all its arguments do; other calls stay unchanged.

    Args:
        sentence: with arguments as ``name=value``.
        options: names of the command's options without dashes; ``layers=`` also fits an option ``layer``.

    Example:
        >>> as_flags("layers=['a', 'b']: they do not fit; batch=1 would", {"layer", "batch"})
        '--layer a b: they do not fit; --batch 1 would'
    """

    def flag(found: re.Match[str]) -> str:
        option = _option(found["name"] or "", options)
        if option is None and found["name"] in _OF_BUILDERS and "option" in options:
            return f"--option {found[0]}"
        if option is None or not found["value"]:
            return option or found[0]
        return f"{option}{_typed(option, found['value'])}"

    if "option" in options:
        sentence = re.sub(r"as an option, (?=\w+=)", "as --option ", sentence)
    call = re.match(rf"({_CALL}): ", sentence)
    flags = call and _call_as_flags(call[1], options)
    if call and flags:
        return f"{flags}: {_ARGUMENT.sub(flag, sentence[call.end() :])}"
    return _ARGUMENT.sub(flag, sentence)


def _call_as_flags(text: str, options: Collection[str]) -> str | None:
    """Return the arguments of a call as flags; None if one of them is not an option."""
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or len(call.args) > 1:
        return None
    given = [(_FIRST.get(call.func.id, ""), value) for value in call.args]
    given += [(keyword.arg or "", keyword.value) for keyword in call.keywords]
    flags = [(_option(name, options), ast.unparse(value)) for name, value in given]
    typed = [f"{option}{_typed(option, value)}" for option, value in flags if option is not None]
    return " ".join(typed) if len(typed) == len(flags) else None


def _option(name: str, options: Collection[str]) -> str | None:
    """Return the flag of an argument; one of the two may be plural."""
    found = next((each for each in (name, f"{name}s", name.removesuffix("s")) if each and each in options), None)
    return None if found is None else f"--{found.replace('_', '-')}"


def _typed(option: str, text: str) -> str:
    """Return a value as typed after its flag."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # nan
        return f" {text}"
    if isinstance(value, bool):
        return ""
    if isinstance(value, tuple) or (isinstance(value, list) and option in _COMMAS):
        return f" {','.join(map(str, value))}"
    words = value if isinstance(value, list) else [value]
    return f" {shlex.join(map(str, words))}"
